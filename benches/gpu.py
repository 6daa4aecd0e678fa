"""Times the fused CUDA kernels beside the fastest plain JAX, after checking both against float64.

`make bench-gpu` runs this and writes benches/results/<gpu>/<date>.json and .md; where a check fails
it prints them, writes nothing and exits with 1. It takes some minutes.

- pre, post, seam (post and the next pre), sinkhorn, head: the forward pass. fb: pre and post of a
  sublayer whose layer's output y is an independent input, and the gradients of x, y, phi, alpha and
  bias, with cotangents on both results.
- Kernel time: what the GPU's profiler sums up over all kernels of a call. Wall time: of calls
  queued one after the other. Both go round several sets of inputs, so that none is in the L2
  cache.
- Floor: the bytes that must move (docs/performance.md) at the bandwidth of a copy on the device,
  measured in the same run.
- Plain JAX: plain.py. Other libraries: peers.py. First call of a process: first_call.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import common
import jax
import jax.numpy as jnp
import numpy as np
import plain
import tyro
from common import STREAMS
from jax.extend import core
from jax.profiler import ProfileData
from rich.progress import Progress
from tabulate import tabulate

import jax_mhc as mhc
from jax_mhc import info
from jax_mhc._types import Context

DTYPE = "bfloat16"
IMPLEMENTATIONS = {"fused": common.FUSED, "plain": plain}
SIGMAS = (1.0, 3.0, 6.0, 10.0)
PEAKED_OPS = ("pre", "fb")  # what is checked at these deviations of the logits of h_res
# Every set of inputs is used again only after so many bytes: four times the L2 cache of an H200.
ROTATED_BYTES = 240e6

# Largest relative L2 error of the fused kernels against float64. 1.8e-3: one rounding to bfloat16.
_ROUNDING = 1.8e-3
LIMITS = {
    "u": _ROUNDING,
    "x_new": _ROUNDING,
    "d_y": _ROUNDING,
    "d_x": 2**0.5 * _ROUNDING,  # post rounds it and pre, which adds to it, once more
    "h_pre": 2e-6,
    "h_post": 2e-6,
    "h_res": 2e-6,
    "d_phi": 3e-4,
    "d_alpha": 1e-4,
    "d_bias": 1e-4,
}
# These sum over all tokens and are checked for few of them, the others for some tokens of many.
PARAMETER_GRADIENTS = ("d_phi", "d_alpha", "d_bias")


@dataclasses.dataclass
class Options:
    """What to run."""

    shapes: tuple[tuple[int, int], ...] = ((8192, 4096), (4096, 2560), (4096, 7168), (16384, 2560))
    """Tokens and hidden width, in pairs."""
    ops: tuple[Literal["pre", "post", "seam", "sinkhorn", "head", "fb"], ...] = (
        "pre", "post", "seam", "sinkhorn", "head", "fb",
    )  # fmt: skip
    """Ops to run."""
    repeats: int = 21
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
            self.shapes, self.repeats = ((192, 256),), 3
        elif self.output is None:
            self.output = Path("benches/results")


# ---- the ops ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        run: `(ops, *arguments) -> results by name`; ops is one of IMPLEMENTATIONS.
        arguments: names of its inputs.
        calls: the custom calls of its fused form.
        streams: streams of C elements that it must read or write for a token.
        numbers: float32 numbers that it must read or write for a token, where no streams move.
        goal_us: kernel time to reach at 8192 x 4096.
    """

    run: Callable[..., dict[str, Any]]
    arguments: tuple[str, ...]
    calls: tuple[str, ...]
    streams: int
    numbers: int = 0
    goal_us: float | None = None

    def floor_bytes(self, tokens: int, hidden: int) -> float:
        return tokens * (self.streams * hidden * jnp.dtype(DTYPE).itemsize + 4 * self.numbers)


def _named(u: Any, ctx: Any) -> dict[str, Any]:
    return {"u": u, "h_pre": ctx.h_pre, "h_post": ctx.h_post, "h_res": ctx.h_res}


def _pre(ops: Any, x: Any, params: Any) -> dict[str, Any]:
    return _named(*ops.pre(x, params))


def _post(ops: Any, y: Any, ctx: Any) -> dict[str, Any]:
    return {"x_new": ops.post(y, ctx)}


def _seam(ops: Any, y: Any, ctx: Any, params: Any) -> dict[str, Any]:
    u, ctx = ops.post_pre(y, ctx, params)
    return {"x_new": ctx.x, **_named(u, ctx)}


def _sinkhorn(ops: Any, z: Any) -> dict[str, Any]:
    return {"h_res": ops.sinkhorn(z)}


def _head(ops: Any, x: Any, head_params: Any) -> dict[str, Any]:
    return {"u": ops.head(x, head_params)}


def _fb(ops: Any, *args: Any) -> dict[str, Any]:
    (u, x_new), (d_x, d_y, d_params) = common.gradients(ops, *args)
    return {
        "u": u, "x_new": x_new, "d_x": d_x, "d_y": d_y,
        "d_phi": d_params.phi, "d_alpha": d_params.alpha, "d_bias": d_params.bias,
    }  # fmt: skip


_SUBLAYER = ("x", "y", "params", "d_u", "d_x_new")
_n = STREAMS
OPS = {
    "pre": Op(_pre, ("x", "params"), ("pre_fwd",), _n + 1, goal_us=175),
    "post": Op(_post, ("y", "ctx"), ("post_fwd",), 2 * _n + 1, goal_us=150),
    "seam": Op(_seam, ("y", "ctx", "params"), ("seam_fwd",), 2 * _n + 2),
    "sinkhorn": Op(_sinkhorn, ("z",), ("sinkhorn_fwd",), 0, numbers=2 * _n**2),
    "head": Op(_head, ("x", "head_params"), ("head_fwd",), _n + 1),
    "fb": Op(
        _fb,
        _SUBLAYER,
        ("post_bwd", "post_fwd", "pre_bwd", "pre_fwd"),
        # pre, post, and their backward passes, where pre's adds to the d_x of post.
        (_n + 1) + (2 * _n + 1) + (2 * _n + 2) + (3 * _n + 1),
        goal_us=1100,
    ),
}
GOAL_SHAPE = (8192, 4096)


@functools.partial(jax.jit, static_argnames=("tokens", "hidden"))
def make_inputs(key: jax.Array, tokens: int, hidden: int, sigma: float = 1.2) -> dict[str, Any]:
    """Random inputs of all ops by name."""
    keys = jax.random.split(key, 8)
    named = dict(zip(_SUBLAYER, common.inputs(keys[0], tokens, hidden, DTYPE, sigma), strict=True))
    z = jax.random.normal(keys[1], (tokens, STREAMS, STREAMS))
    named["z"] = z
    named["ctx"] = Context(
        x=named["x"],
        h_pre=jax.random.uniform(keys[2], (tokens, STREAMS)),
        h_post=jax.random.uniform(keys[3], (tokens, STREAMS)),
        h_res=jax.nn.softmax(z, -1),
    )
    scale = float((STREAMS * hidden) ** -0.5)
    named["head_params"] = mhc.HeadParams(
        phi=scale * jax.random.normal(keys[4], (STREAMS * hidden, STREAMS)),
        alpha=jnp.ones((1,)),
        bias=0.5 * jax.random.normal(keys[5], (STREAMS,)),
    )
    return named


def arguments(op: str, named: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(named[name] for name in OPS[op].arguments)


def rotation(op: str, first: dict[str, Any], tokens: int, hidden: int) -> Iterator[Any]:
    """Endless sets of arguments; the first is `first`."""
    set_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments(op, first)))
    num = min(max(2, -int(-ROTATED_BYTES // set_bytes)), 1000)
    if op == "sinkhorn":  # one array for its many small sets
        many = jax.random.normal(jax.random.key(1), (num, *first["z"].shape))
        return itertools.cycle([(z,) for z in many])
    others = [make_inputs(jax.random.key(i), tokens, hidden) for i in range(1, num)]
    return itertools.cycle([arguments(op, named) for named in (first, *others)])


# ---- compilation --------------------------------------------------------------------------------


def compile_op(op: str, implementation: str, tokens: int, hidden: int) -> tuple[Any, float]:
    """The compiled program and its compile time in seconds.

    Raises:
        SystemExit: the program holds other custom calls than it should.
    """
    abstract = jax.eval_shape(
        functools.partial(make_inputs, tokens=tokens, hidden=hidden), jax.random.key(0)
    )
    run = functools.partial(OPS[op].run, IMPLEMENTATIONS[implementation])
    start = time.perf_counter()
    program = jax.jit(run).lower(*arguments(op, abstract)).compile()
    seconds = time.perf_counter() - start
    found = sorted(re.findall(r'custom_call_target="jax_mhc_(\w+)_v\d+"', program.as_text()))
    expected = list(OPS[op].calls) if implementation == "fused" else []
    if found != expected:
        raise SystemExit(f"{op}, {implementation}: custom calls {found}, expected {expected}")
    return program, seconds


# ---- checks -------------------------------------------------------------------------------------


def exact(op: str, args: tuple[Any, ...], x_new: Any = None) -> dict[str, Any]:
    """The op in float64 on the CPU; for the seam, pre of its `x_new`, which was rounded."""
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        wide, x_new = jax.tree.map(
            lambda array: jnp.asarray(np.asarray(array).astype(np.float64)), (args, x_new)
        )
        values = _exact(op)(*wide)
        if op == "seam":
            values |= _exact("pre")(x_new, wide[OPS[op].arguments.index("params")])
        return jax.tree.map(np.asarray, values)


@functools.cache
def _exact(op: str) -> Callable[..., dict[str, Any]]:
    return jax.jit(
        functools.partial(OPS[op].run, mhc.reference),
        compiler_options={"xla_backend_optimization_level": 0},  # compiles in half the time
    )


def some_tokens(named: dict[str, Any], tokens: int, num: int = 64) -> dict[str, Any]:
    """Inputs or results of `num` random tokens, the first and the last among them."""
    chosen = np.random.default_rng(0).choice(tokens, min(num, tokens), replace=False)
    chosen[:2] = 0, tokens - 1
    return {
        name: value if name.endswith("params") else jax.tree.map(lambda a: a[chosen], value)
        for name, value in named.items()
        if name not in PARAMETER_GRADIENTS
    }


def errors(results: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Relative L2 error of each result."""
    return {name: common.relative_error(results[name], wanted[name]) for name in results}


def above_limits(what: str, found: dict[str, float], sigma: float = 1.0) -> list[str]:
    """Complaints about errors above the limits; NaN is above every limit."""
    complaints = []
    for name, error in found.items():
        # The logits of h_res are sigma times as large, and so is what rounding moves them by.
        limit = LIMITS[name] * (max(1.0, sigma) if name.startswith("h_") else 1.0)
        if not error <= limit:
            complaints.append(f"{what}: error of {name} is {error:.2e}, limit {limit:.1e}")
    return complaints


def check_peaked(
    programs: dict[tuple[str, str], Any], tokens: int, hidden: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Errors of all results, on all tokens, from smooth to peaked logits of h_res."""
    rows, complaints = [], []
    for sigma in SIGMAS:
        named = make_inputs(jax.random.key(0), tokens, hidden, sigma)
        row: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "sigma": sigma}
        for op in PEAKED_OPS:
            args = arguments(op, named)
            wanted = exact(op, args)
            for implementation in IMPLEMENTATIONS:
                program, _ = programs[op, implementation]
                row.setdefault(implementation, {}).update(errors(program(*args), wanted))
        complaints += above_limits(f"{tokens}x{hidden} sigma {sigma:.0f}", row["fused"], sigma)
        rows.append(row)
    return rows, complaints


# ---- measurements -------------------------------------------------------------------------------


def kernel_times(program: Any, sets: Iterator[Any], runs: int = 20) -> dict[str, dict[str, float]]:
    """Launches and microseconds of each kernel in one call, by the GPU's profiler."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(runs):
                result = program(*next(sets))
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(ProfileData.from_file(str(path)).planes)
    kernels: dict[str, dict[str, float]] = {}
    lines = (line for plane in planes if "/device:GPU" in plane.name for line in plane.lines)
    # The other lines group the same time by module, operation or step.
    for event in (e for line in lines if line.name.startswith("Stream") for e in line.events):
        kernel = kernels.setdefault(event.name, {"launches": 0.0, "us": 0.0})
        kernel["launches"] += 1 / runs
        kernel["us"] += event.duration_ns / 1e3 / runs
    return dict(sorted(kernels.items(), key=lambda item: -item[1]["us"]))


def measure(program: Any, sets: Iterator[Any], repeats: int, calls: int = 20) -> dict[str, Any]:
    """Kernel and wall time of a call, and the time of each kernel."""

    def batch() -> None:
        for _ in range(calls):
            result = program(*next(sets))
        jax.block_until_ready(result)

    wall_us = common.median_us(batch, repeats) / calls
    kernels = kernel_times(program, sets)
    kernel_us = sum(kernel["us"] for kernel in kernels.values()) or None
    return {"kernel_us": kernel_us, "wall_us": wall_us, "kernels": kernels}


def copy_gb_per_s(quick: bool) -> dict[str, float]:
    """Bytes read and written in a second, by the copy engine's path and by a kernel of XLA."""
    source = jnp.ones(2**20 if quick else 2**30, DTYPE)
    rates = {}
    for name, function in {"copy": jnp.copy, "negative": jnp.negative}.items():
        program = jax.jit(function).lower(source).compile()
        times = measure(program, itertools.cycle([(source,)]), repeats=5, calls=5)
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


def memory(program: Any) -> dict[str, int]:
    """What the compiled program needs, in bytes."""
    analysis = program.memory_analysis()
    sizes = {
        name: getattr(analysis, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp")
    }
    peak = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return {**{f"{name}_bytes": size for name, size in sizes.items()}, "peak_bytes": peak}


def _script(name: str, *arguments: str, timeout: float, **environment: str) -> list[Any]:
    """What one of the scripts beside this one prints, each line as JSON.

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
    programs: dict[tuple[str, str], Any], tokens: int, hidden: int, options: Options, tick: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row an op, and what is wrong with them."""
    named = make_inputs(jax.random.key(0), tokens, hidden)
    rows, complaints = [], []
    for op in options.ops:
        row: dict[str, Any] = {"op": op, "tokens": tokens, "hidden": hidden, "dtype": DTYPE}
        row["floor_bytes"] = OPS[op].floor_bytes(tokens, hidden)
        row["goal_us"] = OPS[op].goal_us if (tokens, hidden) == GOAL_SHAPE else None
        sets = rotation(op, named, tokens, hidden)
        for implementation in IMPLEMENTATIONS:
            program, compile_s = programs[op, implementation]
            start = time.perf_counter()
            results = jax.block_until_ready(program(*arguments(op, named)))
            first_us = (time.perf_counter() - start) * 1e6
            some_results = some_tokens(results, tokens)
            del results
            some_args = arguments(op, some_tokens(named, tokens))
            found = errors(some_results, exact(op, some_args, some_results.get("x_new")))
            if implementation == "fused":
                complaints += above_limits(f"{op} {tokens}x{hidden}", found)
            row[implementation] = {
                "compile_s": compile_s,
                "first_us": first_us,
                "errors": found,
                "memory": memory(program),
                **measure(program, sets, options.repeats),
            }
            if op == "fb":
                kept = saved_bytes(IMPLEMENTATIONS[implementation], tokens, hidden)
                row[implementation]["memory"]["saved_bytes"] = kept
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
    cases = [
        (op, implementation, *shape)
        for shape in options.shapes
        for op in options.ops
        for implementation in IMPLEMENTATIONS
    ] + [
        (op, implementation, check_tokens, hidden)
        for hidden in hiddens
        for op in PEAKED_OPS
        for implementation in IMPLEMENTATIONS
    ]
    with phase("compilation", len(cases)) as tick, ThreadPoolExecutor() as pool:

        def compile_case(case: Any) -> Any:
            program = compile_op(*case)
            tick()
            return program

        programs = dict(zip(cases, pool.map(compile_case, cases), strict=True))

    def compiled_for(tokens: int, hidden: int) -> dict[tuple[str, str], Any]:
        return {case[:2]: programs[case] for case in cases if case[2:] == (tokens, hidden)}

    peaked, rows, complaints = [], [], []
    with phase("peaked logits against float64", len(hiddens)) as tick, ThreadPoolExecutor() as pool:

        def check(hidden: int) -> Any:
            found = check_peaked(compiled_for(check_tokens, hidden), check_tokens, hidden)
            tick()
            return found

        for checked, wrong in pool.map(check, hiddens):
            peaked += checked
            complaints += wrong
    with phase("copy bandwidth"):
        bandwidth = copy_gb_per_s(options.quick)
    for tokens, hidden in options.shapes:
        total = len(options.ops) * len(IMPLEMENTATIONS)
        with phase(f"timing {tokens} x {hidden}", total) as tick:
            here = compiled_for(tokens, hidden)
            shape_rows, wrong = bench_shape(here, tokens, hidden, options, tick)
            rows += shape_rows
            complaints += wrong
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
        **versions(),
        "copy_gb_per_s": bandwidth,
        "repeats": options.repeats,
        "rows": rows,
        "peaked": peaked,
        "first_call_ms": first,
        "peers": others,
        "seconds": seconds,
    }
    return record, complaints


def versions() -> dict[str, Any]:
    """The machine and what is installed on it."""
    installed = {d.name: d.version for d in metadata.distributions()}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "gpu": jax.devices()[0].device_kind,
        "driver": driver,
        "jax": jax.__version__,
        "plugin": next(
            (f"{n} {v}" for n, v in installed.items() if re.fullmatch(r"jax-cuda\d+-plugin", n)),
            None,
        ),
        "python": platform.python_version(),
        "library_commit": info.collect()["library"]["commit"],
    }


# ---- the report ---------------------------------------------------------------------------------


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _kernel_us(row: dict[str, Any], implementation: str) -> float:
    """Kernel time; wall time where there is no profile."""
    return row[implementation]["kernel_us"] or row[implementation]["wall_us"]


def _worst(found: dict[str, float], coefficients: bool) -> str:
    chosen = [error for name, error in found.items() if name.startswith("h_") == coefficients]
    return f"{max(chosen):.1e}" if chosen else ""


def markdown(record: dict[str, Any]) -> str:
    rows, first = record["rows"], record["first_call_ms"]
    others = [found for found in record["peers"] if "us" in found]
    libraries = sorted({found["library"] for found in others})

    def shape(row: dict[str, Any]) -> str:
        return f"{row['tokens']} × {row['hidden']}"

    def peer(row: dict[str, Any], library: str) -> str:
        key = (library, row["tokens"], row["hidden"])
        found = [o for o in others if (o["library"], o["tokens"], o["hidden"]) == key]
        return _us(found[0]["us"].get(row["op"])) if found else ""

    def memory_in_streams(row: dict[str, Any]) -> list[str]:
        stream_bytes = row["tokens"] * row["hidden"] * jnp.dtype(DTYPE).itemsize
        sizes = [
            row[implementation]["memory"].get(f"{what}_bytes")
            for what in ("saved", "temp", "peak")
            for implementation in IMPLEMENTATIONS
        ]
        return ["" if size is None else f"{size / stream_bytes:.2f}" for size in sizes]

    times = [
        [
            shape(row), row["op"], _us(_kernel_us(row, "fused")), _us(row["fused"]["wall_us"]),
            _us(row["floor_us"]), f"{row['floor_us'] / _kernel_us(row, 'fused'):.2f}",
            _us(row["goal_us"]), _us(_kernel_us(row, "plain")),
            f"{_kernel_us(row, 'plain') / _kernel_us(row, 'fused'):.1f}",
            *(peer(row, library) for library in libraries),
            _worst(row["fused"]["errors"], False), _worst(row["fused"]["errors"], True),
            _worst(row["plain"]["errors"], False), _worst(row["plain"]["errors"], True),
        ]
        for row in rows
    ]  # fmt: skip
    time_headers = [
        "T × C", "op", "fused, µs", "wall, µs", "floor, µs", "floor / fused", "goal, µs",
        "plain JAX, µs", "faster by", *(f"{library}, µs" for library in libraries),
        "error", "error of h", "plain JAX error", "of h",
    ]  # fmt: skip
    peaked = [
        [row["hidden"], f"{row['sigma']:.0f}", name, *(f"{e:.1e}" for e in row[name].values())]
        for row in record["peaked"]
        for name in IMPLEMENTATIONS
    ]
    peaked_headers = ["C", "σ", "", *record["peaked"][0]["fused"]]
    memories = [[shape(row), row["op"], *memory_in_streams(row)] for row in rows]
    memory_headers = [
        f"{what}, {name}"
        for what in ("saved", "temporary", "peak")
        for name in ("fused", "plain JAX")
    ]
    kernels = [
        [shape(row), row["op"], name, f"{kernel['launches']:.3g}", _us(kernel["us"])]
        for row in rows
        for name, kernel in row["fused"]["kernels"].items()
    ]
    stages = [
        [name, *(f"{first[key][stage]:.1f}" for stage in ("lower", "compile", "first", "again"))]
        for key, name in {
            "x_plus_1": "x + 1", "pre": "first fused pre", "next_shape": "pre of another shape",
        }.items()
    ]  # fmt: skip
    copies = ", ".join(f"{name} {rate:.0f}" for name, rate in record["copy_gb_per_s"].items())
    names = ", ".join(sorted({f"{found['library']} {found['version']}" for found in others}))
    failed = [found["error"] for found in record["peers"] if "error" in found]
    table = functools.partial(tabulate, tablefmt="github", disable_numparse=True)
    return "\n".join(
        [
            f"# {record['gpu']}, {record['date']}",
            "",
            f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
            f"Python {record['python']}, commit {record['commit']} (library: "
            f"{record['library_commit']}). n = {STREAMS}, {DTYPE}, "
            f"{mhc.presets.PAPER.sinkhorn_iters} Sinkhorn iterations. Copy bandwidth: "
            f"{copies} GB/s; the floor is the bytes that must move at the faster of the two. "
            "Errors: largest relative L2 error of any result against float64; of h: coefficients.",
            "",
            table(times, time_headers),
            "",
            "µs: summed kernel time; wall: medians of calls queued one after the other. "
            + (f"Other libraries ({names}): CUDA graph replay." if names else "")
            + (f" Not timed: {'; '.join(failed)}." if failed else ""),
            "",
            "## Errors of pre and fb, by the deviation σ of the logits of h_res",
            "",
            f"On all of {record['peaked'][0]['tokens']} tokens.",
            "",
            table(peaked, peaked_headers),
            "",
            "## Memory, in streams (u = 2·C bytes a token)",
            "",
            "Saved: from the forward to the backward pass, beyond x, y and the parameters. "
            "Temporary and peak: of the compiled program; inputs and results are part of the peak.",
            "",
            table(memories, ["T × C", "op", *memory_headers]),
            "",
            "## Kernels",
            "",
            table(kernels, ["T × C", "op", "kernel", "launches", "µs"]),
            "",
            "## First call of a process, ms",
            "",
            table(stages, ["", "tracing and lowering", "XLA's compilation", "first run", "next"]),
            "",
            f"Import: {first['import']:.1f} ms. The first call of pre costs "
            f"{first['beyond_compile_ms']:.1f} ms more than that of x + 1, compilation left out.",
            "",
        ]
    )


def main(options: Options) -> None:
    # float64 is computed on the CPU.
    jax.config.update("jax_platforms", "cpu" if options.platform == "cpu" else "cuda,cpu")
    if not (options.commit or common.commit()):
        raise SystemExit("gpu.py: expected a git repository, got none; name the commit: --commit")
    with Progress(transient=True) as progress:
        record, complaints = run_all(options, progress)
    text = markdown(record)
    print(text)
    if complaints:
        raise SystemExit("Nothing is written: wrong fused results.\n" + "\n".join(complaints))
    if options.output is not None:
        gpu = "-".join(record["gpu"].lower().removeprefix("nvidia ").split())
        common.write(record, text, options.output / gpu)


if __name__ == "__main__":
    main(tyro.cli(Options))
