"""Depth connection: the streams after a sublayer."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_mhc import _check, reference
from jax_mhc._call.dispatch import (
    Implementation,
    Settings,
    fused_call,
    reverse_mode_only,
    use_fused,
)
from jax_mhc._ops.deferred import gradient, streams
from jax_mhc._types import Context


def post(y: jax.Array, ctx: Context, *, implementation: Implementation = None) -> jax.Array:
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
    with jax.named_scope("mhc_post"):
        if not use_fused(op, implementation, ctx.x.dtype):
            return reference.post(y, ctx)
        deferred, x = streams(ctx)
        settings = Settings(fused=implementation == "fused")
        return _post(settings, deferred, *reverse_mode_only(op, x, y, ctx.h_post, ctx.h_res))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _post(settings: Settings, deferred: bool, *operands: Any) -> Any:
    return _post_fwd(settings, deferred, *operands)[0]


def _post_fwd(settings: Settings, deferred: bool, *operands: Any) -> Any:
    (x_new,) = fused_call("post_fwd", settings, *operands)
    return checkpoint_name(x_new, "mhc_streams"), operands


def _post_bwd(settings: Settings, deferred: bool, saved: Any, d_x_new: Any) -> Any:
    d_x = gradient(deferred, d_x_new, h_res=saved[-1])
    return d_x, *fused_call("post_bwd", settings, *saved, d_x_new)


_post.defvjp(_post_fwd, _post_bwd)
