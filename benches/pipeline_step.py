"""Times a step of examples/pipeline.py on two GPUs, with and without overlap.

    python benches/pipeline_step.py      # --tiny tries it on two simulated devices

Of the transfers between stages it tells how long they took, as the profiler saw them in one step;
by how much the step is longer than one that sends nothing and so computes something else, which is
what of them is not hidden; and how many have computation between their start and their end in the
program.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
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

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import pipeline  # noqa: E402

LARGE = pipeline.Settings(
    layers=12, hidden=2048, heads=16, mlp=5632, length=2048, micro_batch=2, micro_batches=12,
    attention="cudnn", steps=12,
)  # fmt: skip


@dataclasses.dataclass
class Options:
    """What to run."""

    output: Path | None = None
    """Folder for the records; by default benches/results, and none if tiny."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    attention: Literal["cudnn", "xla"] = "cudnn"
    """XLA's keeps the weights of all pairs of tokens for the backward pass."""
    tiny: bool = False
    """A tiny model on two simulated devices of the CPU; its times mean nothing."""


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


def compile_step(s: Any, sends: bool) -> tuple[Any, Any, Any]:
    """The compiled loss with its gradients, and operands."""
    mesh = pipeline.make_mesh(s)
    shapes = jax.eval_shape(functools.partial(pipeline.init, s=s), jax.random.key(0))
    placed = jax.tree.map(lambda p: jax.sharding.NamedSharding(mesh, p), pipeline.specs(shapes))
    params = jax.jit(functools.partial(pipeline.init, s=s), out_shardings=placed)(jax.random.key(0))
    tokens = pipeline.load_batches(s)[0]
    send_on = pipeline.send_on
    if not sends:
        pipeline.send_on = lambda x, s: x
    both = pipeline.value_and_gradients(s, mesh, shapes)
    program = jax.jit(both).lower(params, tokens).compile()
    pipeline.send_on = send_on
    return program, params, tokens


def median_ms(s: Any, program: Any, params: Any, tokens: Any) -> tuple[float, float]:
    """Of a step, and the loss."""
    times = []
    for _ in range(s.steps):
        start = time.perf_counter()
        value, _ = jax.block_until_ready(program(params, tokens))
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:]), float(value)


def measure(s: Any) -> dict[str, Any]:
    program, params, tokens = compile_step(s, sends=True)
    ms, loss = median_ms(s, program, params, tokens)
    without, _ = median_ms(s, *compile_step(s, sends=False))
    events = common.profiled(lambda: program(params, tokens))
    sent = [e for e in events if e.is_kernel and "SendRecv" in e.name]
    num, num_overlapped = in_flight(program.as_text())
    return {
        "connection": s.connection, "overlap": s.overlap, "ms": ms, "without_ms": without,
        "loss": loss, "boundary_bytes": s.boundary_bytes,
        "sent_ms": sum(e.us for e in sent) / s.stages / 1e3,
        "transfers": num, "overlapped": num_overlapped,
        "calls": program.as_text().count('custom_call_target="jax_mhc_'),
        "memory": common.memory(program),
    }  # fmt: skip


def markdown(record: dict[str, Any]) -> str:
    table = [
        [
            row["connection"], "yes" if row["overlap"] else "no", f"{row['ms']:.1f}",
            f"{row['boundary_bytes'] / 1e6:.0f}", f"{row['sent_ms']:.1f}",
            f"{row['ms'] - row['without_ms']:.1f}", f"{row['overlapped']} of {row['transfers']}",
            f"{row['memory']['peak_bytes'] / 1e9:.1f}", f"{row['loss']:.4f}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    headers = [
        "connection", "overlap", "ms", "MB over the boundary, each way", "transfers, ms",
        "not hidden, ms", "with work between start and done", "peak, GB", "loss",
    ]  # fmt: skip
    model = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    return "\n".join([
        f"# Pipeline of two stages, {record['gpu']}, {record['date']}", "",
        f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
        f"commit {record['commit']} (library: {record['library_commit']}). Loss and gradients, no "
        f"optimiser. {model}.", "",
        tabulate(table, headers, tablefmt="github", disable_numparse=True), "",
    ])  # fmt: skip


def main(options: Options) -> None:
    if options.tiny:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
    elif options.output is None:
        options.output = Path("benches/results")
    settings = (
        pipeline.Settings(steps=4, length=16)
        if options.tiny
        else dataclasses.replace(LARGE, attention=options.attention)
    )
    rows = []
    for connection in ("residual", "mhc"):
        for overlap in (False, True):
            row = measure(dataclasses.replace(settings, connection=connection, overlap=overlap))
            print(row, flush=True)
            rows.append(row)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or common.commit(),
        **common.versions(),
        "settings": dataclasses.asdict(settings),
        "rows": rows,
    }
    text = markdown(record)
    print(text)
    if options.output is not None:
        common.write(record, text, options.output / common.gpu_folder(record), "-pipeline-step")


if __name__ == "__main__":
    main(tyro.cli(Options))
