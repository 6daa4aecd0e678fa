"""Trains with several residual connections, on several GPUs, and makes a record of it.

Runs examples/train_gpt.py for each connection and seed, one at a time on each GPU, and writes
benches/results/<gpu>/<date>-training.json and .md: the options, a table, and of each run what was
measured on held-out text. Runs have checkpoints: the same command goes on with what --minutes cut
off. Only runs that came to their end are in the record.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import tyro
from tabulate import tabulate

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

from gpt import report, text, training  # noqa: E402 - found by the line above
from gpt.settings import PRESETS, Connection, Settings  # noqa: E402 - so is this


@dataclasses.dataclass
class Options:
    """What to run."""

    connections: tuple[Connection, ...] = ("residual", "hc", "mhc")
    """Connections to train from every seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Their seeds."""
    others: tuple[Connection, ...] = ("lite", "static", "identity")
    """Connections to train from the first seed alone, after these."""
    gpus: int = 1
    """GPUs of the machine."""
    minutes: float = 600.0
    """Begin nothing after so many, and stop at the next checkpoint."""
    folder: Path = Path("results")
    """Folder for the checkpoints."""
    output: Path = Path("benches/results")
    """Folder for the record, in <gpu>/."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    tiny: bool = False
    """A tiny model on the CPU that tries every path; its figures mean nothing."""

    def arguments(self) -> list[str]:
        """Those of train_gpt.py that are the same for all runs."""
        tiny = "--depth 2 --width 32 --heads 2 --batch 4 --seq 32 --steps 20 --checkpoint-every 10"
        preset = tiny.split() if self.tiny else ["--preset", "h200"]
        return [*preset, "--resume", "--out", str(self.folder)]

    def training(self) -> Settings:
        preset = PRESETS["demo" if self.tiny else "h200"]
        return tyro.cli(Settings, args=self.arguments(), default=preset)


def train_all(options: Options, jobs: list[tuple[Connection, int]]) -> int:
    """Runs the jobs in their order, each on the GPU that is free first; how many failed."""
    deadline = time.monotonic() + 60 * options.minutes
    gpus: queue.SimpleQueue[int] = queue.SimpleQueue()
    for gpu in range(options.gpus):
        gpus.put(gpu)

    def run(job: tuple[Connection, int]) -> bool:
        gpu, failed = gpus.get(), False
        left = (deadline - time.monotonic()) / 60
        if left > 0:
            connection, seed = job
            command = [
                sys.executable, EXAMPLES / "train_gpt.py", *options.arguments(),
                "--minutes", left, "--connections", connection, "--seeds", seed,
            ]  # fmt: skip
            start = time.monotonic()
            done = subprocess.run(
                list(map(str, command)), capture_output=True, text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            )  # fmt: skip
            seconds = time.monotonic() - start
            print(f"{connection}, seed {seed}: {seconds:.0f} s on GPU {gpu}", flush=True)
            failed = done.returncode != 0
            if failed:
                print(done.stdout[-2000:] + done.stderr[-2000:], flush=True)
        gpus.put(gpu)
        return failed

    with ThreadPoolExecutor(options.gpus) as pool:
        return sum(pool.map(run, jobs))


def finished(options: Options, settings: Settings, jobs: list[tuple[Connection, int]]) -> Any:
    """The runs that came to their end."""
    for connection, seed in jobs:
        folder = options.folder / "checkpoints" / f"{connection}-{seed}"
        if not folder.exists():
            continue
        checkpoints = training.Checkpoints(folder)
        if checkpoints.step == settings.steps:
            yield {"connection": connection, "seed": seed, **checkpoints.load(settings)}
        checkpoints.close()


def describe(record: dict[str, Any]) -> str:
    """The configuration in a line."""
    s = record["settings"]
    return (
        f"{s['depth']} blocks ({2 * s['depth']} sublayers), width {s['width']}, "
        f"{s['heads']} heads, "
        f"{s['streams']} streams, {s['dtype']}; {s['steps']} steps of {s['batch']} × {s['seq']} "
        f"bytes, learning rate {s['learning_rate']:g}. "
        f"Text: {record['text']}"
    )


def table(record: dict[str, Any]) -> str:
    """A row for each connection: means over the seeds, ± half of their range."""
    kept = {
        "num_params": "parameters",
        "validation_loss": "validation loss",
        "beside_residual": "beside plain residual",
        "max_grad_norm": "largest gradient norm",
        "max_gain_forward": "largest gain forward",
        "max_gain_backward": "backward",
        "tokens_per_s": "tokens/s",
    }
    results = record["results"]
    of_residual = {
        r["seed"]: r["validation_loss"] for r in results if r["connection"] == "residual"
    }
    for result in results:
        # From the same seed; where that run is missing there is nothing to compare with.
        result["beside_residual"] = result["validation_loss"] - of_residual.get(
            result["seed"], math.nan
        )
    styles = ",.0f", ".4f", "+.4f", ".3g", ".4g", ".4g", ",.0f"
    rows = [
        [label, len([r for r in results if report.LABELS[r["connection"]] == label]), *cells]
        for label, cells in report.columns(results, list(zip(kept, styles, strict=True)))
    ]
    headers = ["connection", "seeds", *kept.values()]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(options: Options) -> None:
    commit = options.commit or common.commit()
    if not commit:
        raise SystemExit("training.py: expected a git repository, got none; give --commit")
    settings = options.training()
    jobs = [(connection, seed) for seed in options.seeds for connection in options.connections]
    jobs += [(connection, options.seeds[0]) for connection in options.others]
    num_failed = train_all(options, jobs)
    runs = list(finished(options, settings, jobs))
    missing = len(jobs) - len(runs)
    if not any(run["connection"] == "residual" for run in runs):
        raise SystemExit("training.py: no run with plain residuals came to its end; run it again")
    names = [{"connection": run["connection"], "seed": run["seed"]} for run in runs]
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        **common.versions(),
        # Without the paths of the text.
        "settings": {k: v for k, v in settings.of_a_run.items() if k != "text"},
        "text": text.load(settings)[2],
        "results": [
            name | training.summarize(run, settings) for name, run in zip(names, runs, strict=True)
        ],
        "runs": [
            name | {"points": report.points(run)} for name, run in zip(names, runs, strict=True)
        ],
    }
    page = "\n".join(
        [
            f"# Training with several residual connections, {record['gpu']}, {record['date']}",
            "",
            f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
            f"Python {record['python']}, commit {record['commit']} (library: "
            f"{record['library_commit']}). {describe(record)}. Means over the seeds, ± half of "
            "their range.",
            "",
            table(record),
            "",
        ]
    )
    print(page)
    if missing:
        print(f"{missing} of {len(jobs)} runs are not finished; the same command goes on.")
    common.write(record, page, options.output / common.gpu_folder(record), "-training")
    if num_failed:
        raise SystemExit(f"training.py: {num_failed} of {len(jobs)} runs failed; see above")


if __name__ == "__main__":
    main(tyro.cli(Options))
