"""Times a step of examples/pipeline.py on several GPUs, with and without overlap.

    python -m benches pipeline_step --stages 4 8     # --tiny tries it on simulated devices

Of the transfers between stages it tells how long they took, as the profiler saw them in one step;
for how much of that a GPU did nothing else; and how many have computation between their start and
their end in the program. NCCL's own variables, as NCCL_P2P_DISABLE=1 for a slower link, go into the
record.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import common
import jax
import tyro
from tabulate import tabulate

# The example itself is timed, which is a script in a folder of its own and in no package.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
import pipeline  # noqa: E402 - after its folder is known

LARGE = pipeline.Settings(
    hidden=2048, heads=16, mlp=5632, length=2048, micro_batch=2, micro_batches=24,
    attention="cudnn", steps=12,
)  # fmt: skip


# Settings that a row has, and one that loss and gradients do not depend on.
VARIED = (
    "stages", "chunks", "connection", "overlap", "layers", "micro_batches", "learning_rate",
)  # fmt: skip


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    output: Path | None = None
    """Folder for the records; by default benches/results, and none if tiny."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    stages: tuple[int, ...] = (2,)
    """GPUs of each pipeline. A stage has two blocks, or as many as chunks."""
    chunks: tuple[int, ...] = (1, 2)
    """Chunks of a stage's blocks; with more than one the stages interleave."""
    connections: tuple[Literal["residual", "mhc"], ...] = ("residual", "mhc")
    name: str = "pipeline-step"
    """Of the record, after the date."""
    tiny: bool = False
    """A tiny model on simulated devices of the CPU; its times mean nothing."""

    def settings(self) -> list[pipeline.Settings]:
        """Settings of every row, before its connection."""
        base = pipeline.Settings(steps=4, length=16) if self.tiny else LARGE
        return [
            dataclasses.replace(
                base, stages=stages, chunks=chunks, overlap=overlap,
                # Whole groups of those that go round together.
                micro_batches=math.ceil(base.micro_batches / (2 * stages)) * 2 * stages,
                layers=stages * max(2, chunks),
            )
            for stages in self.stages
            for chunks in self.chunks
            for overlap in (False, True)
        ]  # fmt: skip


def in_flight(text: str) -> tuple[int, int]:
    """Transfers in a compiled program, and those with a loop or one of our kernels meanwhile."""
    num, num_overlapped = 0, 0
    for computation in re.split(r"\n(?=(?:ENTRY )?%\S+ \()", text):
        lines, starts = computation.splitlines(), {}
        for at, line in enumerate(lines):
            if found := re.search(r"(%\S+) = .* collective-permute-start\(", line):
                starts[found[1]] = at
            elif found := re.search(r"collective-permute-done\((%[^),]+)", line):
                between = lines[starts[found[1]] + 1 : at]
                num += 1
                num_overlapped += any(" while(" in b or "jax_mhc_" in b for b in between)
    return num, num_overlapped


def compile_step(s: Any) -> tuple[Any, Any, Any]:
    """The compiled loss with its gradients, and operands."""
    mesh = pipeline.make_mesh(s)
    shapes = jax.eval_shape(functools.partial(pipeline.init, s=s), jax.random.key(0))
    placed = jax.tree.map(lambda p: jax.sharding.NamedSharding(mesh, p), pipeline.specs(shapes))
    params = jax.jit(functools.partial(pipeline.init, s=s), out_shardings=placed)(jax.random.key(0))
    tokens = pipeline.load_batches(s)[0]
    both = pipeline.value_and_gradients(s, mesh, shapes)
    return jax.jit(both).lower(params, tokens).compile(), params, tokens


def busy_ms(events: list[common.Event]) -> float:
    """Time in which any of the kernels ran, of all GPUs together."""
    total, end = 0.0, ("", 0.0)
    for event in sorted(events, key=lambda e: (e.plane, e.start_us)):
        last = max(end, (event.plane, event.start_us))
        end = max(end, (event.plane, event.start_us + event.us))
        total += end[1] - last[1]
    return total / 1e3


def median_ms(s: Any, program: Any, params: Any, tokens: Any) -> tuple[float, float]:
    """Of a step, and the loss."""
    times = []
    for _ in range(s.steps):
        start = time.perf_counter()
        value, _ = jax.block_until_ready(program(params, tokens))
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:]), float(value)


def measure(s: Any) -> dict[str, Any]:
    program, params, tokens = compile_step(s)
    ms, loss = median_ms(s, program, params, tokens)
    kernels = [e for e in common.profiled(lambda: program(params, tokens)) if e.is_kernel]
    sent = [e for e in kernels if "SendRecv" in e.name]
    others = [e for e in kernels if "SendRecv" not in e.name]
    num, num_overlapped = in_flight(program.as_text())
    return {
        "stages": s.stages, "chunks": s.chunks, "connection": s.connection, "overlap": s.overlap,
        "layers": s.layers, "micro_batches": s.micro_batches, "ms": ms, "loss": loss,
        "ticks": s.ticks, "boundary_bytes": s.boundary_bytes,
        "sent_ms": busy_ms(sent) / s.stages,
        "alone_ms": (busy_ms(kernels) - busy_ms(others)) / s.stages,
        "transfers": num, "overlapped": num_overlapped,
        "calls": program.as_text().count('custom_call_target="jax_mhc_'),
        "memory": common.memory(program),
    }  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    table = [
        [
            row["stages"], row["chunks"], row["connection"], "yes" if row["overlap"] else "no",
            f"{row['ticks']} of 1/{row['chunks']}",
            f"{100 - 100 * row['micro_batches'] * row['chunks'] / row['ticks']:.0f} %",
            f"{row['ms']:.1f}",
            f"{row['boundary_bytes'] / 1e6:.0f}", f"{row['sent_ms']:.1f}",
            f"{row['alone_ms']:.1f}", f"{row['overlapped']} of {row['transfers']}",
            f"{row['memory']['peak_bytes'] / 1e9:.1f}", f"{row['loss']:.4f}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    headers = [
        "stages", "chunks", "connection", "overlap", "ticks", "of these at the ends", "ms",
        "MB over the boundary, each way", "transfers, ms",
        "of that alone, ms", "with work between start and done", "peak, GB", "loss",
    ]  # fmt: skip
    model = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    nccl = "".join(f" {name}={value}." for name, value in record["nccl"].items())
    return "\n".join([
        f"# Pipeline, {record['gpu']}, {record['date']}", "",
        f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
        f"commit {record['commit']} (library: {record['library_commit']}).{nccl} Loss and "
        f"gradients, no optimiser. {model}.", "",
        "Transfers are times of NCCL's kernels, a GPU, which also wait for the other GPU; alone is "
        "when a GPU ran no other kernel.", "",
        tabulate(table, headers, tablefmt="github", disable_numparse=True), "",
    ])  # fmt: skip


def main(options: Options) -> None:
    if options.tiny:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(options.stages))
    elif options.output is None:
        options.output = Path("benches/results")
    if jax.device_count() < max(options.stages):
        raise SystemExit(
            f"pipeline_step.py: stages: expected at most {jax.device_count()}, a GPU for each, got "
            f"{max(options.stages)}; --tiny simulates them"
        )
    rows = []
    for settings in options.settings():
        for connection in options.connections:
            row = measure(dataclasses.replace(settings, connection=connection))
            print(row, flush=True)
            rows.append(row)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or common.commit(),
        **common.versions(),
        "nccl": {name: os.environ[name] for name in os.environ if name.startswith("NCCL_")},
        "settings": {
            name: value
            for name, value in dataclasses.asdict(settings).items()
            if name not in VARIED
        },
        "rows": rows,
    }
    text = markdown(record)
    print(text)
    if options.output is not None:
        common.write(record, text, options.output / common.gpu_folder(record), f"-{options.name}")


if __name__ == "__main__":
    main(tyro.cli(Options))
