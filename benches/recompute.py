"""Costs of a training step in time and memory when the backward pass computes things again.

Writes benches/results/<gpu>/<date>-recompute.json and .md. The model is that of model.py, with 12
layers and with 48; how time and memory are measured is told in train_step.py. Compared are

- plain residuals and mHC (a scan of `mhc_residual`) with `jax.checkpoint` around each layer of the
  model, attention and MLP: the streams before a layer are kept, and all of it runs again,
- mHC in `mhc.stack` with Recompute(every="auto"): the streams before each stretch of
  sqrt(n L / (n + 2)) sublayers, as near as the scan allows, are kept, and no layer runs again; with
  policy="mhc" the layers' inputs and the coefficients are computed again, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import train_step
import tyro
from model import LABELS, TINY, Connection, Model
from train_step import github, kernels_ms


@dataclasses.dataclass
class Options(train_step.Options):
    """Options of the command line."""

    connections: tuple[Connection, ...] = (
        "residual", "residual-layers", "seams", "mhc-layers", "seams-auto", "seams-auto-mhc",
    )  # fmt: skip
    """Residual connections, the first the one that the others are compared with."""
    layers: tuple[int, ...] = (12, 48)
    """Layers of the models; 48 take up to 105 GB, which an H100 has not."""

    def models(self) -> list[Model]:
        if self.tiny:
            return [dataclasses.replace(TINY, layers=layers) for layers in (4, 8)]
        return [Model(layers=layers) for layers in self.layers]


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison; what is beyond the plain residual's is overhead."""
    cells = []
    for row in rows:
        first = next(r for r in rows if r["layers"] == row["layers"])
        peak, least = (r["memory"]["peak_bytes"] / 1e9 for r in (row, first))
        cells.append(
            [
                row["layers"], LABELS[row["connection"]], f"{row['ms']:.1f}",
                f"{row['spread_ms']:.1f}", f"{100 * row['overhead']:+.1f} %", f"{peak:.1f}",
                f"{peak - least:+.1f}", f"{kernels_ms(row, 'mhc_'):.1f}",
            ]
        )  # fmt: skip
    headers = [
        "layers", "connection", "ms a step", "spread", "overhead", "peak, GB", "beyond plain, GB",
        "mHC kernels, ms",
    ]  # fmt: skip
    return github(cells, headers)


if __name__ == "__main__":
    train_step.record(tyro.cli(Options), "recompute", "What is computed again", table)
