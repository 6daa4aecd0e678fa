"""The input of a first layer with weights that are given, and the norm of any such input.

    u = Σ_i h_given[i] X[i]

post_pre has calls with such weights. pre, which runs once a model, has none: its call makes the
coefficients, and a u of its own that nobody reads; `collapse` makes this one of the same streams.
So u, and all that follows of it, does not enter the call's backward pass but by the gradient of the
streams that it adds to:

    d_h_given[i] = <d_u, X[i]>
    d_X_in[j]    = Σ_i h_res[i, j] G[i] + h_given[j] d_u

which has the form of post, with h_resᵀ for h_res, h_given for h_post and d_u for y, and runs in its
kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_mhc import reference
from jax_mhc._call import Settings, Values
from jax_mhc._check import accumulation_dtype
from jax_mhc._mesh.manual import own_part
from jax_mhc._mesh.types import sharded_like
from jax_mhc._ops.collapse import d_streams, d_weights
from jax_mhc._ops.deferred import Cotangent, d_streams_in
from jax_mhc._ops.fused_op import fused_call, named_call
from jax_mhc._types import Context


def pre_forward(settings: Settings, operands: Values) -> Values:
    """The call pre_fwd, whose u is that of h_given where there is one."""
    given, own = _parted(operands)
    results = named_call("pre_fwd", settings, own)
    if given is None:
        return results
    return results | named_call("collapse_fwd", settings, {"x": operands["x"], "h_pre": given})


class Incoming(NamedTuple):
    """Operands of the call pre_bwd, and what is no part of it.

    Attributes:
        saved: what was saved for the call.
        d_u: the cotangent of the u that the call makes.
        d_x: the cotangent of the streams that it adds to.
        deferred: whether that is.
        gradients: those that the call does not return.
    """

    saved: Values
    d_u: Cotangent
    d_x: jax.Array
    deferred: bool
    gradients: Values


def incoming(settings: Settings, saved: Values, d_u: Cotangent, d_ctx: Context) -> Incoming:
    """The cotangents that pre_bwd takes.

    Args:
        settings: those of the op.
        saved: what its forward pass kept.
        d_u: the cotangent of the layer's input.
        d_ctx: that of the context.
    """
    given, own = _parted(saved)
    if given is None:
        return Incoming(own, d_u, *d_streams_in(d_ctx, own["h_res"]), {})
    x = own["x"]
    if isinstance(d_u, SymbolicZero):
        zero = {"d_h_given": sharded_like(jnp.zeros_like(given), given)}
        return Incoming(own, d_u, *d_streams_in(d_ctx, own["h_res"]), zero)
    gradients = {"d_h_given": d_weights(settings, x, d_u, given)}
    # Types say that a context has arrays; those of cotangents have symbolic zeros beside them.
    d_x: Cotangent = d_ctx.x
    d_deferred: Cotangent | None = d_ctx._deferred
    if isinstance(d_x, SymbolicZero) and isinstance(d_deferred, jax.Array):
        as_post = {
            "x": d_deferred,
            "y": d_u,
            "h_post": given,
            "h_res": jnp.swapaxes(own["h_res"], -1, -2),
        }
        of_all = fused_call("post_fwd", settings, as_post)["x_new"]
    else:
        of_all, _ = d_streams_in(d_ctx, own["h_res"])
        of_all = of_all + d_streams(d_u, given, x)
    return Incoming(own, jnp.zeros_like(d_u), of_all, False, gradients)


def normalized(
    u: jax.Array, scale: jax.Array | None, eps: float, hidden_axes: tuple[str, ...]
) -> jax.Array:
    """The norm of a layer's input that no call computes.

    hidden_axes: the manual axes over which C is sharded; scale has all channels.
    """
    if scale is None:
        return u

    # The backward pass keeps u, and computes again what is float32.
    @jax.checkpoint
    def norm(u: jax.Array, scale: jax.Array) -> jax.Array:
        wide = u.astype(accumulation_dtype(u.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        if hidden_axes:
            mean_square = jax.lax.pmean(mean_square, hidden_axes)
            scale = own_part(scale, hidden_axes, 0)
        return reference.scaled_norm(wide, scale, mean_square + eps).astype(u.dtype)

    return checkpoint_name(norm(u, scale), "mhc_layer_input")


def _parted(values: Values) -> tuple[jax.Array | None, Values]:
    """The weights that are given, if any, and all other values."""
    return values.get("h_given"), {k: v for k, v in values.items() if k != "h_given"}
