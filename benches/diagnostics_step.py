"""Costs of diagnostics in a training step.

Writes benches/results/<gpu>/<date>-diagnostics.json and .md. The model is that of model.py in
`mhc.stack`; compared with it are

- the same step that also returns the composite gain (forward and backward, the largest of 64 tokens
  at any depth), errors of rows and columns, distance to the identity and entropy: six numbers,
- the same step with `diagnostics.watch_gain`, which calls back where the gain leaves its band.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import train_step
import tyro
from model import LABELS, Connection
from train_step import github, kernels_ms


@dataclasses.dataclass
class Options(train_step.Options):
    """Options of the command line."""

    connections: tuple[Connection, ...] = ("seams", "seams-told", "seams-watched")
    """Residual connections, the first the one that the others are compared with."""
    steps: int = 100
    """Timed steps of each, in five rounds."""


def table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            LABELS[row["connection"]], f"{row['ms']:.2f}", f"{row['spread_ms']:.2f}",
            f"{100 * row['overhead']:+.2f} %", f"{kernels_ms(row, ''):.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    return github(cells, ["step", "ms", "spread", "overhead", "all kernels, ms"])


if __name__ == "__main__":
    options = tyro.cli(Options)
    train_step.record(options, "diagnostics", "Diagnostics in a training step", table)
