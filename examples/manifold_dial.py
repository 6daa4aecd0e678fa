"""Turns the number of Sinkhorn iterations up from 0 and shows what the composite mapping does.

    python examples/manifold_dial.py                 # writes manifold_dial.csv and .png to demo/

Many sublayers, each with an H_res from standard normal logits z: H_res = z for 0 iterations, which
is unconstrained hyper-connections, else Sinkhorn-Knopp of exp(z) (equation 9). No model, no data:
only the product of the mappings, and its Amax gain, forward and backward.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jax_mhc as mhc
from jax_mhc import diagnostics


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line."""

    depth: int = 200
    """Sublayers."""
    iterations: tuple[int, ...] = (0, 1, 2, 5, 20)
    """Numbers of Sinkhorn iterations."""
    streams: int = 4
    samples: int = 1000
    """Products; figures are medians of them."""
    scale: float = 1.0
    """Standard deviation of the logits."""
    seed: int = 0
    out: Path = Path("demo")
    """Folder for the table and the picture."""


def simulate(options: Options, iterations: int) -> diagnostics.Gain:
    """Gains of the composite mappings of the first 1, 2, ... sublayers, `[depth]`."""
    n = options.streams
    shape = (options.depth, options.samples, n, n)
    # In double precision: a product of 200 unconstrained mappings has some 48 digits.
    z = options.scale * jax.random.normal(jax.random.key(options.seed), shape, jnp.float64)
    h_res = z
    if iterations:
        h_res = mhc.sinkhorn(
            z, config=mhc.MHCConfig(sinkhorn_iters=iterations), implementation="reference"
        )
    gain = diagnostics.amax_gain(diagnostics.composite(h_res))
    return diagnostics.Gain(*(jnp.median(values, -1) for values in gain))


def draw(gains: dict[int, Any], path: Path) -> None:
    """Gain against depth: of all, and below of those on the manifold alone, which it hides."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, lowest in zip(panels, (0, 1), strict=True):
        for panel, name in zip(row, diagnostics.Gain._fields, strict=True):
            for color, (iterations, gain) in enumerate(gains.items()):
                values = getattr(gain, name)
                if iterations >= lowest:
                    depths = range(1, len(values) + 1)
                    panel.plot(depths, values, f"C{color}", label=f"k = {iterations}")
            panel.grid(alpha=0.3)
            panel.set_title(f"Composite gain, {name}{', on the manifold' * lowest}")
        row[0].set_ylabel("median Amax gain")
    panels[0, 0].set_yscale("log")
    panels[0, 1].legend(title="Sinkhorn iterations")
    for panel in panels[1]:
        panel.set_xlabel("sublayers")
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    if options.depth < 1 or options.samples < 1 or min(options.iterations, default=0) < 0:
        raise SystemExit(
            "manifold_dial.py: expected depth and samples of at least 1 and iterations of at "
            f"least 0, got {options.depth}, {options.samples} and {options.iterations}"
        )
    jax.config.update("jax_enable_x64", True)
    gains = {k: jax.device_get(simulate(options, k)) for k in options.iterations}
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "manifold_dial.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sinkhorn_iterations", "sublayers", *diagnostics.Gain._fields])
        for k, gain in gains.items():
            rows.writerows([k, at, *values] for at, values in enumerate(zip(*gain, strict=True), 1))
    draw(gains, options.out / "manifold_dial.png")

    depths = sorted({depth for depth in (1, 8, 64, options.depth) if depth <= options.depth})
    table = Table(title="Median Amax gain of the composite mapping, forward / backward")
    table.add_column("sublayers")
    for k in gains:
        table.add_column(f"k = {k}", justify="right")
    for depth in depths:
        at = depth - 1
        cells = [f"{gain.forward[at]:.3g} / {gain.backward[at]:.3g}" for gain in gains.values()]
        table.add_row(str(depth), *cells)
    Console().print(table)
    print(f"Wrote manifold_dial.csv and manifold_dial.png to {options.out}.")


if __name__ == "__main__":
    main(tyro.cli(Options))
