"""The record of configurations.py as the heat map of docs/performance.md and the package's table.

plots.py uses it.
"""

from __future__ import annotations

import json
from typing import Any

from configurations import figures, ratio
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Inches of a figure: 8 points are 11 pixels where a page's text is 830 pixels wide.
WIDTH = 8.4

PANELS = {
    "fb": "a sublayer with its gradients: floor / fused",
    "stack": "four sublayers in a stack, with gradients: floor / fused",
}


def of_many_tokens(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows but those of few tokens, for which no bytes are the limit."""
    return [row for row in record["rows"] if row["tokens"] >= 1024]


def kind(row: dict[str, Any]) -> str:
    """Fields of a configuration, all but its width."""
    norm = ", norm" if row["norm"] else ""
    return f"n = {row['streams']}, {row['dtype']}, {row['constraint']}{norm}"


def plain_us(row: dict[str, Any]) -> float:
    """Time of a sublayer with its gradients in what implementation=None takes beside the kernels.

    That is `jax_mhc.reference`, timed where the fastest form, no slower, is near to the kernels.
    """
    return row.get("reference", row["plain"])["fb"]


def is_plain_faster(row: dict[str, Any]) -> bool:
    return plain_us(row) < row["fused"]["fb"]


def heat_map(record: dict[str, Any]) -> Figure:
    """A cell for each configuration; those in a frame are faster in plain JAX."""
    rows = of_many_tokens(record)
    widths = sorted({row["hidden"] for row in rows})
    found = [
        [(row, value) for row in rows if (value := ratio(row, "floor_us", "fused", what))]
        for what in PANELS
    ]
    kinds = [list(dict.fromkeys(kind(row) for row, _ in own)) for own in found]
    height = 1.6 + sum(0.4 + 0.22 * len(own) for own in kinds)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ratios = [len(own) for own in kinds]
    panels = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=ratios)
    for panel, title, own, names in zip(panels, PANELS.values(), found, kinds, strict=True):
        values = [[float("nan")] * len(widths) for _ in names]
        for row, value in own:
            x, y = widths.index(row["hidden"]), names.index(kind(row))
            values[y][x] = value
            color = "white" if value < 0.6 else "black"
            panel.text(x, y, figures(value), ha="center", va="center", fontsize=7, color=color)
            if is_plain_faster(row):
                frame = {"fill": False, "edgecolor": "#D55E00", "linewidth": 1.8}
                panel.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, **frame))
        # As an image, which is smaller than a path for each cell.
        image = panel.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set_xticks(range(len(widths)), widths, rotation=90, fontsize=8)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[-1].set_xlabel("C (in a frame: plain JAX is faster)")
    scale = {"location": "bottom", "shrink": 0.5, "aspect": 40, "pad": 0.01}
    figure.colorbar(image, ax=panels, label="1 is the speed of a copy", **scale)
    return figure


def faster_table(record: dict[str, Any]) -> str:
    """The package's table of what is faster, with a configuration a line."""
    names = "streams", "hidden", "dtype", "tokens", "constraint", "norm"
    rows = []
    for row in record["rows"]:
        times = {
            "fused_us": row["fused"]["fb"], "plain_us": plain_us(row),
            "stack_us": row["fused"].get("stack"),
        }  # fmt: skip
        rows.append(
            {name: row[name] for name in names}
            | {name: round(us, 1) for name, us in times.items() if us is not None}
        )
    head = {name: record[name] for name in ("gpu", "date", "commit")}
    head["copy_gb_per_s"] = round(record["copy_gb_per_s"])
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n'
