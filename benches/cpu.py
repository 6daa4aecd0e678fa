"""Times the fused CPU kernels beside plain JAX, after checking both against float64.

`make bench` runs this and writes benches/results/cpu/<date>.json and .md. One process, two ways:

- fused: the custom calls of jax_mhc; plain JAX: jax.jit of jax_mhc.reference on the same inputs.
- forward: pre and post. gradients: the same and the gradients of x, y, phi, alpha and bias, with
  cotangents on both results. A barrier stands where the layer would, so that XLA does not fuse
  across it.
- Floor: the bytes that must move (docs/performance.md) at the bandwidth of a copy by all cores,
  measured in the same run.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import STREAMS, median_us
from rich.progress import Progress
from tabulate import tabulate

import jax_mhc as mhc
from jax_mhc import info
from jax_mhc._measure import times, traffic

SHAPES = ((2048, 1024), (512, 4096))
DTYPES = ("float32", "bfloat16")
IMPLEMENTATIONS = {"fused": common.FUSED, "reference": mhc.reference}
PASSES = {"forward": common.forward, "gradients": common.gradients}
# Streams of C elements that each pass must read or write.
_FORWARD, _BACKWARD = traffic.of_stack(STREAMS, 1)
STREAMS_MOVED = {"forward": _FORWARD, "gradients": _FORWARD + _BACKWARD}


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    repeats: int = 41
    """Timed runs of each program; the median is reported."""
    output: Path = Path("benches/results/cpu")
    """Folder for the records."""


def errors(results: Any, exact: Any) -> float:
    """Largest relative L2 error of any array."""
    return max(jax.tree.leaves(jax.tree.map(common.relative_error, results, exact)))


def bench_shape(tokens: int, hidden: int, dtype: str, repeats: int) -> list[dict[str, Any]]:
    args = common.inputs(jax.random.key(0), tokens, hidden, dtype)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), args)
        program = jax.jit(functools.partial(common.gradients, mhc.reference))
        exact = jax.tree.map(np.asarray, program(*wide))
    exact = {"forward": exact["results"], "gradients": exact}
    rows = []
    for name, num_streams in STREAMS_MOVED.items():
        num_bytes = num_streams * tokens * hidden * jnp.dtype(dtype).itemsize
        row: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "dtype": dtype, "pass": name}
        operands = args[:3] if name == "forward" else args
        compiled = {}

        # The kernels may overwrite d_x_new, as they do inside a model.
        donated = () if name == "forward" else (4,)

        def copied(operands: Any = operands, donated: Any = donated) -> Any:
            copies = [jnp.copy(a) if i in donated else a for i, a in enumerate(operands)]
            return jax.block_until_ready(copies)

        for implementation, ops in IMPLEMENTATIONS.items():
            program = jax.jit(functools.partial(PASSES[name], ops), donate_argnums=donated)
            program = program.lower(*operands).compile()
            calls = program.as_text().count("jax_mhc_")
            if (calls > 0) != (implementation == "fused"):
                raise SystemExit(f"{implementation}: {calls} custom calls in the program")
            row[f"{implementation}_error"] = errors(program(*copied()), exact[name])
            compiled[implementation] = program
        if row["fused_error"] > 1.5 * row["reference_error"]:
            raise SystemExit(f"the fused result is wrong: {row}")
        for implementation, program in compiled.items():

            def run(operands: Any, program: Any = program) -> None:
                jax.block_until_ready(program(*operands))

            row[f"{implementation}_us"] = median_us(run, repeats, copied)
        bytes_per_us = times.cpu_copied_bytes_per_us(num_bytes, repeats)
        row["copy_us"] = num_bytes / bytes_per_us
        row["copy_gb_per_s"] = bytes_per_us / 1e3
        row["speedup"] = row["reference_us"] / row["fused_us"]
        row["over_copy"] = row["fused_us"] / row["copy_us"]
        rows.append(row)
    return rows


def call_overhead_us() -> dict[str, float]:
    """Time of a jitted call on one token, beside x + 1."""
    x = jnp.ones((1, STREAMS, 8), jnp.float32)
    y = jnp.ones((1, 8), jnp.float32)
    params = mhc.init_params(jax.random.key(0), streams=STREAMS, hidden=8)
    _, ctx = mhc.pre(x, params, implementation="fused")
    calls = {
        "x + 1": (jax.jit(lambda x: x + 1), (x,)),
        "post": (jax.jit(lambda y, ctx: mhc.post(y, ctx, implementation="fused")), (y, ctx)),
        "pre": (jax.jit(lambda x, p: mhc.pre(x, p, implementation="fused")[0]), (x, params)),
    }

    def many(function, args):
        for _ in range(1000):
            result = function(*args)
        jax.block_until_ready(result)

    return {
        name: median_us(functools.partial(many, *call), 7) / 1000 for name, call in calls.items()
    }


def import_ms() -> float:
    """Median time of `import jax_mhc` after `import jax`, each in a fresh process."""
    code = (
        "import time, jax; start = time.perf_counter(); import jax_mhc; "
        "print((time.perf_counter() - start) * 1e3)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(7)
    ]
    return statistics.median(runs)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def markdown(record: dict[str, Any]) -> str:
    def number(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 1e3:.1f}"

    table = [
        [
            f"{row['tokens']} × {row['hidden']}",
            row["dtype"],
            row["pass"],
            number(row, "reference_us"),
            number(row, "fused_us"),
            f"{row['speedup']:.1f}",
            number(row, "copy_us"),
            f"{row['over_copy']:.2f}",
            f"{row['fused_error']:.1e}",
            f"{row['reference_error']:.1e}",
        ]
        for row in record["rows"]
    ]
    headers = [
        "T × C", "dtype", "pass", "plain JAX, ms", "fused, ms", "faster by", "copy, ms",
        "fused / copy", "fused error", "plain JAX error",
    ]  # fmt: skip
    overhead = ", ".join(f"{name} {us:.1f} µs" for name, us in record["call_us"].items())
    machine = record["machine"]
    return "\n".join(
        [
            f"# CPU, {record['date']}",
            "",
            f"{machine['processor']}, {machine['cores']} cores, {machine['instruction_set']}; "
            f"jax {record['jax']}, Python {record['python']}, commit {record['commit']}. n = "
            f"{STREAMS}; medians of {record['repeats']} runs; errors: largest relative L2 error of "
            "any result against float64; copy: the bytes that must move, copied by all cores.",
            "",
            tabulate(table, headers, tablefmt="github"),
            "",
            f"One jitted call on one token: {overhead}. "
            f"`import jax_mhc` after `import jax`: {record['import_ms']:.1f} ms.",
            "",
        ]
    )


def main(options: Options) -> None:
    rows = []
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    with Progress(transient=True) as progress:
        for (tokens, hidden), dtype in progress.track(cases, description="shapes"):
            rows += bench_shape(tokens, hidden, dtype, options.repeats)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": common.commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "instruction_set": info.collect()["library"]["instruction_set"],
        },
        "repeats": options.repeats,
        "rows": rows,
        "call_us": call_overhead_us(),
        "import_ms": import_ms(),
    }
    text = markdown(record)
    print(text)
    common.write(record, text, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options))
