"""Programs of a sublayer and of a stack of them, their inputs, and a check of their results."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jax_mhc as mhc
from jax_mhc._measure import plain, times, traffic
from jax_mhc._types import Context

# fwd: pre and post, or a head. fb: the same and all gradients, that of the new streams donated.
# stack: forward and gradients of a stack of sublayers, whose layers return what they read.
What = Literal["fwd", "fb", "stack"]
Dtype = Literal["bfloat16", "float16", "float32"]
Constraint = Literal["birkhoff", "none", "identity", "permutations", "static", "head"]

CHECKED_TOKENS = 19
# Place of the gradient of the new streams among the inputs: programs overwrite it with that of x.
DONATED = 4
# Largest relative L2 error by dtype, of streams and of gradients of parameters: what is above is
# wrong. The tests look closer.
LIMITS = {"bfloat16": (4e-3, 5e-3), "float16": (6e-4, 1e-3), "float32": (2e-5, 1e-4)}

# The public ops, running the fused kernels. The module `jax_mhc.reference` has the same functions.
FUSED = types.SimpleNamespace(
    **{
        name: functools.partial(getattr(mhc, name), implementation="fused")
        for name in mhc.reference.__all__
    }
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration of a sublayer, or of a head."""

    streams: int
    hidden: int
    tokens: int
    dtype: Dtype = "bfloat16"
    constraint: Constraint = "birkhoff"
    norm: bool = False

    @property
    def config(self) -> mhc.MHCConfig:
        """The settings: the paper's, with this constraint."""
        if self.constraint == "static" or self.constraint == "head":
            return mhc.presets.PAPER
        return mhc.MHCConfig(constraint=self.constraint)

    @property
    def plain_ops(self) -> Any:
        """The ops in the form of plain JAX that is fastest on GPUs; `reference` is on CPUs."""
        return plain if self.constraint in ("birkhoff", "head") else mhc.reference

    def __str__(self) -> str:
        """Returns one line of a list."""
        norm = "norm" if self.norm else ""
        sizes = f"n={self.streams:2d} C={self.hidden:5d} T={self.tokens:6d}"
        return f"{sizes} {self.dtype:8s} {self.constraint:12s} {norm:4s}"


def shapes(case: Case) -> tuple[Any, ...]:
    """Types of x, y, params, d_u, d_x_new and the options of pre."""
    n, hidden, tokens = case.streams, case.hidden, case.tokens
    of: Any = jax.ShapeDtypeStruct
    num = n if case.constraint == "head" else case.config.num_coefficients(n)
    gates = of((1 if case.constraint == "head" else case.config.num_gates(),), "float32")
    phi, bias = of((n * hidden, num), "float32"), of((num,), "float32")
    params: Any = mhc.MHCParams(phi, gates, bias)
    if case.constraint == "head":
        params = mhc.HeadParams(phi, gates, bias)
    elif case.constraint == "static":
        params = mhc.MHCParams(None, None, bias)
    x, y = of((tokens, n, hidden), case.dtype), of((tokens, hidden), case.dtype)
    norm = {"norm_scale": of((hidden,), "float32")} if case.norm else {}
    return x, y, params, y, x, norm


def inputs(case: Case) -> Callable[[jax.Array], tuple[Any, ...]]:
    """A function of a key that makes random ones."""

    def make(key: jax.Array) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten(shapes(case))
        made = []
        for own, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True):
            is_phi = leaf.shape[0] == case.streams * case.hidden and leaf.dtype == jnp.float32
            scale = leaf.shape[0] ** -0.5 if is_phi and len(leaf.shape) == 2 else 1.0
            made.append(
                (scale * jax.random.normal(own, leaf.shape, jnp.float32)).astype(leaf.dtype)
            )
        return jax.tree.unflatten(structure, made)

    return make


def forward(ops: Any, x: Any, y: Any, params: Any, **options: Any) -> tuple[Any, Any]:
    """pre, with its options, and post of a sublayer whose layer returns y whatever it reads."""
    u, ctx = ops.pre(x, params, **options)
    # Where the layer would be, so that XLA does not fuse across it. Without the streams, or their
    # gradients that are missing would be arrays of zeros.
    coefficients = ctx.h_pre, ctx.h_post, ctx.h_res
    u, y, coefficients = jax.lax.optimization_barrier((u, y, coefficients))
    return u, ops.post(y, Context._of(ctx.x, ctx._deferred, *coefficients))


def gradients(
    ops: Any, x: Any, y: Any, params: Any, d_u: Any, d_x_new: Any, **options: Any
) -> dict[str, Any]:
    """The same, and the gradients of x, y, params and the options.

    These come first, so that a d_x_new that is donated becomes d_x.
    """
    results, vjp = jax.vjp(
        lambda x, y, params, options: forward(ops, x, y, params, **options), x, y, params, options
    )
    results, d_u, d_x_new = jax.lax.optimization_barrier((results, d_u, d_x_new))
    return {"gradients": vjp((d_u, d_x_new)), "results": results}


def program(case: Case, ops: Any, what: What, sublayers: int = 4) -> Callable[..., Any]:
    """A function of the inputs; sublayers: those of the stack."""
    # The functions of plain.py take no config: they have that of the paper.
    config: dict[str, Any] = {} if ops is plain else {"config": case.config}

    def head(x: Any, y: Any, params: Any, d_u: Any, d_x_new: Any, norm: Any) -> Any:
        u, vjp = jax.vjp(lambda x, params: ops.head(x, params, **config), x, params)
        return u if what == "fwd" else {"gradients": vjp(d_u), "results": u}

    def sublayer(x: Any, y: Any, params: Any, d_u: Any, d_x_new: Any, norm: Any) -> Any:
        own = types.SimpleNamespace(pre=functools.partial(ops.pre, **config), post=ops.post)
        if what == "fwd":
            return forward(own, x, y, params, **norm)
        return gradients(own, x, y, params, d_u, d_x_new, **norm)

    def run_fused(x: Any, params: Any, norm: Any) -> Any:
        layers = [jax.lax.optimization_barrier] * sublayers
        scales = [norm["norm_scale"]] * sublayers if norm else None
        params = [params] * sublayers
        return mhc.stack(layers, x, params, norm_scale=scales, implementation="fused", **config)

    def run_plain(x: Any, params: Any, norm: Any) -> Any:
        for _ in range(sublayers):
            u, ctx = ops.pre(x, params, **config, **norm)
            x = ops.post(jax.lax.optimization_barrier(u), ctx)
        return x

    def stack(x: Any, y: Any, params: Any, d_u: Any, d_x_new: Any, norm: Any) -> Any:
        run = run_fused if ops is FUSED else run_plain
        x_new, vjp = jax.vjp(lambda x, params: run(x, params, norm), x, params)
        return x_new, vjp(d_x_new)

    return head if case.constraint == "head" else stack if what == "stack" else sublayer


def compile_program(case: Case, ops: Any, what: What, sublayers: int = 4) -> Any:
    """The same, compiled."""
    run = jax.jit(program(case, ops, what, sublayers), donate_argnums=DONATED)
    return run.lower(*shapes(case)).compile()


def floor_us(case: Case, what: What, bytes_per_us: float, sublayers: int = 4) -> float:
    """Time in which the bytes that must move are copied."""
    if case.constraint == "head":
        forward, backward = traffic.of_head(case.streams)
    else:
        sublayers = sublayers if what == "stack" else 1
        forward, backward = traffic.of_stack(case.streams, sublayers)
    u = forward if what == "fwd" else forward + backward
    return u * case.tokens * case.hidden * jnp.dtype(case.dtype).itemsize / bytes_per_us


def errors(case: Case) -> tuple[float, float]:
    """Largest relative errors of the kernels on a few tokens, of streams and of parameters'.

    They are against float64, computed on the CPU where JAX has it.
    """
    few = dataclasses.replace(case, tokens=CHECKED_TOKENS)
    arguments = jax.jit(inputs(few))(jax.random.key(1))
    got = jax.jit(program(few, FUSED, "fb"))(*arguments)
    with jax.default_device(_device_for_float64()), jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a).astype(np.float64)), arguments)
        # Without optimizations: compiles in half the time.
        quick = {"xla_backend_optimization_level": 0}
        run = jax.jit(program(few, mhc.reference, "fb"), compiler_options=quick)
        exact = jax.tree.map(np.asarray, run(*wide))
    largest = [0.0, 0.0]
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    for leaf, wanted in pairs:
        of_parameters = leaf.dtype == jnp.float32 and leaf.shape[0] != CHECKED_TOKENS
        error = times.relative_error(leaf, wanted)
        # NaN stays.
        largest[of_parameters] = max(error, largest[of_parameters]) if error >= 0 else error
    return largest[0], largest[1]


def _device_for_float64() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # jax_platforms leaves it out
        return jax.local_devices()[0]


def above_limits(case: Case, found: tuple[float, float]) -> str | None:
    """A complaint about errors that are too large; NaN is."""
    limits = LIMITS[case.dtype]
    if all(error <= most for error, most in zip(found, limits, strict=True)):
        return None
    told = " and ".join(f"{error:.1e}" for error in found)
    return f"errors of streams and parameters {told}, at most {limits}"
