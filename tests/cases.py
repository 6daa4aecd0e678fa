"""The one table of cases, the one table of ops and the one table of tolerances.

A row of `OPS` puts an op under all tests of values, gradients, transforms and compiled programs. A
row of `CASES` puts every op under a new shape or setting.

All tests run on JAX's default backend. What they expect is computed in float64 on the CPU, and the
kernels are compared with it in the widest dtype that they have there.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import programs

import jax_mhc
from jax_mhc import HeadParams, MHCConfig, MHCParams, presets
from jax_mhc._call import dispatch
from jax_mhc._limits import KERNEL_DTYPES
from jax_mhc._types import Context

# ---- the platform -------------------------------------------------------------------------------

PLATFORM = dispatch.default_platform()
CPU = jax.devices("cpu")[0]

# The dtypes of streams that have kernels here, and the widest of them.
DTYPES = KERNEL_DTYPES[PLATFORM]
WIDEST = jnp.dtype("float64" if "float64" in DTYPES else "float32")


def implemented(*dtypes: str) -> list[tuple[str, str]]:
    """Pairs of dtype and implementation that there are here, of these dtypes."""
    return [
        (dtype, implementation)
        for dtype in dtypes
        for implementation in ("fused", "reference")
        if implementation == "reference" or dtype in DTYPES
    ]


# ---- cases --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape with settings. `sigma` is the standard deviation of the logits of h_res.

    `norm`: the layer's input is normalised.
    """

    tokens: tuple[int, ...]
    streams: int
    hidden: int
    sigma: float = 1.0
    config: MHCConfig = presets.PAPER
    static: bool = False
    norm: bool = False


def variant(**settings: Any) -> MHCConfig:
    """The paper's config with some settings changed."""
    return dataclasses.replace(presets.PAPER, **settings)


CASES = {
    # Shapes. n = 2 and 4 have paths of their own in the kernels; no width but 16 is a multiple of a
    # vector register, 1 and 7 are shorter than one.
    "paper": Case((2, 3), 4, 16),
    "no_leading_axes": Case((), 4, 33),
    "no_tokens": Case((2, 0, 3), 4, 16),
    "one_token": Case((1,), 4, 100),
    "many_tokens": Case((2, 3, 67), 4, 7),
    "very_many_tokens": Case((8209,), 2, 3),
    "width_1": Case((5,), 4, 1),
    "width_257": Case((3, 1), 4, 257),
    "one_stream": Case((3,), 1, 33),
    "two_streams": Case((7,), 2, 100),
    "three_streams": Case((7,), 3, 7),
    "eight_streams": Case((3,), 8, 33),
    "sixteen_streams": Case((2,), 16, 7),
    # Peaked logits: the ones on which the variants of Sinkhorn differ.
    "peaked_3": Case((5,), 4, 33, 3),
    "peaked_6": Case((5,), 4, 33, 6),
    "peaked_10": Case((5,), 4, 33, 10),
    "peaked_two_streams": Case((5,), 2, 33, 10),
    "peaked_eight_streams": Case((3,), 8, 33, 6),
    # Presets.
    "deepseek_v4": Case((5,), 4, 33, 1, presets.DEEPSEEK_V4),
    "deepseek_v4_peaked": Case((5,), 4, 33, 6, presets.DEEPSEEK_V4),
    "megatron": Case((5,), 4, 33, 1, presets.MEGATRON),
    "megatron_peaked": Case((5,), 4, 33, 6, presets.MEGATRON),
    "hy4": Case((5,), 4, 33, 1, presets.HY4),
    # Constraints and static coefficients.
    "unconstrained": Case((5,), 4, 33, 1, variant(constraint="none")),
    "identity": Case((5,), 4, 33, 1, variant(constraint="identity")),
    "static": Case((5,), 4, 33, 3, static=True),
    "static_unconstrained": Case((5,), 4, 33, 1, variant(constraint="none"), static=True),
    "static_identity": Case((5,), 3, 7, 1, variant(constraint="identity"), static=True),
    # Every setting far from its default, so that one that is ignored shows.
    "no_iterations": Case((5,), 4, 33, 1, variant(sinkhorn_iters=0)),
    "one_iteration": Case((5,), 4, 33, 3, variant(sinkhorn_iters=1)),
    # More than whose divisors GPUs keep in shared memory for the backward pass.
    "many_iterations": Case((5,), 4, 33, 6, variant(sinkhorn_iters=200)),
    "rows_first": Case((5,), 4, 33, 3, variant(order="row_column")),
    "rows_first_add": Case(
        (5,), 3, 7, 3, variant(order="row_column", sinkhorn_eps=0.05, sinkhorn_iters=3)
    ),
    "clamp": Case((5,), 3, 7, 6, variant(sinkhorn_eps=0.4, sinkhorn_eps_mode="clamp")),
    "large_eps": Case(
        (5,),
        4,
        33,
        1,
        variant(norm_eps=0.5, pre_eps=0.25, post_scale=0.7, post_eps=0.125, sinkhorn_iters=5),
    ),  # fmt: skip
    "eps_outside": Case((5,), 4, 33, 1, variant(norm_eps=0.5, norm_eps_mode="outside")),
}

# Means of permutation matrices, of every number of streams that they are for.
PERMUTED = variant(constraint="permutations")
PERMUTATIONS = {
    "permutations": Case((2, 3), 4, 16, 1, PERMUTED),
    "permutations_one_stream": Case((), 1, 33, 1, PERMUTED),
    "permutations_two_streams": Case((7,), 2, 100, 6, PERMUTED),
    "permutations_three_streams": Case((7,), 3, 7, 3, PERMUTED),
    "permutations_peaked_3": Case((2, 3, 67), 4, 8, 3, PERMUTED),
    "permutations_peaked_6": Case((5,), 4, 33, 6, PERMUTED),
    "permutations_peaked_10": Case((5,), 4, 32, 10, PERMUTED),
    "permutations_static": Case((5,), 4, 33, 3, PERMUTED, static=True),
    "permutations_normalized": Case((5,), 4, 16, 3, PERMUTED, norm=True),
    "permutations_no_tokens": Case((2, 0, 3), 4, 16, 1, PERMUTED),
}
CASES |= PERMUTATIONS

# A norm of the layer's input.
NORMALIZED = {
    "normalized": Case((2, 3), 4, 16, norm=True),
    "normalized_many_tokens": Case((2, 3, 67), 4, 7, norm=True),
    "normalized_no_tokens": Case((2, 0, 3), 4, 16, norm=True),
    "normalized_width_1": Case((5,), 3, 1, norm=True),
    "normalized_width_257": Case((3, 1), 4, 257, norm=True),
    "normalized_one_stream": Case((), 1, 33, norm=True),
    "normalized_sixteen_streams": Case((2,), 16, 7, norm=True),
    "normalized_peaked": Case((5,), 4, 33, 6, presets.DEEPSEEK_V4, norm=True),
    "normalized_static": Case((5,), 4, 33, 3, static=True, norm=True),
}
CASES |= NORMALIZED
# Large enough to show.
NORM_SCALE_EPS = 0.25

# Enough for what is made of other ops: shapes that have a path of their own, kinds of settings.
_COMPOSED = (
    "paper", "no_leading_axes", "no_tokens", "many_tokens", "width_257", "one_stream",
    "two_streams", "eight_streams", "peaked_3", "peaked_6", "peaked_10", "deepseek_v4_peaked",
    "megatron_peaked", "unconstrained", "identity", "static", "large_eps", *NORMALIZED,
    *PERMUTATIONS,
)  # fmt: skip
_SHAPES = _COMPOSED[:8]
_PEAKED = ("peaked_3", "peaked_10", "permutations")
_SUMS = ("paper", "no_leading_axes", "no_tokens", "one_stream", "two_streams", "sixteen_streams")

# The error in lower precision is compared where it can grow: peaked logits, many tokens, wide sums.
_PRECISION = {
    "float32": ("peaked_3", "peaked_6", "peaked_10", "many_tokens", "eight_streams", "width_257",
                "deepseek_v4_peaked", "megatron_peaked", "normalized_many_tokens",
                "normalized_width_257", "permutations_peaked_3", "permutations_peaked_10"),
    "bfloat16": ("peaked_3", "peaked_6", "peaked_10", "many_tokens", "two_streams",
                 "normalized_many_tokens", "normalized_width_257", "permutations_peaked_3",
                 "permutations_peaked_10"),
    "float16": ("peaked_3", "peaked_6", "peaked_10"),
}  # fmt: skip

# ---- ops ----------------------------------------------------------------------------------------


def _normal(rng: np.random.Generator, dtype: Any, *shape: int, scale: Any = 1.0) -> np.ndarray:
    return (scale * rng.normal(size=shape)).astype(dtype)


def accumulation(dtype: Any) -> np.dtype:
    """The dtype of coefficients and parameters beside streams of `dtype`."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def streams(case: Case, rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """Streams x [..., n, C]."""
    return _normal(rng, dtype, *case.tokens, case.streams, case.hidden)


def layer_output(case: Case, rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """A layer's output y [..., C]."""
    return _normal(rng, dtype, *case.tokens, case.hidden)


def params(case: Case, rng: np.random.Generator, dtype: Any) -> MHCParams:
    """Parameters for logits of deviation 1 (pre, post) and sigma (res), half from the bias."""
    n, num = case.streams, case.config.num_coefficients(case.streams)
    dtype = accumulation(dtype)
    spread = np.array([1, 1, case.sigma]) / math.sqrt(1 if case.static else 2)
    bias = _normal(rng, dtype, num, scale=np.repeat(spread, [n, n, num - 2 * n]))
    if case.static:
        return MHCParams(phi=None, alpha=None, bias=bias)
    width = n * case.hidden
    phi = _normal(rng, dtype, width, num, scale=1 / math.sqrt(width))
    alpha = (spread * rng.uniform(0.8, 1.2, 3))[: case.config.num_gates()].astype(dtype)
    return MHCParams(phi=phi, alpha=alpha, bias=bias)


def head_params(case: Case, rng: np.random.Generator, dtype: Any) -> HeadParams:
    """Parameters of the head."""
    n, width, dtype = case.streams, case.streams * case.hidden, accumulation(dtype)
    return HeadParams(
        phi=_normal(rng, dtype, width, n, scale=1 / math.sqrt(width)),
        alpha=rng.uniform(0.8, 1.2, 1).astype(dtype),
        bias=_normal(rng, dtype, n),
    )


def context(case: Case, rng: np.random.Generator, dtype: Any) -> Context:
    """A context as pre would return it for streams and parameters of this case."""
    x = streams(case, rng, dtype)
    _, *coefficients = oracle.pre(x, params(case, rng, np.float64), case.config)
    return Context(x, *(h.astype(accumulation(dtype)) for h in coefficients))


def h_pre(case: Case, rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """Weights of the streams, as h_pre of another sublayer [..., n]."""
    shape = (*case.tokens, case.streams)
    return rng.uniform(size=shape).astype(accumulation(dtype))


def logits(case: Case, rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """Logits of h_res [..., n, n], in the accumulation dtype."""
    shape = (*case.tokens, case.streams, case.streams)
    return _normal(rng, accumulation(dtype), *shape, scale=case.sigma)


def gain(case: Case, rng: np.random.Generator, dtype: Any) -> np.ndarray:
    """A parameter of the layer itself [C]."""
    return _normal(rng, accumulation(dtype), case.hidden)


def norm_scale(case: Case, rng: np.random.Generator, dtype: Any) -> np.ndarray | None:
    """The parameter of the norm of the layer's input [C], or None."""
    return gain(case, rng, dtype) if case.norm else None


def norm(o: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the norm."""
    return {"norm_scale": o["norm_scale"], "norm_scale_eps": NORM_SCALE_EPS}


@dataclasses.dataclass(frozen=True)
class Op:
    """One op under test.

    Attributes:
        operands: for each operand, the function that makes it.
        run: `(operands, config, implementation, **where) -> outputs`; both are pytrees.
        oracle: `(operands, config) -> outputs` in float64.
        calls: the stems of its custom calls.
        batched: the operands that have tokens.
        applies: whether a case, by name, tells something about the op.
        in_backward: the forward calls that its backward pass makes.
    """

    operands: dict[str, Callable]
    run: Callable
    oracle: Callable
    calls: tuple[str, ...]
    batched: tuple[str, ...]
    applies: Callable[[str], bool] = lambda case: True
    in_backward: tuple[str, ...] = ()


def public(ctx: Context) -> Context:
    """The context as users see it, with the same leaves for both implementations."""
    return dataclasses.replace(ctx)


def _run_pre(o, config, implementation, **where):
    options = {"config": config, "implementation": implementation}
    u, ctx = jax_mhc.pre(o["x"], o["params"], **options, **norm(o), **where)
    return {"u": u, "ctx": public(ctx)}


def _oracle_pre(o, config):
    u, *coefficients = oracle.pre(o["x"], o["params"], config, **norm(o))
    return {"u": u, "ctx": Context(o["x"], *coefficients)}


def _run_post(o, config, implementation, **_):
    return {"x_new": jax_mhc.post(o["y"], o["ctx"], implementation=implementation)}


def _oracle_post(o, config):
    ctx = o["ctx"]
    return {"x_new": oracle.post(o["y"], ctx.x, ctx.h_post, ctx.h_res)}


def _run_post_pre(o, config, implementation, **where):
    options = {"config": config, "implementation": implementation}
    u, ctx = jax_mhc.post_pre(o["y"], o["ctx"], o["params"], **options, **norm(o), **where)
    return {"u": u, "ctx": public(ctx)}


def _oracle_post_pre(o, config):
    return _oracle_pre({**o, "x": _oracle_post(o, config)["x_new"]}, config)


def _run_given(o, config, implementation, **where):
    options = {"config": config, "implementation": implementation, "h_pre": o["h_pre"]}
    u, ctx = jax_mhc.post_pre(o["y"], o["ctx"], o["params"], **options, **norm(o), **where)
    return {"u": u, "ctx": public(ctx)}


def _oracle_given(o, config):
    ctx = _oracle_post_pre({**o, "norm_scale": None}, config)["ctx"]
    u = oracle.collapse(ctx.x, o["h_pre"])
    if o["norm_scale"] is not None:
        u = oracle.rms_norm(u, oracle.wide(o["norm_scale"]), NORM_SCALE_EPS)
    return {"u": u, "ctx": ctx}


def _run_sinkhorn(o, config, implementation, **_):
    h_res = jax_mhc.sinkhorn(o["logits"], config=config, implementation=implementation)
    return {"h_res": h_res}


def _run_head(o, config, implementation, **where):
    options = {"config": config, "implementation": implementation, **where}
    return {"u": jax_mhc.head(o["x"], o["params"], **options)}


def _run_residual(o, config, implementation, **where):
    def layer(u):
        wide = u.astype(o["gain"].dtype)
        gain = jax.lax.expand_dims(o["gain"], range(u.ndim - 1))
        return jnp.tanh(wide * gain).astype(u.dtype), jnp.mean(wide**2, axis=-1)

    options = {
        "config": config,
        "implementation": implementation,
        "has_aux": True,
        **norm(o),
        **where,
    }
    x_new, aux = jax_mhc.mhc_residual(layer, o["x"], o["params"], **options)
    return {"x_new": x_new, "aux": aux}


def _oracle_residual(o, config):
    u, _, h_post, h_res = oracle.pre(o["x"], o["params"], config, **norm(o))
    x_new = oracle.post(np.tanh(u * o["gain"]), o["x"], h_post, h_res)
    return {"x_new": x_new, "aux": np.mean(u**2, axis=-1)}


def _run_two_sublayers(o, config, implementation, **where):
    """Joined by the seam: its kernels, and pre's, get the cotangents of their streams deferred."""
    options = {"config": config, "implementation": implementation, **norm(o), **where}
    u, ctx = jax_mhc.pre(o["x"], o["params"], **options)
    u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, o["params"], **options)
    return {"u": u, "x_new": jax_mhc.post(o["y"], ctx, implementation=implementation)}


def _oracle_two_sublayers(o, config):
    u, _, *h = oracle.pre(o["x"], o["params"], config, **norm(o))
    x = oracle.post(np.tanh(u), o["x"], *h)
    u, _, *h = oracle.pre(x, o["params"], config, **norm(o))
    return {"u": u, "x_new": oracle.post(o["y"], x, *h)}


def _run_collapse(o, config, implementation, **_):
    return {"u": jax_mhc.collapse(o["x"], o["h_pre"], implementation=implementation)}


def _oracle_collapse(o, config):
    return {"u": oracle.collapse(o["x"], o["h_pre"])}


def _run_delayed(o, config, implementation, **where):
    """Two sublayers of the delayed schedule, amid others, and its exit."""
    config = dataclasses.replace(config, schedule="delayed")
    options = {"config": config, "implementation": implementation, **norm(o), **where}
    u, ctx = jax_mhc.pre(o["x"], o["params"], h_pre=o["h_pre"], **options)
    u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, o["params"], **options)
    x = jax_mhc.post(jnp.tanh(u), ctx, implementation=implementation)
    return {"u": jax_mhc.collapse(x, ctx.h_pre, implementation=implementation), "x_new": x}


def _oracle_delayed(o, config):
    x, h_pre = o["x"], o["h_pre"]
    for _ in range(2):
        u = oracle.collapse(x, h_pre)
        if o["norm_scale"] is not None:
            u = oracle.rms_norm(u, oracle.wide(o["norm_scale"]), NORM_SCALE_EPS)
        _, h_pre, h_post, h_res = oracle.pre(x, o["params"], config)
        x = oracle.post(np.tanh(u), x, h_post, h_res)
    return {"u": oracle.collapse(x, h_pre), "x_new": x}


def _is_birkhoff(case: str) -> bool:
    case = CASES[case]
    return case.config.constraint == "birkhoff" and not case.static and not case.norm


OPS = {
    "pre": Op(
        {"x": streams, "params": params, "norm_scale": norm_scale},
        _run_pre,
        _oracle_pre,
        ("pre",),
        ("x",),
    ),
    "post": Op(
        {"y": layer_output, "ctx": context},
        _run_post,
        _oracle_post,
        ("post",),
        ("y", "ctx"),
        # No settings enter here.
        lambda case: (
            CASES[case].config in (presets.PAPER, variant(constraint="none"))
            and not CASES[case].norm
        ),
    ),
    "post_pre": Op(
        {"y": layer_output, "ctx": context, "params": params, "norm_scale": norm_scale},
        _run_post_pre,
        _oracle_post_pre,
        ("post_pre",),
        ("y", "ctx"),
        lambda case: case in _COMPOSED,
    ),
    "post_pre_given": Op(
        {
            "y": layer_output,
            "ctx": context,
            "h_pre": h_pre,
            "params": params,
            "norm_scale": norm_scale,
        },
        _run_given,
        _oracle_given,
        ("post_pre",),
        ("y", "ctx", "h_pre"),
        lambda case: case in (*_SHAPES, *_PEAKED, "sixteen_streams", "static", "normalized", "hy4"),
    ),
    "sinkhorn": Op(
        {"logits": logits},
        _run_sinkhorn,
        lambda o, config: {"h_res": oracle.sinkhorn(o["logits"], config)},
        ("sinkhorn",),
        ("logits",),
        _is_birkhoff,
    ),
    "head": Op(
        {"x": streams, "params": head_params},
        _run_head,
        lambda o, config: {"u": oracle.head(o["x"], o["params"], config)},
        ("head",),
        ("x",),
        lambda case: case in (*_SHAPES, "sixteen_streams", "large_eps", "eps_outside"),
    ),
    "mhc_residual": Op(
        {"x": streams, "params": params, "gain": gain, "norm_scale": norm_scale},
        _run_residual,
        _oracle_residual,
        ("pre", "post"),
        ("x",),
        lambda case: (
            case
            in (
                *_SHAPES,
                "sixteen_streams",
                "peaked_10",
                "identity",
                "static",
                "normalized",
                "permutations",
            )
        ),
    ),
    "two_sublayers": Op(
        {"x": streams, "params": params, "y": layer_output, "norm_scale": norm_scale},
        _run_two_sublayers,
        _oracle_two_sublayers,
        ("pre", "post_pre", "post"),
        ("x", "y"),
        lambda case: (
            case
            in (
                *_SHAPES,
                "sixteen_streams",
                "peaked_3",
                "identity",
                "static",
                *NORMALIZED,
                "permutations",
                "permutations_three_streams",
            )
        ),
    ),
    "collapse": Op(
        {"x": streams, "h_pre": h_pre},
        _run_collapse,
        _oracle_collapse,
        ("collapse",),
        ("x", "h_pre"),
        lambda case: case in _SUMS,
    ),
    "delayed": Op(
        {"x": streams, "h_pre": h_pre, "params": params, "norm_scale": norm_scale},
        _run_delayed,
        _oracle_delayed,
        ("pre", "collapse", "post_pre", "post", "collapse"),
        ("x", "h_pre"),
        lambda case: case in (*_SUMS, "static", "normalized", "hy4", "permutations"),
        # Of the context that post_pre reads, for the cotangent of its streams.
        ("post",),
    ),
}

# The ops of one call.
KERNELS = [op for op in OPS if len(OPS[op].calls) == 1]

OP_CASES = [(op, case) for op in OPS for case in CASES if OPS[op].applies(case)]
PRECISION_OP_CASES = [
    (op, case, dtype)
    for op, case in OP_CASES
    for dtype, cases in _PRECISION.items()
    if case in cases and (op != "sinkhorn" or dtype == "float32")  # it has no half precision
]


def make_operands(op: str, case: Case, dtype: Any = WIDEST, draw: int = 0) -> dict[str, Any]:
    """The operands of an op for a case, for streams of `dtype`; the same for the same `draw`."""
    rng = np.random.default_rng(draw)
    made = {name: make(case, rng, dtype) for name, make in OPS[op].operands.items()}
    return jax.tree.map(jnp.asarray, made)


def make_cotangents(op: str, case: Case, dtype: Any = WIDEST, draw: int = 0) -> Any:
    """Random cotangents of an op's outputs."""
    rng = np.random.default_rng(1000 + draw)
    outputs = _outputs(op, case, jnp.dtype(dtype))
    return jax.tree.map(lambda out: jnp.asarray(_normal(rng, out.dtype, *out.shape)), outputs)


@functools.cache
def _outputs(op: str, case: Case, dtype: np.dtype) -> Any:
    """Shapes and dtypes of an op's outputs; to trace it takes longer than to draw its operands."""
    run = functools.partial(OPS[op].run, config=case.config, implementation="reference")
    return jax.eval_shape(run, make_operands(op, case, dtype))


def value_and_vjp(
    op: str, config: MHCConfig, implementation: str, operands: Any, cotangents: Any, **where: Any
):
    """The outputs of an op, and the gradients of all of its operands.

    where: the options of `jax_mhc.pre` for meshes.
    """
    outputs, vjp = jax.vjp(lambda o: OPS[op].run(o, config, implementation, **where), operands)
    return outputs, vjp(cotangents)[0]


# XLA may keep in float32 what plain JAX says is of half precision; the kernels do not.
AS_WRITTEN = {"xla_allow_excess_precision": False}

# What users get, whatever conftest.py chose for all tests. Plain JAX's errors, with which those of
# the kernels are compared, are those of optimized code.
FOR_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **programs.emitters(fusion=True),
}
compiled = jax.jit(value_and_vjp, static_argnums=(0, 1, 2), compiler_options=AS_WRITTEN | FOR_USERS)

# What is compared in float64 may run slowly: XLA's compiler for the CPU takes a sixth of the time.
FAST_COMPILATION = {"xla_backend_optimization_level": 0, **programs.QUICK_COMPILATION}
_quick_on_cpu = jax.jit(value_and_vjp, static_argnums=(0, 1, 2), compiler_options=FAST_COMPILATION)
quick = _quick_on_cpu if PLATFORM == "cpu" else compiled


def widened(arrays: Any) -> Any:
    """Arrays of a pytree in float64, on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), arrays)


def in_float64(function: Callable, *arrays: Any) -> Any:
    """Results of `function` of pytrees of arrays in float64 on the CPU; NumPy arrays."""
    # Where the CPU is the default, JAX would trace and compile again for a device of that name.
    on_cpu = contextlib.nullcontext() if PLATFORM == "cpu" else jax.default_device(CPU)
    with on_cpu:
        return widened(function(*widened(arrays)))


def exact(op: str, config: MHCConfig, operands: Any, cotangents: Any) -> tuple[Any, Any]:
    """Outputs and gradients: plain JAX in float64, on the CPU."""
    run = functools.partial(_quick_on_cpu, op, config, "reference")
    return in_float64(run, operands, cotangents)


@functools.cache
def evaluate(op: str, case: str, implementation: str) -> tuple[Any, Any]:
    """Outputs and gradients of a case: the kernels in `WIDEST`, plain JAX in float64."""
    dtype = WIDEST if implementation == "fused" else np.float64
    arrays = [make(op, CASES[case], dtype) for make in (make_operands, make_cotangents)]
    return quick(op, CASES[case].config, implementation, *arrays)


@functools.cache
def expected(op: str, case: str) -> tuple[Any, Any]:
    """Results that `evaluate` has to give for the kernels."""
    if PLATFORM == "cpu" and WIDEST == np.float64:
        return evaluate(op, case, "reference")
    return exact(
        op, CASES[case].config, make_operands(op, CASES[case]), make_cotangents(op, CASES[case])
    )


# ---- tolerances ---------------------------------------------------------------------------------

# Values and gradients in float64, relative to the largest entry of an array: the package's goal.
# The oracle, XLA and the kernels add in different orders, and gradients pass through 40 divisions.
FLOAT64 = 1e-12

# In lower precision errors are root mean squares over all entries of DRAWS draws of operands,
# relative to the largest entry: a single draw, or the largest error, would be left to chance.
DRAWS = 16

# The kernels may err this many times as much as plain JAX does in the same dtype.
ERROR_RATIO = 1.5


# The largest error of one draw, in units of the root mean square that `tolerance` bounds.
LARGEST = 32

# Unit roundoff of the streams' dtype.
ROUNDOFF = {d: float(jnp.finfo(d).eps) / 2 for d in ("float32", "bfloat16", "float16")}

# On a GPU the kernels may err by this much where that is more. Below two roundings of the largest
# entry the ratio is left to chance; and beside streams of half precision phi enters the tensor
# cores as the sum of two bfloat16, which leaves an error of up to 2⁻¹⁷ in every product.
LEAST_ERROR = {
    dtype: (2 * ROUNDOFF[dtype] if dtype == "float32" else 4e-6) if PLATFORM == "cuda" else 0.0
    for dtype in ROUNDOFF
}


def tolerance(case: Case, dtype: str, *, gradient: bool) -> float:
    """Error that plain JAX may make.

    Streams are rounded once on the way out. Coefficients are float32; they are sums over n C
    values (gradients of parameters: of all tokens), whose roundings add up like a random walk.
    Peaked logits are sigma times as large, and so are their roundings.
    """
    length = case.streams * case.hidden * (math.prod(case.tokens) if gradient else 1)
    return ROUNDOFF[dtype] + case.sigma * math.sqrt(length) * ROUNDOFF["float32"] / 4


def limit(case: Case, *, dtype: Any = WIDEST, gradient: bool = True, layers: int = 1) -> float:
    """Distance that the kernels may have from float64; `layers` add up."""
    if dtype == np.float64:
        return FLOAT64
    return LARGEST * layers * tolerance(case, jnp.dtype(dtype).name, gradient=gradient)


def leaf_name(path: Any) -> str:
    """The name of a leaf of a pytree, such as ctx.h_res."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def relative_error(actual: Any, expected: Any) -> float:
    """The largest error in units of the largest expected entry (of 1 where all are 0)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))


def assert_close(actual: Any, expected: Any, limit: float, name: str = "result") -> None:
    """`relative_error` is at most `limit`; NaN fails."""
    error = relative_error(actual, expected)
    assert error <= limit, f"{name}: relative error {error:.2e}, expected at most {limit:.2e}"


def assert_trees_close(actual: Any, expected: Any, limit: float, dtype: Any = WIDEST) -> None:
    """`assert_close` for each leaf of two pytrees of the same structure; `actual` has `dtype`."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in leaves:
        assert leaf.dtype == dtype
        assert_close(leaf, wanted, limit, leaf_name(path))


@functools.cache
def rounding_errors(op: str, case: str, dtype: str) -> dict[str, dict[str, float]]:
    """Errors of outputs and gradients against float64, by implementation and name; see `DRAWS`.

    Exact is what plain JAX computes in float64 from the same operands and cotangents.
    """
    config = CASES[case].config
    squares: dict[str, dict[str, list[float]]] = {"fused": {}, "reference": {}}
    largest: dict[str, float] = {}
    for draw in range(DRAWS):
        arrays = [
            make(op, CASES[case], jnp.dtype(dtype), draw)
            for make in (make_operands, make_cotangents)
        ]
        wanted_leaves = jax.tree.leaves(exact(op, config, *arrays))
        for implementation, errors in squares.items():
            actual = compiled(op, config, implementation, *arrays)
            leaves = zip(jax.tree.leaves_with_path(actual), wanted_leaves, strict=True)
            for (path, leaf), wanted in leaves:
                name = ("", "d_")[path[0].idx] + leaf_name(path[1:])
                error = np.asarray(leaf, np.float64) - wanted
                errors.setdefault(name, []).append(np.mean(np.square(error)))
                largest[name] = max(largest.get(name, 0.0), np.abs(wanted).max())
    return {
        implementation: {
            name: math.sqrt(np.mean(values)) / (largest[name] or 1.0)
            for name, values in errors.items()
        }
        for implementation, errors in squares.items()
    }
