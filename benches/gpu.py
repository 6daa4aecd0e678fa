"""Times the fused CUDA kernels beside the fastest plain JAX, after checking both against float64.

`make bench-gpu` runs this and writes benches/results/<gpu>/<date>.json and .md; where a check fails
they are called <date>-wrong and it exits with 1. It takes some minutes.

- pre, post, post_pre, sinkhorn, head: the forward pass. post_bwd, pre_bwd,
  post_pre_bwd: the backward pass alone, as a chain of sublayers runs it (backward.py).
  fb: pre and post of a sublayer whose layer's output y is an independent input, and the gradients
  of x, y, phi, alpha and bias, with cotangents on both results. fb_post_pre: post_pre and
  post_pre_bwd, which is what a sublayer in the middle of a chain costs. post_pre_given,
  post_pre_given_bwd and fb_post_pre_given: the same of the delayed schedule.
- Kernel time: what the GPU's profiler sums up over all kernels of a call. Wall time: of calls
  queued one after the other. Both go round several sets of inputs, so that none is in the L2
  cache. Gradients that a kernel overwrites are donated, as they are inside a model.
- Decode: pre of few tokens, with the wall time of a call among many in one CUDA graph, each with
  streams and parameters of its own.
- Floor: the bytes that must move (docs/performance.md) at the bandwidth of a copy on the device,
  measured in the same run.
- Plain JAX: `jax_mhc._measure.plain`. Other libraries: peers.py. First call: first_call.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import common
import jax
import jax.numpy as jnp
import tyro
from gpu_ops import (
    DECODE_GOAL_US,
    DTYPE,
    IMPLEMENTATIONS,
    OPS,
    PEAKED_OPS,
    SIGMAS,
    Program,
    above_limits,
    check_peaked,
    compile_op,
    errors,
    exact,
    exact_of_new_streams,
    make_inputs,
    some_tokens,
)
from gpu_report import markdown
from jax.extend import core
from rich.progress import Progress

OpName = Literal[
    "pre",
    "post",
    "post_pre",
    "sinkhorn",
    "head",
    "post_bwd",
    "pre_bwd",
    "post_pre_bwd",
    "fb",
    "fb_post_pre",
    "pre_norm",
    "post_pre_norm",
    "fb_norm",
    "post_pre_given",
    "post_pre_given_bwd",
    "fb_post_pre_given",
]


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    shapes: tuple[tuple[int, int], ...] = (
        (8192, 4096), (4096, 2560), (4096, 7168), (16384, 2560), (8192, 2048), (8192, 5120),
    )  # fmt: skip
    """Tokens and hidden width, in pairs; sinkhorn and head run at the first alone."""
    ops: tuple[OpName, ...] = get_args(OpName)
    """Ops to run."""
    decode: tuple[int, ...] = (1, 32, 128)
    """Numbers of tokens of the calls for decoding; the hidden width is the first."""
    repeats: int = 11
    """Batches of 20 calls whose median wall time is reported."""
    output: Path | None = None
    """Folder for the records, each in <gpu>/; by default benches/results, and none if quick."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    peers: bool = True
    """Whether to time the other libraries that are installed."""
    quick: bool = False
    """A tiny shape that tries every path; its times mean nothing."""
    platform: Literal["cuda", "cpu"] = "cuda"
    """cpu tries the harness where there is no GPU: no kernel times."""

    def __post_init__(self) -> None:
        if self.quick:
            self.shapes, self.decode, self.repeats = ((192, 256),), (1, 8), 3
        elif self.output is None:
            self.output = Path("benches/results")


# ---- measurements -------------------------------------------------------------------------------


def measure(
    program: Callable[[Any], Any],
    sets: Iterator[Any],
    repeats: int,
    calls: int = 20,
    copied: Callable[[Any], Any] = lambda arguments: arguments,
) -> dict[str, Any]:
    """Kernel and wall time of a call, and the time of each kernel."""

    def prepare() -> list[Any]:
        return jax.block_until_ready([copied(next(sets)) for _ in range(calls)])

    def batch(prepared: list[Any]) -> Any:
        for arguments in prepared:
            result = program(arguments)
        return jax.block_until_ready(result)

    wall_us = common.median_us(batch, repeats, prepare) / calls
    kernels = common.kernel_times(functools.partial(batch, prepare()), calls)
    kernel_us = sum(kernel["us"] for kernel in kernels.values()) or None
    return {"kernel_us": kernel_us, "wall_us": wall_us, "kernels": kernels}


def graph_us(tokens: int, hidden: int, repeats: int, calls: int = 150) -> dict[str, float | None]:
    """Time of a fused pre among many in one CUDA graph, each with its own streams and parameters.

    From the start of the first kernel to the end of the last, divided by the number of calls; the
    wall time has the launch of the graph in it. Also the number of graphs that the profiler saw.
    """

    def run(sets: list[Any]) -> jax.Array:
        results = [OPS["pre"].run(common.FUSED, *arguments)["u"] for arguments in sets]
        return sum(u[0] for u in results)

    inputs = [make_inputs(jax.random.key(i), tokens, hidden) for i in range(calls)]
    sets = [[named[argument] for argument in OPS["pre"].arguments] for named in inputs]
    graph_options = {
        "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL",
        "xla_gpu_graph_min_graph_size": 1,
        "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
        "xla_enable_command_buffers_during_profiling": True,
    }
    program = jax.jit(run, compiler_options=graph_options).lower(sets).compile()
    for _ in range(3):  # recorded in the first runs
        jax.block_until_ready(program(sets))
    wall_us = common.median_us(lambda: jax.block_until_ready(program(sets)), repeats) / calls
    events = common.profiled(lambda: program(sets))
    launches = sum("GraphLaunch" in event.name for event in events)
    kernels = [event for event in events if event.is_kernel and event.name.startswith("mhc_")]
    us = wall_us
    if kernels:
        us = (max(e.start_us + e.us for e in kernels) - min(e.start_us for e in kernels)) / calls
    return {"us": us, "wall_us": wall_us, "calls": calls, "launches": launches if kernels else None}


def copy_gb_per_s(quick: bool) -> dict[str, float]:
    """Bytes read and written in a second, by the copy engine's path and by a kernel of XLA."""
    source = jnp.ones(2**20 if quick else 2**30, DTYPE)
    rates = {}
    for name, function in {"copy": jnp.copy, "negative": jnp.negative}.items():
        program = jax.jit(function).lower(source).compile()
        times = measure(
            lambda source, program=program: program(*source),
            itertools.cycle([(source,)]),
            repeats=5,
            calls=5,
        )
        rates[name] = 2 * source.nbytes / (times["kernel_us"] or times["wall_us"]) / 1e3
    return rates


def saved_bytes(ops: Any, tokens: int, hidden: int) -> int:
    """Bytes kept from the forward to the backward pass of a sublayer, beyond what it was given."""
    named = jax.eval_shape(
        functools.partial(make_inputs, tokens=tokens, hidden=hidden), jax.random.key(0)
    )

    def keep(x: Any, y: Any, params: Any) -> list[Any]:
        def sublayer(x: Any, y: Any, params: Any) -> Any:
            u, ctx = ops.pre(x, params)
            return u, ops.post(y, ctx)

        return jax.tree.leaves(jax.vjp(sublayer, x, y, params)[1])

    program = jax.make_jaxpr(keep)(named["x"], named["y"], named["params"]).jaxpr
    # As a set: what is kept twice counts once.
    kept = {value for value in program.outvars if not isinstance(value, core.Literal)}
    kept -= {*program.invars, *program.constvars}
    return sum(value.aval.size * value.aval.dtype.itemsize for value in kept)


def _script(name: str, *arguments: str, timeout: float, **environment: str) -> list[Any]:
    """Lines that one of the scripts beside this one prints, each as JSON.

    An error does not stop this run; it becomes the last line.
    """
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    environment = {**os.environ, **environment}
    options: dict[str, Any] = {"env": environment, "timeout": timeout, "stdout": subprocess.PIPE}
    try:
        printed, failed = subprocess.run(command, check=True, **options).stdout, []
    except subprocess.TimeoutExpired as error:
        printed, failed = error.stdout or b"", [{"error": f"{name} stopped after {timeout:g} s"}]
    except subprocess.CalledProcessError as error:
        printed, failed = error.stdout, [{"error": f"{name}: exit status {error.returncode}"}]
    return [json.loads(line) for line in printed.splitlines()] + failed


def first_call(platform: str, processes: int) -> dict[str, Any]:
    """Medians of first_call.py over processes, and what the first call costs beyond a compilation.

    That is the time to lower and to run for the first time, less the same for x + 1.
    """
    runs = [_script("first_call.py", platform, timeout=120)[-1] for _ in range(processes)]
    if failed := [run["error"] for run in runs if "error" in run]:
        raise SystemExit(failed[0])
    costs = jax.tree.map(lambda *values: statistics.median(values), *runs)
    beyond = [
        sum(run["pre"][stage] - run["x_plus_1"][stage] for stage in ("lower", "first"))
        for run in runs
    ]
    return {**costs, "beyond_compile_ms": statistics.median(beyond), "processes": processes}


# ---- the run ------------------------------------------------------------------------------------


def bench_shape(
    programs: dict[tuple[str, str], Program],
    tokens: int,
    hidden: int,
    options: Options,
    tick: Callable[[], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row an op, and what is wrong with them."""
    named = make_inputs(jax.random.key(0), tokens, hidden)
    some_named = some_tokens(named, tokens)
    ops = list(dict.fromkeys(op for op, _ in programs))
    with ThreadPoolExecutor() as pool:
        exact_values = dict(zip(ops, pool.map(lambda op: exact(op, some_named), ops), strict=True))
    rows, complaints = [], []
    for op in ops:
        row: dict[str, Any] = {"op": op, "tokens": tokens, "hidden": hidden, "dtype": DTYPE}
        row["floor_bytes"] = OPS[op].floor_bytes(tokens, hidden)
        row["goal_us"] = OPS[op].goal_us(tokens, hidden)
        for implementation in IMPLEMENTATIONS:
            program = programs[op, implementation]
            sets = program.rotation(named, tokens, hidden)
            arguments = program.copied(program.arguments(named))
            start = time.perf_counter()
            results = jax.block_until_ready(program(arguments))
            first_us = (time.perf_counter() - start) * 1e6
            del arguments
            some_results = some_tokens(results, tokens)
            del results
            if "post_pre" in op and "x_new" in some_results:
                # pre of the streams as they were rounded.
                rounded = {**some_named, "x": some_results["x_new"]}
                exact_values[op] |= exact_of_new_streams(op, rounded)
            found = errors(some_results, exact_values[op])
            if implementation == "fused":
                complaints += above_limits(op, tokens, hidden, found)
            row[implementation] = {
                "compile_s": program.compile_s,
                "first_us": first_us,
                "errors": found,
                "memory": common.memory(program.compiled),
                **measure(program, sets, options.repeats, copied=program.copied),
            }
            if op == "fb":
                kept = saved_bytes(IMPLEMENTATIONS[implementation], tokens, hidden)
                row[implementation]["memory"]["saved_bytes"] = kept
            del sets
            tick()
        rows.append(row)
    return rows, complaints


def run_all(options: Options, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """The record, and what is wrong with the results."""
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(name: str, total: int = 1) -> Iterator[Callable[[], None]]:
        number, start = progress.add_task(name, total=total), time.perf_counter()
        yield lambda: progress.advance(number)
        progress.update(number, completed=total)
        seconds[name] = time.perf_counter() - start
        progress.console.print(f"{name}: {seconds[name]:.0f} s")

    with phase("first calls"):  # before this process takes most of the GPU's memory
        first = first_call(options.platform, processes=1 if options.quick else 3)

    check_tokens = 96 if options.quick else 1024
    hiddens = sorted({hidden for _, hidden in options.shapes})
    decode = [(tokens, options.shapes[0][1]) for tokens in options.decode]
    cases = {
        (op, implementation, *shape)
        for op in options.ops
        for implementation in IMPLEMENTATIONS
        for shape in [
            *options.shapes[: 1 if OPS[op].first_shape else None],
            *(decode if op == "pre" else ()),
            *((check_tokens, hidden) for hidden in hiddens if op in PEAKED_OPS),
        ]
    }
    # The longest to compile first, so that no thread ends long after the others.
    cases = sorted(cases, key=lambda case: -OPS[case[0]].streams)
    with phase("compilation", len(cases)) as tick, ThreadPoolExecutor() as pool:

        def compile_case(case: Any) -> Program:
            program = compile_op(*case)
            tick()
            return program

        programs = dict(zip(cases, pool.map(compile_case, cases), strict=True))

    def compiled_for(tokens: int, hidden: int) -> dict[tuple[str, str], Program]:
        return {
            (op, implementation): programs[op, implementation, tokens, hidden]
            for op in options.ops
            for implementation in IMPLEMENTATIONS
            if (op, implementation, tokens, hidden) in programs
        }

    peaked, rows, complaints = [], [], []
    checks = list(itertools.product(hiddens, SIGMAS))
    with (
        phase("peaked logits against float64", len(checks)) as tick,
        ThreadPoolExecutor() as pool,
    ):

        def check(case: tuple[int, float]) -> Any:
            hidden, sigma = case
            found = check_peaked(compiled_for(check_tokens, hidden), check_tokens, hidden, sigma)
            tick()
            return found

        for checked, wrong in pool.map(check, checks):
            peaked += checked
            complaints += wrong
    with phase("copy bandwidth"):
        bandwidth = copy_gb_per_s(options.quick)
    for tokens, hidden in [*options.shapes, *decode]:
        here = compiled_for(tokens, hidden)
        with phase(f"timing {tokens} x {hidden}", len(here)) as tick:
            shape_rows, wrong = bench_shape(here, tokens, hidden, options, tick)
            rows += shape_rows
            complaints += wrong
            if (tokens, hidden) in decode and shape_rows:
                (row,) = shape_rows
                graph = graph_us(tokens, hidden, options.repeats)
                row["graph"] = {**graph, "goal_us": DECODE_GOAL_US}
    for row in rows:
        row["floor_us"] = row["floor_bytes"] / max(bandwidth.values()) / 1e3
    others = []
    if options.peers and options.platform == "cuda":
        # Without a GPU for JAX, which only computes what to check against there.
        shapes = json.dumps(options.shapes)
        with phase("other libraries"):
            others = _script("peers.py", shapes, timeout=180, JAX_PLATFORMS="cpu")
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or common.commit(),
        **common.versions(),
        "copy_gb_per_s": bandwidth,
        "repeats": options.repeats,
        "rows": rows,
        "peaked": peaked,
        "first_call_ms": first,
        "peers": others,
        "seconds": seconds,
    }
    return record, complaints


def main(options: Options) -> None:
    # float64 is computed on the CPU.
    jax.config.update("jax_platforms", "cpu" if options.platform == "cpu" else "cuda,cpu")
    if not (options.commit or common.commit()):
        raise SystemExit("gpu.py: expected a git repository, got none; name the commit: --commit")
    with Progress(transient=True) as progress:
        record, complaints = run_all(options, progress)
    text = markdown(record)
    print(text)
    if options.output is not None:
        suffix = "-wrong" if complaints else ""
        common.write(record, text, options.output / common.gpu_folder(record), suffix)
    if complaints:
        raise SystemExit("Wrong fused results.\n" + "\n".join(complaints))


if __name__ == "__main__":
    main(tyro.cli(Options))
