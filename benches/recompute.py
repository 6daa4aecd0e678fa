"""What a training step costs in time and memory when the backward pass computes things again.

Writes benches/results/<gpu>/<date>-recompute.json and .md. The model is that of train_step.py, with
12 layers and with 48; how time and memory are measured is told there. Compared are

- plain residuals and mHC (a scan of `mhc_residual`) with `jax.checkpoint` around each layer of the
  model, attention and MLP: the streams before a layer are kept, and all of it runs again,
- mHC in `mhc.stack` with keep_streams_every="auto": the streams before each stretch of
  sqrt(n L / (n + 2)) sublayers, as near as the scan allows, are kept, and no layer runs again; with
  policy="mhc" the layers' inputs and the coefficients are computed again, too.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import time
from pathlib import Path
from typing import Any

import common
import jax
import train_step
import tyro
from tabulate import tabulate
from train_step import TINY, Connection, Model, Steps

CONNECTIONS: tuple[Connection, ...] = (
    "residual", "residual-layers", "seams", "mhc-layers", "seams-auto", "seams-auto-mhc",
)  # fmt: skip


@dataclasses.dataclass
class Options:
    """What to run."""

    layers: tuple[int, ...] = (12, 48)
    """Layers of the models; 48 take about 120 GB, which an H100 has not."""
    steps: int = 20
    """Timed steps of each, in five rounds."""
    output: Path | None = None
    """Folder for the record, in <gpu>/; by default benches/results, and none if tiny."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    tiny: bool = False
    """Tiny models on the CPU that try every path; their times mean nothing."""

    def __post_init__(self) -> None:
        if self.tiny:
            self.layers, self.steps = (4, 8), 5
        elif self.output is None:
            self.output = Path("benches/results")


def rows_of(model: Model, steps: int) -> list[dict[str, Any]]:
    """Compiles and times the step of each connection; raises SystemExit if losses differ."""
    rows = train_step.run(Steps(model), train_step.Options(CONNECTIONS, steps, Path()))
    if complaints := train_step.wrong_losses(rows):
        raise SystemExit("Wrong losses.\n" + "\n".join(complaints))
    shapes = jax.eval_shape(
        functools.partial(train_step.init, model=model, streams=False), jax.random.key(0)
    )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return [{"layers": model.layers, "parameters": parameters, **row} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison; what is beyond the plain residual's is overhead."""
    cells = []
    for row in rows:
        first = next(r for r in rows if r["layers"] == row["layers"])
        peak, least = (r["memory"]["peak_bytes"] / 1e9 for r in (row, first))
        cells.append(
            [
                row["layers"], train_step.LABELS[row["connection"]],
                f"{row['ms']:.1f}", f"{row['spread_ms']:.1f}", f"{100 * row['overhead']:+.1f} %",
                f"{peak:.1f}", f"{peak - least:+.1f}",
                f"{train_step.kernels_ms(row, 'mhc_'):.1f}",
            ]
        )  # fmt: skip
    headers = [
        "layers", "connection", "ms a step", "spread", "overhead", "peak, GB", "beyond plain, GB",
        "mHC kernels, ms",
    ]  # fmt: skip
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def main(options: Options) -> None:
    if options.tiny:
        jax.config.update("jax_platforms", "cpu")
    if not (options.commit or common.commit()):
        raise SystemExit("recompute.py: expected a git repository, got none; give --commit")
    start = time.perf_counter()
    model = TINY if options.tiny else Model()
    rows: list[dict[str, Any]] = []
    for layers in options.layers:
        rows += rows_of(dataclasses.replace(model, layers=layers), options.steps)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or common.commit(),
        **common.versions(),
        "model": dataclasses.asdict(model),
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }
    sizes = ", ".join(
        f"{name} {value}" for name, value in record["model"].items() if name != "layers"
    )
    text = "\n".join(
        [
            f"# What is computed again, {record['gpu']}, {record['date']}",
            "",
            f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
            f"Python {record['python']}, commit {record['commit']} (library: "
            f"{record['library_commit']}). n = {common.STREAMS}, bfloat16, AdamW; {sizes}. Medians "
            f"of {len(rows[0]['round_ms'])} rounds of "
            f"{options.steps // len(rows[0]['round_ms'])} steps.",
            "",
            table(rows),
            "",
        ]
    )
    print(text)
    if options.output is not None:
        common.write(record, text, options.output / common.gpu_folder(record), "-recompute")


if __name__ == "__main__":
    main(tyro.cli(Options))
