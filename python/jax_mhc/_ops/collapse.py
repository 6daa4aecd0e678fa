"""The sum over the streams with weights that are given: the exit of the delayed schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from jax_mhc import _check, reference
from jax_mhc._axes import varying_axes
from jax_mhc._call import Implementation, Settings, Values
from jax_mhc._mesh.types import sharded_like
from jax_mhc._ops.deferred import Cotangent, instantiate
from jax_mhc._ops.fused_op import fused_call, fused_op
from jax_mhc._ops.streams import Streams

if TYPE_CHECKING:
    from jaxtyping import Float


def collapse(
    x: Float[jax.Array, "*tokens n C"] | Streams,
    h_pre: Float[jax.Array, "*tokens n"] | None = None,
    *,
    implementation: Implementation = None,
) -> Float[jax.Array, "*tokens C"]:
    """The sum of the streams with given weights: the exit of DeepSeek-V4.1.

        u = Σ_i h_pre[i] X[i]                    [D3] of docs/mathematics.md

    Where Streams are given alone, the weights are the h_pre of their last sublayer, which ends the
    delayed schedule; of streams before the first sublayer that is stream 0.

    Sums are float32 (float64 for float64 streams); u is rounded once. Differentiable with respect
    to x and h_pre, in reverse mode of first order (the reference: in every mode); the backward pass
    keeps both. Name for `jax.checkpoint` policies: "mhc_layer_input". Under `jax.vmap` this is one
    call with one more leading dimension.

    Args:
        x: the streams `[..., n, C]` or `Streams`, n from 1 to 16: float32, bfloat16, float16,
            float64 (in plain JAX on GPUs).
        h_pre: the weights `[..., n]`; float32, or float64 for float64 streams. None: those that
            `Streams` carry.
        implementation: None, "fused" or "reference"; see `pre`. None is plain JAX for Streams that
            were made for it.

    Returns:
        u `[..., C]`, of x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: an array without weights; weights of another shape or
            dtype; what `pre` raises.
    """
    op = "collapse"
    _check.implementation(op, implementation)
    if isinstance(x, Streams):
        if implementation is None and not x.is_deferred:
            implementation = "reference"
        h_pre = x.h_pre if h_pre is None else h_pre
        x = x.array(implementation=implementation)
    x = _check.streams(op, "x", x)
    h_pre = _check.given_weights(op, h_pre, x)
    return _collapse(
        {"x": x, "h_pre": h_pre},
        Settings(),
        implementation,
        lambda: reference.collapse(x, h_pre),
    )


def d_weights(settings: Settings, x: jax.Array, d_u: jax.Array, h_pre: jax.Array) -> jax.Array:
    """The gradient of the weights, <d_u, X[i]>, of their type."""
    d_h_pre = fused_call("collapse_bwd", settings, {"x": x, "d_u": d_u})["d_h_pre"]
    # The call does not know over which axes of a shard_map the weights do not vary.
    missing = varying_axes(d_h_pre) - varying_axes(h_pre)
    if missing:
        names = jax.typeof(x).sharding.mesh.axis_names
        d_h_pre = jax.lax.psum(d_h_pre, tuple(name for name in names if name in missing))
    return sharded_like(d_h_pre, h_pre)


def d_streams(d_u: jax.Array, h_pre: jax.Array, x: jax.Array) -> jax.Array:
    """The gradient of the streams, h_pre[i] d_u, of their type."""
    d_x = h_pre[..., None] * d_u.astype(h_pre.dtype)[..., None, :]
    return sharded_like(d_x.astype(x.dtype), x)


def _forward(operands: Values, results: Values) -> tuple[jax.Array, Values]:
    return results["u"], operands


def _backward(settings: Settings, saved: Values, d_u: Cotangent) -> Values:
    x, h_pre, d_u = saved["x"], saved["h_pre"], instantiate(d_u)
    return {"d_x": d_streams(d_u, h_pre, x), "d_h_pre": d_weights(settings, x, d_u, h_pre)}


_collapse = fused_op("collapse", _forward, _backward)
