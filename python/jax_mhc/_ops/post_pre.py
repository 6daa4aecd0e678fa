"""Post of one sublayer and pre of the next, in one pass over the streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax

from jax_mhc import _check, reference
from jax_mhc._call import Implementation, Settings, Values
from jax_mhc._ops import given
from jax_mhc._ops.deferred import (
    Cotangent,
    context,
    cotangents_of,
    d_streams_in,
    gradient,
    streams,
)
from jax_mhc._ops.fused_op import fused_call, fused_op, normalizers, present
from jax_mhc._ops.post import post
from jax_mhc._types import Context, MHCConfig, MHCParams
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float


def post_pre(
    y: Float[jax.Array, "*tokens C"],
    ctx: Context,
    params: MHCParams,
    *,
    config: MHCConfig = PAPER,
    norm_scale: Float[jax.Array, " C"] | None = None,
    norm_scale_eps: float = 1e-6,
    h_pre: Float[jax.Array, "*tokens n"] | None = None,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[jax.Array, "*tokens C"], Context]:
    """The seam between two sublayers: `post` of one, then `pre` of the next.

        X'[i] = Σ_j h_res[i, j] X[j] + h_post[i] · y
        u, ctx' = pre(X', params)

    with the new streams rounded to their dtype before pre reads them, so that it computes
    what `post` and `pre` compute one after the other, without reading them from memory again.
    On GPUs the backward pass may take an X' that is not rounded for the gradients of the
    parameters, and an infinity or NaN in one token may reach the gradients of x and y of the
    three tokens beside it (docs/kernels.md).

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
        h_pre: weights of the new streams in u `[..., n]` in place of their own; see `pre`. None
            with schedule "delayed": `ctx.h_pre`, those of the sublayer that y comes from.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: None, "fused" or "reference"; see `pre`.

    Returns:
        u `[..., C]`, the next layer's input, and the next context; its `.x` are the new streams.

    Raises:
        ValueError, TypeError, RuntimeError: what `post` and `pre` raise.
    """
    return run(
        "post_pre",
        y,
        ctx,
        params,
        config=config,
        norm_scale=norm_scale,
        norm_scale_eps=norm_scale_eps,
        h_pre=h_pre,
        hidden_axis_name=hidden_axis_name,
        implementation=implementation,
    )


def run(
    op: str,
    y: jax.Array,
    ctx: Context,
    params: MHCParams,
    *,
    config: MHCConfig,
    norm_scale: jax.Array | None,
    norm_scale_eps: float,
    h_pre: jax.Array | None,
    hidden_axis_name: str | Sequence[str] | None,
    implementation: Implementation,
    plain_post: Callable[[], jax.Array] | None = None,
) -> tuple[jax.Array, Context]:
    """post_pre, whose errors name `op`, and whose post in plain JAX may be given."""
    ctx = _check.context(op, ctx)
    y = _check.layer_output(op, "y", y, ctx.x)
    config = _check.config(op, config, ctx.x.dtype)
    axes = _check.hidden_axes(op, hidden_axis_name, ctx.x)
    phi, alpha, bias = _check.params(op, params, ctx.x, config, hidden_axes=axes)
    norm_scale, eps = _check.norm_scale(op, norm_scale, norm_scale_eps, ctx.x, hidden_axes=axes)
    deferred, x = streams(ctx)
    of_channels = ctx.h_post.ndim == x.ndim
    of_given = None
    if h_pre is None and config.schedule == "delayed":
        h_pre = _check.given_weights(op, ctx.h_pre, ctx.x, "ctx.h_pre")
    elif h_pre is not None:
        h_pre = _check.given_weights(op, h_pre, ctx.x)
    if h_pre is not None:
        norm_scale, of_given = None, norm_scale

    def plain() -> tuple[jax.Array, Context]:
        if of_channels or config.form != "mhc":
            x_new = post(y, ctx, implementation=implementation)
        else:
            x_new = reference.post(y, ctx) if plain_post is None else plain_post()
        return reference.pre(
            x_new,
            MHCParams(phi, alpha, bias),
            config=config,
            norm_scale=norm_scale,
            norm_scale_eps=eps,
            h_pre=h_pre,
        )

    u, ctx_new = _post_pre(
        present(
            x=x,
            y=y,
            h_post=ctx.h_post,
            h_res=ctx.h_res,
            phi=phi,
            alpha=alpha,
            bias=bias,
            norm_scale=norm_scale,
            h_given=h_pre,
        ),
        Settings(config, eps, axes, defers=deferred),
        "reference" if of_channels else implementation,
        plain,
    )
    return given.normalized(u, of_given, eps, axes), ctx_new


def _forward(operands: Values, results: Values) -> tuple[tuple[jax.Array, Context], Values]:
    ctx = context(results["x_new"], results)
    kept = normalizers(results)
    if "norm_scale" in operands:
        # The layer keeps u, too.
        kept["u_norm"] = results["u"]
    return (results["u"], ctx), operands | kept | {"h_res_new": results["h_res"]}


def _backward(settings: Settings, saved: Values, cotangents: tuple[Cotangent, Context]) -> Values:
    d_u, d_ctx = cotangents
    d_x_new_in, deferred = d_streams_in(d_ctx, saved["h_res_new"])
    gradients = fused_call(
        "post_pre_bwd",
        settings,
        saved | cotangents_of(d_u, d_ctx) | {"d_x_new_in": d_x_new_in},
        deferred=deferred,
    )
    d_x_new = gradients.pop("d_x_new")
    return gradients | {"d_x": gradient(settings.defers, d_x_new, saved["h_res"])}


_post_pre = fused_op("post_pre", _forward, _backward)
