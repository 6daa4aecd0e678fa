"""The record of configurations.py as the heat map of docs/performance.md and the package's table.

plots.py uses it.
"""

from __future__ import annotations

import json
from typing import Any

from configurations import figures, ratio
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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
    # Heads are in no stack: each panel has the configurations that were measured in it.
    cells = {
        what: [row for row in rows if ratio(row, "floor_us", "fused", what) is not None]
        for what in PANELS
    }
    cells = {what: own for what, own in cells.items() if own}
    kinds = {what: list(dict.fromkeys(map(kind, own))) for what, own in cells.items()}
    heights = [len(own) for own in kinds.values()]
    figure = Figure(
        figsize=(3 + 0.42 * len(widths), 0.9 + 0.5 * len(cells) + 0.22 * sum(heights)),
        layout="constrained",
    )
    panels = figure.subplots(len(cells), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (what, own) in zip(panels, cells.items(), strict=True):
        values = [[float("nan")] * len(widths) for _ in kinds[what]]
        for row in own:
            value = ratio(row, "floor_us", "fused", what)
            x, y = widths.index(row["hidden"]), kinds[what].index(kind(row))
            values[y][x] = value
            color = "white" if value < 0.6 else "black"
            panel.text(x, y, figures(value), ha="center", va="center", fontsize=7, color=color)
            if is_plain_faster(row):
                frame = {"fill": False, "edgecolor": "#D55E00", "linewidth": 1.8}
                panel.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, **frame))
        # As an image, which is smaller than a path for each cell.
        image = panel.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        panel.set_title(PANELS[what], fontsize=10, loc="left")
        panel.set_yticks(range(len(kinds[what])), kinds[what], fontsize=8)
        panel.set_xticks(range(len(widths)), widths, rotation=90, fontsize=8)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    figure.colorbar(image, ax=panels, shrink=0.4, label="1 is the speed of a copy")
    figure.supxlabel("C (in a frame: plain JAX is faster)", fontsize=10)
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
