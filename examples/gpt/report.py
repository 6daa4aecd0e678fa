"""The table, the figure and the records of a comparison."""

import csv
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import flax
import jax
import optax
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

import jax_mhc

from .files import replacing
from .settings import Connection, Settings

# Label, colour (Okabe-Ito: told apart by colour-blind readers too) and line width. The curves often
# lie on top of each other, so later ones are thinner.
STYLES: dict[Connection, tuple[str, str, float]] = {
    "residual": ("plain residual", "#999999", 4.0),
    "hc": ("HC", "#E69F00", 2.4),
    "mhc": ("mHC", "#0072B2", 1.4),
    "static": ("static mHC", "#009E73", 1.2),
    "identity": ("identity (iHC)", "#CC79A7", 1.2),
    "lite": ("mHC-lite", "#D55E00", 1.0),
    "published": ("HC as published", "#F0E442", 1.0),
}
LABELS = {name: label for name, (label, *_) in STYLES.items()}

ROWS = (
    ("parameters", "num_params", ",.0f"),
    ("fused calls in the step", "num_fused_calls", ".0f"),
    ("validation loss, initial", "initial_validation_loss", ".4f"),
    ("validation loss, final", "validation_loss", ".4f"),
    ("training loss, last 20 steps", "train_loss", ".4f"),
    ("gradient norm, largest", "max_grad_norm", ".3g"),
    ("composite gain forward, largest", "max_gain_forward", ".5g"),
    ("composite gain backward, largest", "max_gain_backward", ".5g"),
    ("mean of tokens forward, largest", "max_mean_gain_forward", ".5g"),
    ("mean of tokens backward, largest", "max_mean_gain_backward", ".5g"),
    ("step, ms, median", "step_ms", ".1f"),
    ("tokens per second", "tokens_per_s", ",.0f"),
    ("compilation, s", "compile_s", ".1f"),
)


def describe(settings: Settings) -> str:
    """The configuration in a line."""
    return (
        f"depth {settings.depth} ({2 * settings.depth} sublayers), width {settings.width}, "
        f"heads {settings.heads}, streams {settings.streams}, {settings.batch} × {settings.seq} "
        f"bytes a step, learning rate {settings.learning_rate:g}, {settings.dtype}, "
        f"seeds {', '.join(map(str, settings.seeds))}"
    )


def columns(
    results: list[dict[str, Any]], what: Sequence[tuple[str, str]]
) -> Iterable[tuple[str, list[str]]]:
    """Label and cells for each connection: means over the seeds, ± half of their range.

    Where half of the range is more than half of the mean, as of gains, the range is told instead.
    what: the key of each cell, and how it is written.
    """
    for connection in dict.fromkeys(r["connection"] for r in results):
        own = [r for r in results if r["connection"] == connection]
        cells = []
        for key, style in what:
            values = [r[key] for r in own]
            least, mean, most = min(values), statistics.fmean(values), max(values)
            spread = (most - least) / 2
            if spread <= 1e-6 * abs(mean):  # rounding
                cells.append(format(mean, style))
            elif spread < abs(mean) / 2:
                cells.append(f"{format(mean, style)} ± {format(spread, style.lstrip('+'))}")
            else:  # of other orders of magnitude
                cells.append(f"{format(least, style)} to {format(most, style)}")
        yield LABELS[connection], cells


def make_table(results: list[dict[str, Any]]) -> Table:
    """The comparison, with a column for each connection."""
    table = Table("", box=box.SIMPLE_HEAD)
    all_cells = []
    for label, cells in columns(results, [row[1:] for row in ROWS]):
        table.add_column(label, justify="right")
        all_cells.append(cells)
    for i, (label, *_) in enumerate(ROWS):
        table.add_row(label, *(cells[i] for cells in all_cells))
    return table


def draw_figure(runs: list[dict[str, Any]], settings: Settings) -> Figure:
    """Loss, gradient norm and composite gain over the steps, a curve for each run."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss, norm, gain = figure.subplots(1, 3)
    for run in runs:
        label, color, width = STYLES[run["connection"]]
        if run["seed"] != settings.seeds[0]:
            label = None

        def curve(axes, key, run=run, color=color, **style):
            points = [(r["step"], r[key]) for r in run["records"] if key in r]
            axes.plot(*zip(*points, strict=True), color=color, **style)

        curve(loss, "loss", lw=0.6, alpha=0.35)
        curve(loss, "validation_loss", lw=width, label=label)
        curve(norm, "grad_norm", lw=0.7 * width, label=label)
        curve(gain, "gain_forward", lw=width, label=label)
        curve(gain, "gain_backward", lw=width, ls=(0, (3, 2)))
    loss.set(title="Loss (thick: validation, thin: training)", ylabel="nats a byte")
    norm.set(title="Gradient norm, before clipping", yscale="log")
    gain.set(title="Composite gain (dashed: backward)", yscale="log")
    gain.set_ylabel("largest of all tokens")
    for axes in (loss, norm, gain):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Byte-level GPT, {describe(settings)}", fontsize=10)
    return figure


def points(run: dict[str, Any]) -> list[dict[str, float]]:
    """Measurements on held-out text, and what the steps since the last one told.

    Mean loss, and the largest gradient norm and gain.
    """
    result, since = [], []
    for record in run["records"]:
        since.append(record)
        if "validation_loss" not in record:
            continue
        names = (
            "step", "validation_loss", "gain_forward", "gain_backward", "mean_gain_forward",
            "mean_gain_backward",
        )  # fmt: skip
        point = {name: record[name] for name in names}
        steps = [r for r in since if "loss" in r]
        if steps:
            point["loss"] = statistics.fmean(r["loss"] for r in steps)
            for name in ("grad_norm", "sampled_gain_forward", "sampled_gain_backward"):
                point[name] = max(r[name] for r in steps)
        result.append(point)
        since = []
    return result


def save(runs: list[dict[str, Any]], results: list[dict], settings: Settings, text: str) -> None:
    """Write train_gpt.png, records.csv (a line for each step) and summary.json into the folder."""
    rows = [
        dict(connection=run["connection"], seed=run["seed"], **record)
        for run in runs
        for record in run["records"]
    ]
    # A first step has more to tell than the one before all.
    names = list(dict.fromkeys(name for row in rows[1:2] + rows for name in row))
    summary = dict(
        settings=dataclasses.asdict(settings),
        text=text,
        device=jax.devices()[0].device_kind,
        versions={m.__name__: m.__version__ for m in (jax, flax, optax, jax_mhc)},
        results=results,
        runs=[
            dict(connection=run["connection"], seed=run["seed"], points=points(run)) for run in runs
        ],
    )
    with (
        replacing(settings.out / "train_gpt.png") as figure_path,
        replacing(settings.out / "records.csv") as records_path,
        replacing(settings.out / "summary.json") as summary_path,
    ):
        draw_figure(runs, settings).savefig(figure_path, dpi=100)
        with open(records_path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        summary_path.write_text(json.dumps(summary, indent=2, default=str) + "\n")
