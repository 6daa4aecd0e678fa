"""The ops that gpu.py times, compiled, and what their results are checked against."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import backward
import common
import jax
import jax.numpy as jnp
import numpy as np
from common import STREAMS

import jax_mhc as mhc
from jax_mhc._measure import plain, traffic
from jax_mhc._types import Context

DTYPE = "bfloat16"
IMPLEMENTATIONS = {"fused": common.FUSED, "plain": plain}
SIGMAS = (1.0, 3.0, 6.0, 10.0)
# The ops that are checked at these deviations of the logits of h_res.
PEAKED_OPS = ("pre", "fb", "post_pre_bwd", "post_pre_given_bwd")
# Every set of inputs is used again only after so many bytes: four times the L2 cache of an H200.
ROTATED_BYTES = 240e6

# Largest relative L2 error of the fused kernels against float64. 1.8e-3: one rounding to bfloat16.
_ROUNDING = 1.8e-3
LIMITS = {
    "u": _ROUNDING,
    "x_new": _ROUNDING,
    "d_y": _ROUNDING,
    "d_x": _ROUNDING,
    "d_x_new": _ROUNDING,
    "h_pre": 2e-6,
    "h_post": 2e-6,
    "h_res": 2e-6,
    "d_h_given": _ROUNDING,
    "d_h_post": 2**0.5 * _ROUNDING,  # the seam's are sums of products with the rounded d_x_new
    "d_h_res": 2**0.5 * _ROUNDING,
    "d_phi": 3e-4,
    "d_alpha": 1e-4,
    "d_bias": 1e-4,
    "d_norm_scale": 1e-4,
}
# The seam's backward pass takes the gradient of h_pre from an X' that is not rounded, and that of y
# from gradients of X' that are not; the exact ones are taken from rounded ones
# (docs/kernels.md).
SEAM_LIMITS = {"d_phi": 1e-2, "d_alpha": 1e-2, "d_bias": 1e-2, "d_y": 2**0.5 * _ROUNDING}
_PARAMETERS = ("params", "head_params", "norm_scale")
# Gradients that sum over all tokens are checked for few of them, others for some of many.
PARAMETER_GRADIENTS = ("d_phi", "d_alpha", "d_bias", "d_norm_scale")


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


def _pre(ops: Any, x: Any, params: Any, norm_scale: Any = None) -> dict[str, Any]:
    return _named(*ops.pre(x, params, norm_scale=norm_scale))


def _post(ops: Any, y: Any, ctx: Any) -> dict[str, Any]:
    return {"x_new": ops.post(y, ctx)}


def _seam(ops: Any, y: Any, ctx: Any, params: Any, norm_scale: Any = None) -> dict[str, Any]:
    u, ctx = ops.post_pre(y, ctx, params, norm_scale=norm_scale)
    return {"x_new": ctx.x, **_named(u, ctx)}


def _given(ops: Any, y: Any, ctx: Any, params: Any, h_given: Any) -> dict[str, Any]:
    u, ctx = ops.post_pre(y, ctx, params, h_pre=h_given)
    return {"x_new": ctx.x, **_named(u, ctx)}


def _sinkhorn(ops: Any, z: Any) -> dict[str, Any]:
    return {"h_res": ops.sinkhorn(z)}


def _head(ops: Any, x: Any, head_params: Any) -> dict[str, Any]:
    return {"u": ops.head(x, head_params)}


def _fb(ops: Any, *args: Any, **options: Any) -> dict[str, Any]:
    found = common.gradients(ops, *args, **options)
    (u, x_new), (d_x, d_y, d_params, d_options) = found["results"], found["gradients"]
    return {
        "u": u, "x_new": x_new, "d_x": d_x, "d_y": d_y,
        "d_phi": d_params.phi, "d_alpha": d_params.alpha, "d_bias": d_params.bias,
        **{f"d_{name}": gradient for name, gradient in d_options.items()},
    }  # fmt: skip


def _fb_norm(ops: Any, norm_scale: Any, *args: Any) -> dict[str, Any]:
    return _fb(ops, *args, norm_scale=norm_scale)


def _fb_post_pre(ops: Any, y: Any, ctx: Any, params: Any, *cotangents: Any) -> dict[str, Any]:
    named = {"y": y, "ctx": ctx, "params": params}
    given = dict(zip(_COTANGENTS, cotangents, strict=True))
    return backward.gradients(backward.passes(ops)["post_pre_bwd"], named, given)


def _fb_given(
    ops: Any, y: Any, ctx: Any, params: Any, h_given: Any, *cotangents: Any
) -> dict[str, Any]:
    named = {"y": y, "ctx": ctx, "params": params, "h_given": h_given}
    given = dict(zip(_COTANGENTS, cotangents, strict=True))
    return backward.gradients(backward.passes(ops)["post_pre_given_bwd"], named, given)


_SUBLAYER = ("x", "y", "params", "d_u", "d_x_new")
_COTANGENTS = ("d_u", "d_h_pre", "d_h_post", "d_h_res", "d_x_new")
_U = traffic.of_calls(STREAMS)
_FB = sum(traffic.of_stack(STREAMS, 1))
GOAL_SHAPES = ((8192, 4096), (4096, 7168), (16384, 2560), (4096, 2560))
OPS = {
    "pre": Op(_pre, ("x", "params"), ("pre_fwd",), _U["pre_fwd"], goals_us=(92, 83, 112, 33)),
    "post": Op(_post, ("y", "ctx"), ("post_fwd",), _U["post_fwd"], goals_us=(147, 129, 183, 48)),
    "post_pre": Op(
        _seam,
        ("y", "ctx", "params"),
        ("post_pre_fwd",),
        _U["post_pre_fwd"],
        goals_us=(180, 165, 222, 62),
    ),
    "sinkhorn": Op(
        _sinkhorn, ("z",), ("sinkhorn_fwd",), 0, numbers=2 * STREAMS**2, first_shape=True
    ),
    "head": Op(_head, ("x", "head_params"), ("head_fwd",), _U["head_fwd"], first_shape=True),
    # The gradient of x is left to pre's.
    "post_bwd": Op(None, ("d_x_new",), ("post_bwd",), _U["post_bwd"]),
    "pre_bwd": Op(None, _COTANGENTS, ("pre_bwd",), _U["pre_bwd"], donated=("d_x_new",)),
    "post_pre_bwd": Op(
        None,
        _COTANGENTS,
        ("post_pre_bwd",),
        _U["post_pre_bwd"],
        goals_us=(315,),
        donated=("d_x_new",),
    ),
    "fb": Op(
        _fb,
        _SUBLAYER,
        ("post_bwd", "post_fwd", "pre_bwd", "pre_fwd"),
        _FB,
        goals_us=(680, 644, 920, 276),
        donated=("d_x_new",),
    ),
    # With a norm of the layer's input, for which nothing more has to move.
    "pre_norm": Op(_pre, ("x", "params", "norm_scale"), ("pre_fwd",), _U["pre_fwd"]),
    "post_pre_norm": Op(
        _seam, ("y", "ctx", "params", "norm_scale"), ("post_pre_fwd",), _U["post_pre_fwd"]
    ),
    "fb_norm": Op(
        _fb_norm,
        ("norm_scale", *_SUBLAYER),
        ("post_bwd", "post_fwd", "pre_bwd", "pre_fwd"),
        _FB,
        donated=("d_x_new",),
    ),
    "fb_post_pre": Op(
        _fb_post_pre,
        ("y", "ctx", "params", *_COTANGENTS),
        ("post_pre_bwd", "post_pre_fwd"),
        _U["post_pre_fwd"] + _U["post_pre_bwd"],
        goals_us=(500,),
        donated=("d_x_new",),
    ),
    # The seam of the delayed schedule, whose u has the weights of the sublayer before.
    "post_pre_given": Op(
        _given,
        ("y", "ctx", "params", "h_given"),
        ("post_pre_fwd",),
        _U["post_pre_fwd"],
        goals_us=(190,),
    ),
    "post_pre_given_bwd": Op(
        None,
        _COTANGENTS,
        ("post_pre_bwd",),
        _U["post_pre_bwd"],
        goals_us=(286,),
        donated=("d_x_new",),
    ),
    "fb_post_pre_given": Op(
        _fb_given,
        ("y", "ctx", "params", "h_given", *_COTANGENTS),
        ("post_pre_bwd", "post_pre_fwd"),
        _U["post_pre_fwd"] + _U["post_pre_bwd"],
        goals_us=(476,),
        donated=("d_x_new",),
    ),
}
# The backward pass by which each op with one in its program is checked.
CHECKED_BY = {"fb_post_pre": "post_pre_bwd", "fb_post_pre_given": "post_pre_given_bwd"}
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
    named["h_given"] = jax.random.uniform(keys[2], (tokens, STREAMS), minval=0.1)
    named["norm_scale"] = jax.random.uniform(keys[5], (hidden,), minval=0.5, maxval=1.5)
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


def exact_of_new_streams(op: str, named: dict[str, Any]) -> dict[str, Any]:
    """The results of a seam on its new streams, which are `x` here, as they were rounded."""
    results = exact("pre_norm" if op == "post_pre_norm" else "pre", named)
    if "given" in op:
        h_given, x = (np.asarray(named[name]).astype(np.float64) for name in ("h_given", "x"))
        results["u"] = np.einsum("ti,tic->tc", h_given, x)
    return results


@functools.cache
def _exact(name: str) -> Callable[..., dict[str, Any]]:
    op = OPS[name]

    def run(named: dict[str, Any]) -> dict[str, Any]:
        if op.run is not None and name not in CHECKED_BY:
            return op.run(mhc.reference, *(named[argument] for argument in op.arguments))
        # Rounded where the two halves of a seam meet, as the kernels do.
        one = backward.passes(mhc.reference, DTYPE)[CHECKED_BY.get(name, name)]
        return backward.gradients(one, named, {key: named[key] for key in _COTANGENTS})

    # Without optimizations: compiles in half the time.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def some_tokens(named: dict[str, Any], tokens: int, num: int = 64) -> dict[str, Any]:
    """Inputs or results of `num` random tokens, the first and the last among them."""
    chosen = np.random.default_rng(0).choice(tokens, min(num, tokens), replace=False)
    if tokens > num:
        chosen[:2] = 0, tokens - 1
    return {
        name: value if name in _PARAMETERS else jax.tree.map(lambda a: a[chosen], value)
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
    limits = LIMITS | (SEAM_LIMITS if "post_pre" in op else {})
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
