"""Times the fused CUDA kernels beside the fastest plain JAX, after checking both against float64.

`make bench-gpu` runs this and writes benches/results/<gpu>/<date>.json and .md; where a check fails
they are called <date>-wrong and it exits with 1. It takes some minutes.

- pre, post, seam (post and the next pre), sinkhorn, head: the forward pass. post_bwd, pre_bwd,
  seam_bwd: the backward pass alone, as a chain of sublayers runs it (backward.py). fb: pre and
  post of a sublayer whose layer's output y is an independent input, and the gradients of x, y, phi,
  alpha and bias, with cotangents on both results. fb_seams: seam and seam_bwd, which is what a
  sublayer in the middle of a chain costs.
- Kernel time: what the GPU's profiler sums up over all kernels of a call. Wall time: of calls
  queued one after the other. Both go round several sets of inputs, so that none is in the L2
  cache. Gradients that a kernel overwrites are donated, as they are inside a model.
- Decode: pre of few tokens, with the wall time of a call among many in one CUDA graph, each with
  streams and parameters of its own.
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
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import backward
import common
import jax
import jax.numpy as jnp
import numpy as np
import plain
import tyro
from common import STREAMS
from jax.extend import core
from rich.progress import Progress
from tabulate import tabulate

import jax_mhc as mhc
from jax_mhc._types import Context

DTYPE = "bfloat16"
IMPLEMENTATIONS = {"fused": common.FUSED, "plain": plain}
SIGMAS = (1.0, 3.0, 6.0, 10.0)
PEAKED_OPS = ("pre", "fb", "seam_bwd")  # what is checked at these deviations of the logits of h_res
# Every set of inputs is used again only after so many bytes: four times the L2 cache of an H200.
ROTATED_BYTES = 240e6

# Largest relative L2 error of the fused kernels against float64. 1.8e-3: one rounding to bfloat16.
# Phi enters the gradients of streams rounded to bfloat16, too, and shows where its part is large.
_ROUNDING = 1.8e-3
_ROUNDED_PHI = 2.3e-3
LIMITS = {
    "u": _ROUNDING,
    "x_new": _ROUNDING,
    "d_y": _ROUNDING,
    "d_x": _ROUNDED_PHI,
    "d_x_new": _ROUNDED_PHI,
    "h_pre": 2e-6,
    "h_post": 2e-6,
    "h_res": 2e-6,
    "d_h_post": 2**0.5 * _ROUNDING,  # the seam's are sums of products with the rounded d_x_new
    "d_h_res": 2**0.5 * _ROUNDING,
    "d_phi": 3e-4,
    "d_alpha": 1e-4,
    "d_bias": 1e-4,
}
# The seam's backward pass takes the gradient of h_pre from an X' that is not rounded, the exact one
# from one that is (docs/architecture.md).
SEAM_LIMITS = {"d_phi": 1e-2, "d_alpha": 1e-2, "d_bias": 1e-2, "d_y": _ROUNDED_PHI}
# These sum over all tokens and are checked for few of them, the others for some tokens of many.
PARAMETER_GRADIENTS = ("d_phi", "d_alpha", "d_bias")


OpName = Literal[
    "pre", "post", "seam", "sinkhorn", "head", "post_bwd", "pre_bwd", "seam_bwd", "fb", "fb_seams"
]


@dataclasses.dataclass
class Options:
    """What to run."""

    shapes: tuple[tuple[int, int], ...] = (
        (8192, 4096), (4096, 2560), (4096, 7168), (16384, 2560), (8192, 2048),
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


# ---- the ops ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        run: `(ops, *arguments) -> results by name`; ops is one of IMPLEMENTATIONS. None: the
            backward pass of that name alone, from what its forward pass keeps and the arguments.
        arguments: names of its inputs.
        calls: the custom calls of its fused form.
        streams: streams of C elements that it must read or write for a token.
        numbers: float32 numbers that it must read or write for a token, where no streams move.
        goals_us: kernel time to reach by shape.
        first_shape: whether only the first shape tells anything.
        donated: names of the arguments that it may overwrite, as a model would let it.
    """

    run: Callable[..., dict[str, Any]] | None
    arguments: tuple[str, ...]
    calls: tuple[str, ...]
    streams: int
    numbers: int = 0
    goals_us: tuple[float, ...] = ()
    first_shape: bool = False
    donated: tuple[str, ...] = ()

    def floor_bytes(self, tokens: int, hidden: int) -> float:
        return tokens * (self.streams * hidden * jnp.dtype(DTYPE).itemsize + 4 * self.numbers)

    def goal_us(self, tokens: int, hidden: int) -> float | None:
        return dict(zip(GOAL_SHAPES, self.goals_us, strict=False)).get((tokens, hidden))


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
    found = common.gradients(ops, *args)
    (u, x_new), (d_x, d_y, d_params) = found["results"], found["gradients"]
    return {
        "u": u, "x_new": x_new, "d_x": d_x, "d_y": d_y,
        "d_phi": d_params.phi, "d_alpha": d_params.alpha, "d_bias": d_params.bias,
    }  # fmt: skip


def _fb_seams(ops: Any, y: Any, ctx: Any, params: Any, *cotangents: Any) -> dict[str, Any]:
    named = {"y": y, "ctx": ctx, "params": params}
    given = dict(zip(_COTANGENTS, cotangents, strict=True))
    return backward.gradients(backward.passes(ops)["seam_bwd"], named, given)


_SUBLAYER = ("x", "y", "params", "d_u", "d_x_new")
_COTANGENTS = ("d_u", "d_h_pre", "d_h_post", "d_h_res", "d_x_new")
_n = STREAMS
GOAL_SHAPES = ((8192, 4096), (4096, 7168), (16384, 2560), (4096, 2560))
OPS = {
    "pre": Op(_pre, ("x", "params"), ("pre_fwd",), _n + 1, goals_us=(92, 83, 112, 33)),
    "post": Op(_post, ("y", "ctx"), ("post_fwd",), 2 * _n + 1, goals_us=(147, 129, 183, 48)),
    "seam": Op(
        _seam, ("y", "ctx", "params"), ("seam_fwd",), 2 * _n + 2, goals_us=(180, 165, 222, 62)
    ),
    "sinkhorn": Op(_sinkhorn, ("z",), ("sinkhorn_fwd",), 0, numbers=2 * _n**2, first_shape=True),
    "head": Op(_head, ("x", "head_params"), ("head_fwd",), _n + 1, first_shape=True),
    # The gradient of x is left to pre's.
    "post_bwd": Op(None, ("d_x_new",), ("post_bwd",), 2 * _n + 2),
    "pre_bwd": Op(None, _COTANGENTS, ("pre_bwd",), 3 * _n + 1, donated=("d_x_new",)),
    "seam_bwd": Op(
        None, _COTANGENTS, ("seam_bwd",), 3 * _n + 3, goals_us=(315,), donated=("d_x_new",)
    ),
    "fb": Op(
        _fb,
        _SUBLAYER,
        ("post_bwd", "post_fwd", "pre_bwd", "pre_fwd"),
        # pre, post, and their backward passes.
        (_n + 1) + (2 * _n + 1) + (2 * _n + 2) + (3 * _n + 1),
        goals_us=(680, 644, 920, 276),
        donated=("d_x_new",),
    ),
    "fb_seams": Op(
        _fb_seams,
        ("y", "ctx", "params", *_COTANGENTS),
        ("seam_bwd", "seam_fwd"),
        (2 * _n + 2) + (3 * _n + 3),
        goals_us=(500,),
        donated=("d_x_new",),
    ),
}
DECODE_GOAL_US = 8


@functools.partial(jax.jit, static_argnames=("tokens", "hidden"))
def make_inputs(key: jax.Array, tokens: int, hidden: int, sigma: float = 1.2) -> dict[str, Any]:
    """Random inputs of all ops by name."""
    keys = jax.random.split(key, 9)
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
    named["d_h_pre"] = jax.random.normal(keys[6], (tokens, STREAMS))
    named["d_h_post"] = jax.random.normal(keys[7], (tokens, STREAMS))
    named["d_h_res"] = jax.random.normal(keys[8], (tokens, STREAMS, STREAMS))
    return named


# ---- compilation --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """An op of one implementation, compiled for a shape.

    Attributes:
        op: the name of the op.
        compiled: takes what `arguments` returns.
        compile_s: compile time in seconds.
        keep: from all inputs by name to what the op's forward pass keeps, if it is a backward pass.
    """

    op: str
    compiled: Any
    compile_s: float
    keep: Any = None

    def arguments(self, named: dict[str, Any]) -> tuple[Any, ...]:
        given = tuple(named[name] for name in OPS[self.op].arguments)
        return (self.keep(named), *given) if self.keep else given

    def __call__(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Overwrites what is donated."""
        return self.compiled(*arguments)

    def copied(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with copies of those which the program overwrites."""
        names = ("kept",) * (self.keep is not None) + OPS[self.op].arguments
        return tuple(
            jnp.copy(argument) if name in OPS[self.op].donated else argument
            for name, argument in zip(names, arguments, strict=True)
        )

    def rotation(self, first: dict[str, Any], tokens: int, hidden: int) -> Iterator[Any]:
        """Endless sets of arguments; the first is that of the inputs `first`."""
        arguments = self.arguments(first)
        set_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments))
        num = min(max(2, -int(-ROTATED_BYTES // set_bytes)), 1000)
        if self.op == "sinkhorn":  # one array for its many small sets
            many = jax.random.normal(jax.random.key(1), (num, *first["z"].shape))
            return itertools.cycle([(z,) for z in many])
        others = (make_inputs(jax.random.key(i), tokens, hidden) for i in range(1, num))
        return itertools.cycle([arguments, *map(self.arguments, others)])


def compile_op(name: str, implementation: str, tokens: int, hidden: int) -> Program:
    """Compiles an op.

    Raises:
        SystemExit: the program holds other custom calls than it should.
    """
    op, ops = OPS[name], IMPLEMENTATIONS[implementation]
    named = jax.eval_shape(
        functools.partial(make_inputs, tokens=tokens, hidden=hidden), jax.random.key(0)
    )
    given = [named[argument] for argument in op.arguments]
    keep, run = None, op.run and functools.partial(op.run, ops)
    if run is None:
        one = backward.passes(ops)[name]
        kept = jax.eval_shape(lambda named: one.keep(named)[1], named)
        leaves, structure = jax.tree.flatten(kept)
        given = [leaves, *given]
        keep = jax.jit(lambda named: jax.tree.leaves(one.keep(named)[1])).lower(named).compile()

        def run(leaves: list[Any], *cotangents: Any) -> dict[str, Any]:
            kept = jax.tree.unflatten(structure, leaves)
            return one.run(kept, dict(zip(op.arguments, cotangents, strict=True)))

    donated = [len(given) - len(op.arguments) + op.arguments.index(n) for n in op.donated]
    start = time.perf_counter()
    compiled = jax.jit(run, donate_argnums=donated).lower(*given).compile()
    seconds = time.perf_counter() - start
    found = sorted(re.findall(r'custom_call_target="jax_mhc_(\w+)_v\d+"', compiled.as_text()))
    expected = list(op.calls) if implementation == "fused" else []
    if found != expected:
        raise SystemExit(f"{name}, {implementation}: custom calls {found}, expected {expected}")
    return Program(name, compiled, seconds, keep)


# ---- checks -------------------------------------------------------------------------------------


def exact(op: str, named: dict[str, Any]) -> dict[str, Any]:
    """The op in float64 on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        wide = jax.tree.map(lambda array: jnp.asarray(np.asarray(array).astype(np.float64)), named)
        return jax.tree.map(np.asarray, _exact(op)(wide))


@functools.cache
def _exact(name: str) -> Callable[..., dict[str, Any]]:
    op = OPS[name]

    def run(named: dict[str, Any]) -> dict[str, Any]:
        if op.run is not None and name != "fb_seams":
            return op.run(mhc.reference, *(named[argument] for argument in op.arguments))
        # Rounded where the two halves of a seam meet, as the kernels do.
        one = backward.passes(mhc.reference, DTYPE)["seam_bwd" if name == "fb_seams" else name]
        return backward.gradients(one, named, {key: named[key] for key in _COTANGENTS})

    # Without optimizations: compiles in half the time.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def some_tokens(named: dict[str, Any], tokens: int, num: int = 64) -> dict[str, Any]:
    """Inputs or results of `num` random tokens, the first and the last among them."""
    chosen = np.random.default_rng(0).choice(tokens, min(num, tokens), replace=False)
    if tokens > num:
        chosen[:2] = 0, tokens - 1
    return {
        name: value if name.endswith("params") else jax.tree.map(lambda a: a[chosen], value)
        for name, value in named.items()
        if name not in PARAMETER_GRADIENTS
    }


def errors(results: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """Relative L2 error of each result."""
    return {name: common.relative_error(results[name], wanted[name]) for name in results}


def above_limits(
    op: str, tokens: int, hidden: int, found: dict[str, float], sigma: float = 1.0
) -> list[str]:
    """Complaints about errors above the limits; NaN is above every limit."""
    complaints = []
    limits = LIMITS | (SEAM_LIMITS if "seam" in op else {})
    for name, error in found.items():
        # The logits of h_res are sigma times as large, and so is what rounding moves them by.
        limit = limits[name] * (max(1.0, sigma) if name.startswith("h_") else 1.0)
        if not error <= limit:
            what = f"{op} {tokens}x{hidden}, sigma {sigma:.1f}"
            complaints.append(f"{what}: error of {name} is {error:.2e}, limit {limit:.1e}")
    return complaints


def check_peaked(
    programs: dict[tuple[str, str], Program], tokens: int, hidden: int, sigma: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Errors of all results, on all tokens, for logits of h_res of deviation sigma."""
    rows, complaints = [], []
    named = make_inputs(jax.random.key(0), tokens, hidden, sigma)
    for op in (op for op in PEAKED_OPS if (op, "fused") in programs):
        row: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "sigma": sigma, "op": op}
        wanted = exact(op, named)
        for implementation in IMPLEMENTATIONS:
            program = programs[op, implementation]
            row[implementation] = errors(program(program.copied(program.arguments(named))), wanted)
        complaints += above_limits(op, tokens, hidden, row["fused"], sigma)
        rows.append(row)
    return rows, complaints


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
            if op == "seam":
                # pre of the streams as they were rounded.
                exact_values[op] |= exact("pre", {**some_named, "x": some_results["x_new"]})
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
    # What takes longest to compile first, so that no thread ends long after the others.
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
    results = list(dict.fromkeys(name for row in record["peaked"] for name in row["fused"]))
    peaked = [
        [
            row["hidden"], row["op"], f"{row['sigma']:.0f}", name,
            *(f"{row[name][key]:.1e}" if key in row[name] else "" for key in results),
        ]
        for row in record["peaked"]
        for name in IMPLEMENTATIONS
    ]  # fmt: skip
    decode = [
        [
            shape(row), _us(row["graph"]["us"]), _us(row["graph"]["goal_us"]),
            _us(row["graph"]["wall_us"]),
            "?" if row["graph"]["launches"] is None else row["graph"]["launches"],
            _us(_kernel_us(row, "fused")), _us(_kernel_us(row, "plain")),
            round(sum(kernel["launches"] for kernel in row["plain"]["kernels"].values())),
            _us(row["plain"]["wall_us"]),
        ]
        for row in rows
        if "graph" in row
    ]  # fmt: skip
    decode_headers = [
        "T × C", "fused in a graph, µs", "goal, µs", "wall, µs", "graphs", "fused, µs of kernels",
        "plain JAX, µs of kernels", "its kernels", "its wall time, µs",
    ]  # fmt: skip
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
            "## Decode: pre of few tokens",
            "",
            "In a graph: a call among 150 in one program, from the start of the first kernel to "
            "the end of the last; wall: the same with the launch; graphs: the number of launches.",
            "",
            table(decode, decode_headers),
            "",
            "## Errors by the deviation σ of the logits of h_res",
            "",
            f"On all of {record['peaked'][0]['tokens']} tokens.",
            "",
            table(peaked, ["C", "op", "σ", "", *results]),
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
    if options.output is not None:
        suffix = "-wrong" if complaints else ""
        common.write(record, text, options.output / common.gpu_folder(record), suffix)
    if complaints:
        raise SystemExit("Wrong fused results.\n" + "\n".join(complaints))


if __name__ == "__main__":
    main(tyro.cli(Options))
