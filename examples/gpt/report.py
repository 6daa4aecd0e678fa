"""The table, the figure and the records of a comparison."""

import csv
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import flax
import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

import jax_mhc

from .files import replacing
from .settings import Connection, Settings

# Label, colour (Okabe-Ito: told apart by colour-blind readers too), line width and dashes. The
# plain residual, which others are measured by, is a dotted line on top of them and so hides none.
STYLES: dict[Connection, tuple[str, str, float, str]] = {
    "residual": ("plain residual", "#333333", 1.6, ":"),
    "hc": ("HC", "#E69F00", 2.4, "-"),
    "mhc": ("mHC", "#0072B2", 3.2, "-"),
    "static": ("static mHC", "#009E73", 1.6, "-"),
    "identity": ("identity (iHC)", "#CC79A7", 1.6, "-"),
    "lite": ("mHC-lite", "#D55E00", 1.6, "-"),
    "published": ("HC as published", "#F0E442", 1.6, "-"),
}
# A note below the figure: what short runs show of HC's loss is not what long ones do.
LONGER = (
    "HC is ahead in short runs. In 2000 steps of 76 M parameters its lead over mHC goes, and its "
    "gain reaches thousands: docs/results.md."
)
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
    """Composite gain, gradient norm and loss over the steps, a curve for each run.

    Gradient norms and losses are shown beside those of the plain residual of the same seed, where
    it is among the runs: absolute ones lie on top of each other. Legends have the numbers.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    gain, norm, loss = figure.subplots(1, 3)
    plain = {r["seed"]: measurements(r) for r in runs if r["connection"] == "residual"}
    of_plain = all(run["seed"] in plain for run in runs)
    for connection in dict.fromkeys(run["connection"] for run in runs):
        name, color, width, dashes = STYLES[connection]
        own = [(r["seed"], measurements(r)) for r in runs if r["connection"] == connection]
        gains = [m["gain"] for _, m in own]
        norms = [m["grad_norm"] / (plain[s]["grad_norm"] if of_plain else 1) for s, m in own]
        losses = [
            m["validation_loss"] - (plain[s]["validation_loss"] if of_plain else 0) for s, m in own
        ]
        last = np.mean([m["validation_loss"][-1] for _, m in own])
        for axes, values, label in (
            (gain, gains, f"{name}: up to {np.max(gains):.4g}"),
            (norm, norms, f"{name}: {np.nanmean(norms):.2f} in the mean"),
            (loss, losses, f"{name}: {last:.3f} at the end"),
        ):
            for (_, m), ys in zip(own, values, strict=True):
                axes.plot(
                    m["step"], ys, color=color, lw=width, ls=dashes,
                    zorder=3 if connection == "residual" else 2, label=label,
                )  # fmt: skip
                label = None
    gain.set(title="Composite gain, largest of all tokens", yscale="log")
    if of_plain:
        norm.set(title="Gradient norm / plain residual's")
        loss.set(title="Validation loss beside plain residual's")
    else:
        norm.set(title="Gradient norm, mean since the last point", yscale="log")
        loss.set(title="Validation loss, nats a byte")
    for axes in (gain, norm, loss):
        axes.title.set_fontsize(10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        # Below, where it hides no line.
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.16))
    if {"hc", "mhc"} <= {run["connection"] for run in runs}:
        figure.supxlabel(LONGER, fontsize=9)
    figure.suptitle(f"Byte-level GPT, {describe(settings)}", fontsize=9)
    return figure


def measurements(run: dict[str, Any]) -> dict[str, np.ndarray]:
    """The curves of a run: what was measured on held-out text, and the norms in between.

    The gain is the larger one of forward and backward, the gradient norm the mean of the steps
    since the last measurement, before clipping.
    """
    found = points(run)
    curves = {name: np.array([p[name] for p in found]) for name in ("step", "validation_loss")}
    curves["gain"] = np.array([max(p["gain_forward"], p["gain_backward"]) for p in found])
    norms = {r["step"]: r["grad_norm"] for r in run["records"] if "grad_norm" in r}
    spans = zip(curves["step"], curves["step"][1:], strict=False)
    means = [np.mean([norms[s] for s in norms if first < s <= last]) for first, last in spans]
    return curves | {"grad_norm": np.array([np.nan, *means])}


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
        draw_figure(runs, settings).savefig(figure_path, dpi=130)
        with open(records_path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        summary_path.write_text(json.dumps(summary, indent=2, default=str) + "\n")
