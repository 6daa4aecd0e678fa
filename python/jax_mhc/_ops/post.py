"""Depth connection: the streams after a sublayer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from jax_mhc import _check, reference
from jax_mhc._call import Implementation, Settings, Values
from jax_mhc._ops.deferred import Cotangent, gradient, instantiate, streams
from jax_mhc._ops.fused_op import fused_call, fused_op
from jax_mhc._types import Context

if TYPE_CHECKING:
    from jaxtyping import Float


def post(
    y: Float[jax.Array, "*tokens C"], ctx: Context, *, implementation: Implementation = None
) -> Float[jax.Array, "*tokens n C"]:
    """The streams after a sublayer (equation 3).

        X'[i] = Σ_j h_res[i, j] X[j] + h_post[i] · y

    `h_res[i, j]` is the weight of stream j in new stream i. Source: arXiv 2512.24880.

    Sums are float32 (float64 for float64 streams) and rounded once. Differentiable with respect to
    y and all of ctx but h_pre (which does not enter), in reverse mode of first order (the
    reference: in every mode); the backward pass keeps y and ctx. It is fastest with a context as
    the fused `pre` or `post_pre` returned it; see `Context`. The result is named "mhc_streams" for
    `jax.checkpoint` policies. Under `jax.vmap` this is one call with one more leading dimension.

    Args:
        y: the layer's output `[..., C]`, of the streams' dtype.
        ctx: the context that `pre` or `post_pre` returned.
        implementation: None, "fused" or "reference"; see `pre`.

    Returns:
        The new streams `[..., n, C]`.

    Raises:
        ValueError, TypeError: y or ctx of shapes or dtypes that do not fit, and what `pre` raises.
        RuntimeError: the kernels cannot be used; see `pre`.
    """
    op = "post"
    ctx = _check.context(op, ctx)
    y = _check.layer_output(op, "y", y, ctx.x)
    deferred, x = streams(ctx)
    return _post(
        {"x": x, "y": y, "h_post": ctx.h_post, "h_res": ctx.h_res},
        Settings(defers=deferred),
        implementation,
        lambda: reference.post(y, ctx),
    )


def _forward(operands: Values, results: Values) -> tuple[jax.Array, Values]:
    return results["x_new"], operands


def _backward(settings: Settings, saved: Values, d_x_new: Cotangent) -> Values:
    d_x_new = instantiate(d_x_new)
    d_x = gradient(settings.defers, d_x_new, saved["h_res"])
    return {"d_x": d_x} | fused_call("post_bwd", settings, saved | {"d_x_new": d_x_new})


_post = fused_op("post", _forward, _backward)
