"""Post of one sublayer and pre of the next, in one pass over the streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_mhc import _check, reference
from jax_mhc._call.dispatch import (
    Implementation,
    Settings,
    fused_call,
    reverse_mode_only,
    use_fused,
)
from jax_mhc._ops.deferred import gradient, handed_on, instantiate, streams
from jax_mhc._ops.kept import keep, named, restore
from jax_mhc._ops.pre import dense
from jax_mhc._types import Context, MHCConfig, MHCParams
from jax_mhc.presets import PAPER


def post_pre(
    y: jax.Array,
    ctx: Context,
    params: MHCParams,
    *,
    config: MHCConfig = PAPER,
    norm_scale: jax.Array | None = None,
    norm_scale_eps: float = 1e-6,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
) -> tuple[jax.Array, Context]:
    """The seam between two sublayers: `post` of one, then `pre` of the next.

        X'[i] = Σ_j h_res[i, j] X[j] + h_post[i] · y
        u, ctx' = pre(X', params)

    with the new streams rounded to their dtype before pre reads them, so that it computes
    what `post` and `pre` compute one after the other, without reading them from memory again.
    On GPUs the backward pass may take an X' that is not rounded for the gradients of the
    parameters, and an infinity or NaN in one token may reach the gradients of x and y of the
    three tokens beside it (docs/architecture.md).

    Differentiable as the two are. The backward pass keeps x, y, the coefficients of both sublayers
    and, with norm_scale, u, and computes X' again inside its kernel. Names for `jax.checkpoint`
    policies: "mhc_streams" (X'), "mhc_layer_input" and "mhc_coefficients". For `jax.vmap` see
    `pre`.

    Args:
        y: the layer's output `[..., C]`, of the streams' dtype.
        ctx: the context of the sublayer that y comes from.
        params: parameters of the next sublayer.
        config: settings of the next sublayer.
        norm_scale: of the norm that the next layer begins with `[C]`, or None; see `pre`.
        norm_scale_eps: its eps.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: None, "fused" or "reference"; see `pre`.

    Returns:
        u `[..., C]`, the next layer's input, and the next context; its `.x` are the new streams.

    Raises:
        ValueError, TypeError, RuntimeError: what `post` and `pre` raise.
    """
    op = "post_pre"
    ctx = _check.context(op, ctx)
    y = _check.layer_output(op, "y", y, ctx.x)
    config = _check.config(op, config, ctx.x.dtype)
    axes = _check.hidden_axes(op, hidden_axis_name, ctx.x)
    phi, alpha, bias = _check.params(op, params, ctx.x, config, hidden_axes=axes)
    norm_scale, eps = _check.norm_scale(op, norm_scale, norm_scale_eps, ctx.x, hidden_axes=axes)
    with jax.named_scope("mhc_post_pre"):
        if not use_fused(op, implementation, ctx.x.dtype, axes):
            return reference.post_pre(
                y, ctx, MHCParams(phi, alpha, bias), config=config,
                norm_scale=norm_scale, norm_scale_eps=eps,
            )  # fmt: skip
        deferred, x = streams(ctx)
        params_and_scale = dense(phi, alpha, bias, norm_scale, x, axes)
        operands = (x, y, ctx.h_post, ctx.h_res, *params_and_scale)
        settings = Settings(config, eps, axes, implementation == "fused")
        u, *context = _post_pre(settings, deferred, *reverse_mode_only(op, *operands))
        return u, Context._of(*context)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _post_pre(settings: Settings, deferred: bool, *operands: Any) -> Any:
    return _run(settings, *operands)[0]


def _run(settings: Settings, *operands: Any) -> Any:
    x_new, u, *coefficients = fused_call("post_pre_fwd", settings, *operands)
    x_new = checkpoint_name(x_new, "mhc_streams")
    u = checkpoint_name(u, "mhc_layer_input")
    h_pre, h_post, h_res, *others = named(coefficients, "mhc_coefficients")
    *_, norm_scale = operands
    kept = keep((*operands, *others, u_norm(u, norm_scale), h_res))
    return (u, x_new, x_new, h_pre, h_post, h_res), kept


def u_norm(u: Any, norm_scale: Any) -> Any:
    """What the backward pass wants of u, which the layer keeps too: all, if there is a norm."""
    return u if norm_scale.shape[0] else jnp.zeros((*u.shape[:-1], 0), u.dtype)


def _post_pre_fwd(settings: Settings, deferred: bool, *operands: Any) -> Any:
    return _run(settings, *(operand.value for operand in operands))


def _post_pre_bwd(settings: Settings, deferred: bool, saved: Any, cotangents: Any) -> Any:
    saved = restore(saved)
    d_u, d_x_new, d_deferred, *d_h = cotangents
    _, _, _, h_res, *_, h_res_new = saved
    d_x_new_in, deferred_new = handed_on(d_x_new, d_deferred, h_res_new)
    others = map(instantiate, (d_u, *d_h))
    d_x_new, *gradients = fused_call(
        "post_pre_bwd", settings, *saved, *others, d_x_new_in, deferred=deferred_new
    )
    return gradient(deferred, d_x_new, h_res), *gradients


_post_pre.defvjp(_post_pre_fwd, _post_pre_bwd, symbolic_zeros=True)
