"""Trains with several residual connections, on several GPUs, and makes a record of it.

Runs examples/train_gpt.py for each connection and seed, one at a time on each GPU, and writes
benches/results/<gpu>/<date>-training.json and .md: the options, a table, and of each run what was
measured on held-out text. Runs have checkpoints: the same command goes on with what --minutes cut
off. Only runs that came to their end are in the record. Where a machine does not last for all of
them, --finished takes the records of those before.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
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

from gpt import checkpoints, report, text, training  # noqa: E402 - in the folder that the line above adds
from gpt.settings import PRESETS, Connection, Settings  # noqa: E402 - likewise


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    connections: tuple[Connection, ...] = ("residual", "hc", "mhc")
    """Connections to train from every seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Their seeds."""
    others: tuple[Connection, ...] = ("lite", "static", "identity", "published")
    """Connections to train from the first seed alone, after these."""
    gpus: int = 1
    """GPUs of the machine."""
    minutes: float = 600.0
    """Begin nothing after so many, and stop at the next checkpoint."""
    folder: Path = Path("results")
    """Folder for the checkpoints."""
    finished: tuple[Path, ...] = ()
    """Records of this benchmark: what is in one of them is taken from there, not run again."""
    sinkhorn_iters: int = 20
    """Iterations of mhc and static; other than 20 are in the record's name."""
    name: str = ""
    """A word in the record's name, for runs beside the whole comparison."""
    output: Path = Path("benches/results")
    """Folder for the record, in <gpu>/."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    tiny: bool = False
    """A tiny model on the CPU that tries every path; its figures mean nothing."""

    def arguments(self) -> list[str]:
        """Arguments of train_gpt.py that are the same for all runs."""
        tiny = "--depth 2 --width 32 --heads 2 --batch 4 --seq 32 --steps 20 --checkpoint-every 10"
        preset = tiny.split() if self.tiny else ["--preset", "h200"]
        iters = "--sinkhorn-iters", str(self.sinkhorn_iters)
        return [*preset, *iters, "--resume", "--out", str(self.folder)]

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


def record_of(jobs: list[tuple[Connection, int]], options: Options, commit: str) -> dict[str, Any]:
    """Measurements of the jobs that came to their end here."""
    settings = options.training()
    results, runs = [], []
    for connection, seed in jobs:
        folder = options.folder / "checkpoints" / f"{connection}-{seed}"
        if not folder.exists():
            continue
        found = checkpoints.Checkpoints(folder)
        if found.step == settings.steps:
            told, names = found.load(settings), {"connection": connection, "seed": seed}
            results.append(names | training.summarize(told, settings))
            runs.append(names | {"points": report.points(told)})
        found.close()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        **common.versions(),
        # Without the paths of the text.
        "settings": {k: v for k, v in settings.of_a_run.items() if k != "text"},
        "text": text.load(settings)[2],
        "results": results,
        "runs": runs,
    }


def merge(records: list[dict[str, Any]], jobs: list[tuple[Connection, int]]) -> dict[str, Any]:
    """One record of the jobs, each from the first that has it.

    Raises:
        SystemExit: the records are of different programs, machines, settings or texts.
    """
    first = records[0]
    own = "date", "results", "runs"
    for other in records[1:]:
        for key in sorted((first.keys() | other.keys()) - set(own)):
            if first.get(key) != other.get(key):
                raise SystemExit(
                    f"training.py: --finished: expected records that agree in {key}, got "
                    f"{first.get(key)} and {other.get(key)}"
                )
    found: dict[Any, Any] = {}
    for record in records:
        for result, run in zip(record["results"], record["runs"], strict=True):
            found.setdefault((result["connection"], result["seed"]), (result, run))
    pairs = [found[job] for job in jobs if job in found]
    return first | {
        "date": max(record["date"] for record in records),
        "results": [result for result, _ in pairs],
        "runs": [run for _, run in pairs],
    }


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
    columns = {
        "num_params": ("parameters", ",.0f"),
        "validation_loss": ("validation loss", ".4f"),
        "beside_residual": ("beside plain residual", "+.4f"),
        "max_grad_norm": ("largest gradient norm", ".3g"),
        "max_gain_forward": ("largest gain forward", ".4g"),
        "max_gain_backward": ("backward", ".4g"),
        "max_mean_gain_forward": ("mean of tokens forward", ".4g"),
        "max_mean_gain_backward": ("backward", ".4g"),
        "tokens_per_s": ("tokens/s", ",.0f"),
    }
    of_residual = {
        r["seed"]: r["validation_loss"] for r in record["results"] if r["connection"] == "residual"
    }
    # From the same seed; where that run is missing there is nothing to compare with.
    results = [
        r | {"beside_residual": r["validation_loss"] - of_residual.get(r["seed"], math.nan)}
        for r in record["results"]
    ]
    # The first records have no means over tokens.
    columns = {key: told for key, told in columns.items() if all(key in r for r in results)}
    what = [(key, style) for key, (_, style) in columns.items()]
    rows = [
        [label, len([r for r in results if report.LABELS[r["connection"]] == label]), *cells]
        for label, cells in report.columns(results, what)
    ]
    headers = ["connection", "seeds", *(header for header, _ in columns.values())]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def page(record: dict[str, Any]) -> str:
    return "\n".join(
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


def main(options: Options) -> None:
    jobs = [(connection, seed) for seed in options.seeds for connection in options.connections]
    jobs += [(connection, options.seeds[0]) for connection in options.others]
    records = [json.loads(path.read_text()) for path in options.finished]
    known = {(r["connection"], r["seed"]) for record in records for r in record["results"]}
    num_failed = 0
    if new := [job for job in jobs if job not in known]:
        commit = options.commit or common.commit()
        if not commit:
            raise SystemExit("training.py: expected a git repository, got none; give --commit")
        num_failed = train_all(options, new)
        # As it is read from a file.
        records.append(json.loads(json.dumps(record_of(new, options, commit))))
    record = merge(records, jobs)
    missing = len(jobs) - len(record["runs"])
    if not any(run["connection"] == "residual" for run in record["runs"]):
        raise SystemExit("training.py: no run with plain residuals came to its end; run it again")
    text_page = page(record)
    print(text_page)
    if missing:
        print(f"{missing} of {len(jobs)} runs are not finished; the same command goes on.")
    iters = options.sinkhorn_iters
    words = ["", "training", *([] if iters == 20 else [f"{iters}-iterations"])]
    suffix = "-".join([*words, *filter(None, [options.name])])
    common.write(record, text_page, options.output / common.gpu_folder(record), suffix)
    if num_failed:
        raise SystemExit(f"training.py: {num_failed} of {len(jobs)} runs failed; see above")


if __name__ == "__main__":
    main(tyro.cli(Options))
