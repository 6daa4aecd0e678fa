"""What diagnostics cost a training step.

Writes benches/results/<gpu>/<date>-diagnostics.json and .md. The model is that of train_step.py in
`mhc.stack`; compared with it are

- the same step that also returns the composite gain (forward and backward, the largest of 64 tokens
  at any depth), errors of rows and columns, distance to the identity and entropy: six numbers,
- the same step with `diagnostics.watch_gain`, which calls back where the gain leaves its band.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from pathlib import Path

import common
import jax
import train_step
import tyro
from tabulate import tabulate
from train_step import TINY, Connection, Model, Steps

CONNECTIONS: tuple[Connection, ...] = ("seams", "seams-told", "seams-watched")


@dataclasses.dataclass
class Options:
    """What to run."""

    steps: int = 100
    """Timed steps of each, in five rounds."""
    output: Path | None = None
    """Folder for the record, in <gpu>/; by default benches/results, and none if tiny."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    tiny: bool = False
    """A tiny model on the CPU that tries every path; its times mean nothing."""

    def __post_init__(self) -> None:
        if self.tiny:
            self.steps = 5
        elif self.output is None:
            self.output = Path("benches/results")


def main(options: Options) -> None:
    if options.tiny:
        jax.config.update("jax_platforms", "cpu")
    if not (options.commit or common.commit()):
        raise SystemExit("diagnostics_step.py: expected a git repository, got none; give --commit")
    start = time.perf_counter()
    model = TINY if options.tiny else Model()
    rows = train_step.run(Steps(model), train_step.Options(CONNECTIONS, options.steps, Path()))
    if complaints := train_step.wrong_losses(rows):
        raise SystemExit("Wrong losses.\n" + "\n".join(complaints))
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or common.commit(),
        **common.versions(),
        "model": dataclasses.asdict(model),
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }
    table = tabulate(
        [
            [
                train_step.LABELS[row["connection"]], f"{row['ms']:.2f}",
                f"{row['spread_ms']:.2f}", f"{100 * row['overhead']:+.2f} %",
                f"{train_step.kernels_ms(row, ''):.2f}",
            ]
            for row in rows
        ],
        ["step", "ms", "spread", "overhead", "all kernels, ms"],
        tablefmt="github",
        disable_numparse=True,
    )  # fmt: skip
    sizes = ", ".join(f"{name} {value}" for name, value in record["model"].items())
    rounds = len(rows[0]["round_ms"])
    text = "\n".join(
        [
            f"# Diagnostics in a training step, {record['gpu']}, {record['date']}",
            "",
            f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
            f"Python {record['python']}, commit {record['commit']} (library: "
            f"{record['library_commit']}). n = {common.STREAMS}, bfloat16, AdamW; {sizes}. Medians "
            f"of {rounds} rounds of {options.steps // rounds} steps.",
            "",
            table,
            "",
        ]
    )
    print(text)
    if options.output is not None:
        common.write(record, text, options.output / common.gpu_folder(record), "-diagnostics")


if __name__ == "__main__":
    main(tyro.cli(Options))
