"""Draws the figures of docs/ and writes its tables, from the newest records of a GPU.

`make bench-gpu` runs this last. What benchmarks measured stands in performance.md, results.md,
diagnostics.md and README.md between two comments, `<!-- name -->` and `<!-- /name -->`, and is
written here; the text around them is not. So is the package's table of what is faster
(`_call/faster.json`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cells
import configurations
import diagnostics_step
import matplotlib
import mesh_step
import model
import numpy as np
import recompute
import train_step
import training
import tyro
from matplotlib.figure import Figure
from tabulate import tabulate

# Okabe-Ito: told apart by colour-blind readers too; the markers differ as well.
FUSED, PLAIN, OTHER = "#0072B2", "#E69F00", "#999999"

OPS = {
    "pre": "pre",
    "post": "post",
    "post_pre": "post_pre (post, next pre)",
    "fb": "fb: a sublayer and its gradients",
    "pre_bwd": "backward of pre",
    "post_bwd": "backward of post",
    "post_pre_bwd": "backward of post_pre",
    "fb_post_pre": "fb of post_pre",
    "pre_norm": "pre with a norm",
    "post_pre_norm": "post_pre with a norm",
    "fb_norm": "fb with a norm",
}


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    results: Path = Path("benches/results/h200")
    """Folder with the records of one GPU."""
    docs: Path = Path("docs")
    """Folder of the pages and of images/."""
    readme: Path = Path("README.md")
    """The page with the cost of three sizes of model."""
    faster: Path = Path("python/jax_mhc/_call/faster.json")
    """The package's table of what is faster."""


def newest(results: Path, suffix: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest record `<date><suffix>.json` and where it is."""
    names = re.compile(rf"\d{{4}}-\d\d-\d\d{suffix}\.json")
    paths = sorted(path for path in results.glob("*.json") if names.fullmatch(path.name))
    return (paths[-1], renamed(json.loads(paths[-1].read_text()))) if paths else None


def renamed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with today's names of the ops: before 2026-11-29 post_pre was called seam."""
    names = {
        "seam": "post_pre",
        "seam_bwd": "post_pre_bwd",
        "seam_norm": "post_pre_norm",
        "fb_seams": "fb_post_pre",
    }
    for rows in (record.get("rows", []), record.get("peaked", [])):
        for row in rows:
            if "op" in row:
                row["op"] = names.get(row["op"], row["op"])
    return record


def machine(record: dict[str, Any], path: Path, docs: Path) -> str:
    link = Path(os.path.relpath(path.with_suffix(".md"), docs))
    return (
        f"{record['gpu']}, driver {record['driver']}, jax {record['jax']} "
        f"({record['plugin']}), commit {record['commit']} ([record]({link.as_posix()}))"
    )


def table(rows: list[list[Any]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def us(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


# ---- kernels ------------------------------------------------------------------------------------


def kernel_rows(record: dict[str, Any]) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
    """Rows by shape and op, in the order of OPS."""
    shapes: dict[tuple[int, int], dict[str, Any]] = {}
    for row in record["rows"]:
        if row["op"] in OPS and "graph" not in row:
            shapes.setdefault((row["tokens"], row["hidden"]), {})[row["op"]] = row
    return {
        shape: {op: ops[op] for op in OPS if op in ops} for shape, ops in sorted(shapes.items())
    }


def time_us(row: dict[str, Any], implementation: str) -> float:
    """Kernel time; wall time where there is no profile."""
    return row[implementation]["kernel_us"] or row[implementation]["wall_us"]


def draw_kernels(record: dict[str, Any], path: Path) -> None:
    shapes = kernel_rows(record)
    # Ops with a norm are in the table alone: two rows of panels are enough to look at.
    ops = [
        op for op in OPS if not op.endswith("_norm") and any(op in rows for rows in shapes.values())
    ]
    num_columns = min(2, len(ops))
    num_rows = -(-len(ops) // num_columns)
    height = 0.9 + num_rows * (0.5 + 0.3 * len(shapes))
    figure = Figure(figsize=(cells.WIDTH, height), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[len(ops) :]:
        panel.set_axis_off()
    for op, panel in zip(ops, panels.flat, strict=False):
        panel.axvline(1, color="black", linewidth=1)
        for height, rows in enumerate(shapes.values()):
            if op not in rows:
                continue
            row = rows[op]
            fused, plain = (time_us(row, name) / row["floor_us"] for name in ("fused", "plain"))
            panel.plot([fused, plain], [height, height], color=OTHER, linewidth=1.5, zorder=1)
            panel.scatter(plain, height, color=PLAIN, marker="s", s=34, label="plain JAX")
            panel.scatter(fused, height, color=FUSED, marker="o", s=34, label="fused")
            panel.annotate(
                f"{fused:.2f}", (fused, height), (0, 5), textcoords="offset points",
                ha="center", fontsize=8.5, color=FUSED,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )  # fmt: skip
        panel.set_title(OPS[op], fontsize=10, loc="left")
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_yticks(range(len(shapes)), [f"{t} × {c}" for t, c in shapes])
    panels[0, 0].set_ylim(len(shapes) - 0.5, -0.6)
    panels[0, 0].set_xlim(left=0)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside lower right", ncols=2, frameon=False)
    figure.supxlabel("kernel time / time to copy the bytes that must move", fontsize=10)
    figure.supylabel("tokens × hidden width", fontsize=10)
    save(figure, path)


def kernel_section(record: dict[str, Any], path: Path, docs: Path) -> str:
    shapes = kernel_rows(record)
    peers = {
        (found["library"], found["version"], found["tokens"], found["hidden"]): found["us"]
        for found in record["peers"]
        if "us" in found
    }
    libraries = sorted({key[:2] for key in peers})
    rows = [
        [
            f"{shape[0]} × {shape[1]}" if op == next(iter(ops)) else "",
            op,
            us(time_us(row, "plain")),
            *(us(peers.get((*library, *shape), {}).get(op)) for library in libraries),
            us(time_us(row, "fused")),
            f"{time_us(row, 'plain') / time_us(row, 'fused'):.1f}",
            us(row["floor_us"]),
            f"{row['floor_us'] / time_us(row, 'fused'):.2f}",
        ]
        for shape, ops in shapes.items()
        for op, row in ops.items()
    ]
    headers = [
        "T × C", "op", "plain JAX", *(" ".join(library).capitalize() for library in libraries),
        "fused", "faster by", "floor", "floor / fused",
    ]  # fmt: skip
    parts = [
        f"{machine(record, path, docs)}; copy {max(record['copy_gb_per_s'].values()) / 1e3:.2f} "
        "TB/s.",
        table(rows, headers),
    ]
    decode = [row for row in record["rows"] if "graph" in row]
    if decode:
        decode_rows = [
            [
                row["tokens"], us(row["graph"]["us"]), us(time_us(row, "fused")),
                us(time_us(row, "plain")),
                f"{sum(kernel['launches'] for kernel in row['plain']['kernels'].values()):.0f}",
                us(row["plain"]["wall_us"]),
            ]
            for row in decode
        ]  # fmt: skip
        parts += [
            f"**Decode**: pre of few tokens, C = {decode[0]['hidden']}. In a graph: a call among "
            f"{decode[0]['graph']['calls']} in one CUDA graph, each with its own parameters.",
            table(
                decode_rows,
                ["T", "fused, in a graph", "fused, kernel", "plain JAX, kernels", "its kernels",
                 "plain JAX, wall time"],
            ),
        ]  # fmt: skip
    parts += [error_text(record), memory_text(record), fixed_cost_text(record)]
    return "\n\n".join(parts)


def error_text(record: dict[str, Any]) -> str:
    """Largest errors against float64, for the smoothest and the most peaked logits."""
    largest: dict[str, dict[float, dict[str, float]]] = {"fused": {}, "plain": {}}
    for row in record["peaked"]:
        for implementation, sigmas in largest.items():
            found = sigmas.setdefault(row["sigma"], {})
            for name, error in row[implementation].items():
                if row.get("op") == "post_pre_bwd":
                    name = f"{name} of post_pre_bwd"
                found[name] = max(found.get(name, 0.0), error)
    sigmas = min(largest["fused"]), max(largest["fused"])
    rows = [
        [name, *(f"{largest[i][sigma][name]:.1e}" for i in largest for sigma in sigmas)]
        for name in largest["fused"][sigmas[0]]
    ]
    headers = [
        "result",
        *(f"{i}, σ = {sigma:.0f}" for i in ("fused", "plain JAX") for sigma in sigmas),
    ]
    text = (
        "**Errors**: the largest relative L2 errors against float64, for logits of h_res of "
        f"deviation σ, on {record['peaked'][0]['tokens']} tokens of every width above. "
        "One rounding to bfloat16 is 1.7e-3."
    )
    return f"{text}\n\n{table(rows, headers)}"


def memory_text(record: dict[str, Any]) -> str:
    def streams(op: str, implementation: str, what: str) -> str:
        sizes = [
            row[implementation]["memory"][f"{what}_bytes"] / (2 * row["tokens"] * row["hidden"])
            for ops in kernel_rows(record).values()
            for name, row in ops.items()
            if name == op
        ]
        low, high = f"{min(sizes):.2g}", f"{max(sizes):.2g}"
        return low if low == high else f"{low} to {high}"

    scratch = ", ".join(
        f"{op} {streams(op, 'fused', 'temp')} (plain JAX: {streams(op, 'plain', 'temp')})"
        for op in ("pre", "post_pre", "post_pre_bwd", "fb")
        if any(op in ops for ops in kernel_rows(record).values())
    )
    return (
        f"**Memory**, in u = 2·C bytes a token: between forward and backward a sublayer keeps "
        f"{streams('fb', 'fused', 'saved')} u beyond x and y (plain JAX: "
        f"{streams('fb', 'plain', 'saved')} u). Temporary memory: {scratch}."
    )


def fixed_cost_text(record: dict[str, Any]) -> str:
    above = [
        row["fused"]["wall_us"] - row["fused"]["kernel_us"]
        for ops in kernel_rows(record).values()
        for row in ops.values()
        if row["fused"]["kernel_us"]
    ]
    text = (
        f"**Fixed costs**: the first call of a process takes "
        f"{record['first_call_ms']['beyond_compile_ms']:.1f} ms more than that of `x + 1`, XLA's "
        "compilation left out."
    )
    if above:
        text += (
            f" Wall time of calls queued one after the other is {min(above):.0f} to "
            f"{max(above):.0f} µs above the sum of the kernels."
        )
    return text


# ---- configurations -----------------------------------------------------------------------------


def draw_configurations(record: dict[str, Any], path: Path) -> None:
    save(cells.heat_map(record), path)


def configurations_section(record: dict[str, Any], path: Path, docs: Path) -> str:
    slower = [row for row in record["rows"] if cells.is_plain_faster(row)]
    named = [
        f"{cells.kind(row)}, C = {row['hidden']}, {row['tokens']} tokens "
        f"({row['fused']['fb'] / cells.plain_us(row):.1f} times)"
        for row in slower
    ]
    return "\n\n".join(
        [
            f"{machine(record, path, docs)}; copy {record['copy_gb_per_s'] / 1e3:.2f} TB/s.",
            "![Floor over fused by configuration](images/configurations.svg)",
            configurations.table(record["rows"]),
            f"**Plain JAX is faster** in {len(slower)} of these {len(record['rows'])}, by the time "
            f"with gradients{': ' if named else ''}{'; '.join(named)}.",
        ]
    )


# ---- the training step --------------------------------------------------------------------------


def draw_train_step(record: dict[str, Any], path: Path) -> None:
    rows = record["rows"]
    colors = [
        OTHER if row["connection"] == "residual"
        else FUSED if row["connection"] in model.FUSED else PLAIN
        for row in rows
    ]  # fmt: skip
    figure = Figure(figsize=(cells.WIDTH, 0.9 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    times = [row["ms"] for row in rows]
    peaks = [row["memory"]["peak_bytes"] / 1e9 for row in rows]
    for panel, values, title in (
        (left, times, "a training step, ms"),
        (right, peaks, "peak memory, GB"),
    ):
        bars = panel.barh(range(len(rows)), values, color=colors, height=0.7)
        labels = [
            f"{value:.1f}" + (f"  ({100 * (value / values[0] - 1):+.1f} %)" if i else "")
            for i, value in enumerate(values)
        ]
        panel.bar_label(bars, labels, padding=3, fontsize=9)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlim(0, 1.9 * max(values))  # room for the labels
        panel.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(rows)), [model.LABELS[row["connection"]] for row in rows])
    left.invert_yaxis()
    save(figure, path)


def train_step_section(record: dict[str, Any], path: Path, docs: Path) -> str:
    rows = [
        [
            model.LABELS[row["connection"]], f"{row['ms']:.1f}", f"{row['spread_ms']:.1f}",
            f"{100 * row['overhead']:+.1f} %" if row["overhead"] else "",
            f"{row['tokens_per_s'] / 1e3:.1f}", f"{row['memory']['peak_bytes'] / 1e9:.1f}",
            f"{train_step.kernels_ms(row, 'mhc_'):.1f}", f"{train_step.kernels_ms(row, ''):.1f}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    headers = [
        "connection", "ms a step", "spread", "overhead", "1000 tokens/s", "peak, GB",
        "fused kernels, ms", "all kernels, ms",
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"{machine(record, path, docs)}; {record['parameters'] / 1e6:.0f} M parameters.",
            "![Time and peak memory of a training step by connection](images/train_step.svg)",
            table(rows, headers),
        ]
    )


# Models of the README: suffix of the record, loop over the layers, plain residuals and mHC in it.
COSTS = (
    ("-train-step-768", "scan", "residual", "seams"),
    ("-train-step-1024", "scan", "residual", "seams"),
    ("-train-step", "scan", "residual", "seams"),
    ("-loop", "Python", "residual-loop", "mhc-streams-loop"),
)


def cost_section(results: Path) -> str:
    """Time and memory of a training step, by model; empty where a record is missing."""
    rows = []
    for suffix, loop, plain, mhc in COSTS:
        if (found := newest(results, suffix)) is None:
            return ""
        record = found[1]
        measured = {row["connection"]: row for row in record["rows"]}
        steps = measured[plain], measured[mhc]
        rows.append(
            [
                f"{record['parameters'] / 1e6:.0f} M, C = {record['model']['hidden']}",
                loop,
                *(f"{step['ms']:.1f}" for step in steps),
                f"{100 * (steps[1]['ms'] / steps[0]['ms'] - 1):+.1f} %",
                *(f"{step['memory']['peak_bytes'] / 1e9:.1f}" for step in steps),
            ]
        )
    headers = [
        f"a step, {record['gpu'].removeprefix('NVIDIA ')}", "loop", "plain, ms", "mHC, ms", "",
        "plain, GB", "mHC, GB",
    ]  # fmt: skip
    return table(rows, headers)


# ---- what else was measured in a training step --------------------------------------------------


def recompute_section(record: dict[str, Any], path: Path, docs: Path) -> str:
    return f"{machine(record, path, docs)}.\n\n{recompute.table(record['rows'])}"


def diagnostics_section(record: dict[str, Any], path: Path, docs: Path) -> str:
    return f"{machine(record, path, docs)}.\n\n{diagnostics_step.table(record['rows'])}"


# ---- several GPUs -------------------------------------------------------------------------------


def draw_mesh_scaling(record: dict[str, Any], path: Path) -> None:
    """Tokens a second, over those of one GPU: with its tokens on each, and on all together."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    counts = sorted({row["devices"] for row in record["rows"]})
    titles = "weak scaling: tokens of one GPU on each", "strong scaling: on all together"
    for panel, is_strong, title in zip(panels, (False, True), titles, strict=True):
        panel.plot(counts, counts, color="black", linewidth=1, linestyle=(0, (3, 2)))
        for (connection, color), marker in zip(
            {"residual": OTHER, "seams": FUSED}.items(), "so", strict=True
        ):
            of_one, *others = (r for r in record["rows"] if r["connection"] == connection)
            rows = [of_one, *(row for row in others if row["is_strong"] == is_strong)]
            panel.plot(
                [row["devices"] for row in rows],
                [row["tokens_per_s"] / of_one["tokens_per_s"] for row in rows],
                color=color, marker=marker, label=model.LABELS[connection],
            )  # fmt: skip
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("GPUs", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(counts, counts)
        panel.set_yticks(counts, counts)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens a second, over one GPU's", fontsize=9)
    panels[0].legend(frameon=False, fontsize=9)
    save(figure, path)


def mesh_scaling_section(record: dict[str, Any], path: Path, docs: Path) -> str:
    figure = "![Tokens a second by number of GPUs](images/mesh_scaling.svg)"
    sizes = f"C = {record['model']['hidden']}, {record['model']['layers']} layers"
    return f"{machine(record, path, docs)}; {sizes}.\n\n{figure}\n\n{mesh_step.table(record)}"


# ---- a training ---------------------------------------------------------------------------------


GLANCE = "residual", "hc", "mhc"
"""Connections of the panels of gain, gradient norm and loss over the whole training."""


def draw_training(record: dict[str, Any], path: Path) -> None:
    """Curves of connections: the mean of the seeds, and from the least to the largest.

    A curve is drawn where it can be told apart: losses beside the plain residual's, gains where
    they leave 1.
    """
    figure = Figure(figsize=(cells.WIDTH, 9.5), layout="constrained")
    panels = figure.subplots(3, 2)
    (mean, norm), (lead, late), (largest, near) = panels
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        runs.setdefault(run["connection"], []).append(run)

    def values(connection: str, *keys: str) -> Any:
        """The larger one of the keys, [seeds, points]."""
        points = [run["points"] for run in runs[connection]]
        return np.array([[max(p.get(key, np.nan) for key in keys) for p in own] for own in points])

    steps = values("residual", "step")[0]
    half = len(steps) // 2
    plain = zip(runs["residual"], values("residual", "validation_loss"), strict=True)
    of_plain = {run["seed"]: losses for run, losses in plain}
    still = {}
    for name, own in runs.items():
        label, color, width, dashes = training.report.STYLES[name]
        style = {"color": color, "lw": width, "ls": dashes}
        style["zorder"] = 3 if name == "residual" else 2

        def curve(panel: Any, ys: Any, first: int = 0, style: Any = style, **other: Any) -> None:
            xs, ys = steps[first:], ys[:, first:]
            panel.plot(xs, ys.mean(0), **style | other)
            if len(ys) > 1:
                panel.fill_between(xs, ys.min(0), ys.max(0), color=style["color"], alpha=0.25, lw=0)

        # From the same seed, so that what weights and batches make of the loss is taken out.
        pairs = zip(own, values(name, "validation_loss"), strict=True)
        leads = np.array([losses - of_plain[run["seed"]] for run, losses in pairs])
        seeds = f" ({len(own)} seed{'s' * (len(own) > 1)})"
        curve(late, leads, half, label=label + seeds)
        gains = values(name, "gain_forward", "gain_backward")
        if name in GLANCE:
            curve(mean, values(name, "mean_gain_forward", "mean_gain_backward"))
            curve(norm, values(name, "grad_norm"))
            curve(lead, leads)
            curve(largest, gains)
        if name != "residual" and gains.max() < 1.05:
            still[label] = gains.max()
        elif gains.max() < 10:
            curve(near, values(name, "mean_gain_backward"))
            curve(near, values(name, "gain_backward"), ls="--" if name != "residual" else dashes)
    mean.set(title="composite gain, mean of all tokens", yscale="log")
    norm.set(title="largest gradient norm since the last point", yscale="log")
    lead.set(title="validation loss beside plain residual's")
    largest.set(title="composite gain, largest of all tokens", yscale="log")
    near.set(title="gain backward: mean, and largest (dashed)", ylim=(0.5, None))
    if still:
        text = f"at most {max(still.values()):.3f}: {', '.join(still)}"
        near.annotate(text, (0.02, 0.06), xycoords="axes fraction", fontsize=8)
    late.set(title="the same, second half of the training")
    for panel in panels.flat:
        panel.title.set_fontsize(9)
        panel.set_xlabel("step", fontsize=9)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = late.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def training_section(record: dict[str, Any], path: Path, docs: Path) -> str:
    about, rows = published_section(record, path, docs).split("\n\n")
    figure = "![Loss, gradient norm and gain by connection](images/training.svg)"
    return "\n\n".join([about, figure, rows])


def published_section(record: dict[str, Any], path: Path, docs: Path) -> str:
    return (
        f"{machine(record, path, docs)}. {training.describe(record)}.\n\n{training.table(record)}"
    )


# ---- files --------------------------------------------------------------------------------------


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same file for the same record; letters as text, not as outlines, which are longer.
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, facecolor="white", metadata={"Date": None})
    print(f"Written to {path}.")


def wrapped(text: str) -> str:
    """The text with paragraphs wrapped as the pages are (`tool.rumdl` in pyproject.toml)."""
    return "\n\n".join(
        part if part.startswith(("|", "!"))
        else textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)
        for part in text.split("\n\n")
    )  # fmt: skip


def replace(page: Path, name: str, text: str) -> None:
    """Puts the text between the page's comments of that name."""
    before, start, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise SystemExit(f"plots.py: {page} has no section <!-- {name} --> ... <!-- /{name} -->")
    page.write_text(f"{before}{start}{wrapped(text)}\n{end}{after}")
    print(f"Written to {page}: {name}.")


def main(options: Options) -> None:
    performance, diagnostics = "performance.md", "diagnostics.md"
    parts: dict[str, tuple[str, str, Callable[..., None] | None, Callable[..., str]]] = {
        "kernels": (performance, "", draw_kernels, kernel_section),
        "configurations": (
            performance,
            "-configurations",
            draw_configurations,
            configurations_section,
        ),
        "train_step": (performance, "-train-step", draw_train_step, train_step_section),
        "recompute": (performance, "-recompute", None, recompute_section),
        "diagnostics": (diagnostics, "-diagnostics", None, diagnostics_section),
        "mesh_scaling": (
            "sharding.md",
            r"-mesh-scaling-\d+",
            draw_mesh_scaling,
            mesh_scaling_section,
        ),
        "training": ("results.md", "-training", draw_training, training_section),
        "training_published": ("results.md", "-training-published", None, published_section),
    }
    if found := newest(options.results, "-configurations"):
        options.faster.write_text(cells.faster_table(found[1]))
        print(f"Written to {options.faster}.")
    for name, (page, suffix, draw, section) in parts.items():
        found = newest(options.results, suffix)
        if found is None:
            print(f"No record <date>{suffix}.json in {options.results}.")
            continue
        path, record = found
        if draw is not None:
            draw(record, options.docs / "images" / f"{name}.svg")
        replace(options.docs / page, name, section(record, path, options.docs))
    if costs := cost_section(options.results):
        replace(options.readme, "cost", costs)
    else:
        print(f"No records of three sizes of model in {options.results}.")


if __name__ == "__main__":
    main(tyro.cli(Options))
