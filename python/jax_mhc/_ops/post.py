"""Depth connection: the streams after a sublayer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from jax_mhc import _check, reference
from jax_mhc._call import Implementation, Settings, Values, reverse_mode_only
from jax_mhc._errors import Refusal
from jax_mhc._ops.deferred import Cotangent, gradient, instantiate, post_deferred, streams
from jax_mhc._ops.fused_op import fused_call, fused_op
from jax_mhc._types import Context

if TYPE_CHECKING:
    from jaxtyping import Float


def post(
    y: Float[jax.Array, "*tokens C"],
    ctx: Context,
    *,
    bias: Float[jax.Array, " C"] | None = None,
    implementation: Implementation = None,
) -> Float[jax.Array, "*tokens n C"]:
    """The streams after a sublayer (equation 3).

        X'[i] = Σ_j h_res[i, j] X[j] + h_post[i] · (y + bias)

    `h_res[i, j]` is the weight of stream j in new stream i. Source: arXiv 2512.24880.

    Sums are float32 (float64 for float64 streams) and rounded once. y + bias is not rounded, nor is
    what the gradient of the bias sums up, Σ_i h_post[i] d_X'[i], which becomes d_y; a layer of half
    precision that adds its bias itself rounds both. Differentiable with respect to y, bias and all
    of ctx but h_pre (which does not enter), in reverse mode of first order (the reference: in every
    mode); the backward pass keeps y and ctx. It is fastest with a context as the fused `pre` or
    `post_pre` returned it; see `Context`. The result is named "mhc_streams" for `jax.checkpoint`
    policies. Under `jax.vmap` this is one call with one more leading dimension.

    Args:
        y: the layer's output `[..., C]`, of the streams' dtype.
        ctx: the context that `pre` or `post_pre` returned.
        bias: of the layer's output `[C]`, of the parameters' dtype; with y, of the channels of one
            device where `jax.shard_map` splits C. None: the layer has none, or has added it. In
            `mhc_residual` and `stack` layers do that.
        implementation: None, "fused" or "reference"; see `pre`. With a bias and streams of half
            precision None is plain JAX, and "fused" is refused: no kernel takes a y that is not
            rounded.

    Returns:
        The new streams `[..., n, C]`.

    Raises:
        ValueError, TypeError: y, bias or ctx of shapes or dtypes that do not fit, and what `pre`
            raises.
        RuntimeError: the kernels cannot be used; see `pre`.
    """
    op = "post"
    ctx = _check.context(op, ctx)
    y = _check.layer_output(op, "y", y, ctx.x)
    deferred, x = streams(ctx)
    if bias is not None:
        bias = _check.output_bias(op, bias, y)
        y = y.astype(bias.dtype) + reference.for_tokens(bias, y)
    if y.dtype != x.dtype or ctx.h_post.ndim == x.ndim:
        return _plain(y, x, ctx, implementation, deferred=deferred)
    return _post(
        {"x": x, "y": y, "h_post": ctx.h_post, "h_res": ctx.h_res},
        Settings(defers=deferred),
        implementation,
        lambda: reference.post(y, ctx),
    )


def _plain(
    y: jax.Array, x: jax.Array, ctx: Context, implementation: Implementation, *, deferred: bool
) -> jax.Array:
    """What has no kernel: a y in the dtype of sums, or an h_post of channels.

    x: the streams of `ctx`, whose cotangent may be deferred.
    """
    op = "post"
    _check.implementation(op, implementation)
    if implementation == "fused":
        biased = y.dtype != x.dtype
        raise Refusal(ValueError, op, "implementation='fused'").expected(
            f"no bias beside {x.dtype.name} streams" if biased else "an h_post [..., n] of streams",
            "one" if biased else f"one of channels, {list(ctx.h_post.shape)}",
            "Leave implementation out: this runs in plain JAX, whatever pre runs in.",
        )
    with jax.named_scope("mhc_post"):
        if not deferred:
            return reference.post(y, ctx)
        x, others = reverse_mode_only(op, x, (y, ctx.h_post, ctx.h_res))
        return post_deferred(x, *others)


def _forward(operands: Values, results: Values) -> tuple[jax.Array, Values]:
    return results["x_new"], operands


def _backward(settings: Settings, saved: Values, d_x_new: Cotangent) -> Values:
    d_x_new = instantiate(d_x_new)
    d_x = gradient(settings.defers, d_x_new, saved["h_res"])
    return {"d_x": d_x} | fused_call("post_bwd", settings, saved | {"d_x_new": d_x_new})


_post = fused_op("post", _forward, _backward)
