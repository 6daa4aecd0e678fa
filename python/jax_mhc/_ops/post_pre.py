"""Post of one sublayer and pre of the next, in one pass over the streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jax_mhc import _check, reference
from jax_mhc._call import Implementation, Settings, Values, use_fused
from jax_mhc._ops.deferred import d_x_in, gradient, streams
from jax_mhc._ops.fused_op import fused_call, fused_op, named
from jax_mhc._ops.params import operands_of
from jax_mhc._ops.pre import KEPT, context_of, cotangents_of
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
        defers, x = streams(ctx)
        operands = {"x": x, "y": y, "h_post": ctx.h_post, "h_res": ctx.h_res}
        operands |= operands_of(phi, alpha, bias, norm_scale)
        settings = Settings(config, eps, axes, implementation == "fused", defers)
        results = _post_pre(op, settings, operands)
        return results["u"], context_of(results)


def _forward(settings: Settings, operands: Values) -> tuple[Values, Values]:
    got = named(fused_call("post_pre_fwd", settings, operands))
    results = {name: got[name] for name in ("u", "h_pre", "h_post", "h_res")}
    results |= {"x": got["x_new"], "deferred": got["x_new"]}
    kept = operands | {name: got[name] for name in KEPT if name in got}
    kept["h_res_new"] = got["h_res"]
    if "norm_scale" in operands:
        # The layer keeps its input, too.
        kept["u_norm"] = got["u"]
    return results, kept


def _backward(settings: Settings, kept: Values, cotangents: dict[str, Any]) -> Values:
    d_x_new, deferred = d_x_in(cotangents["x"], cotangents["deferred"], kept["h_res_new"])
    operands = kept | {"d_x_new_in": d_x_new} | cotangents_of(cotangents)
    got = fused_call("post_pre_bwd", settings, operands, deferred=deferred)
    d_x = gradient(settings.defers, got.pop("d_x_new"), kept["h_res"])
    return {"x": d_x} | {name.removeprefix("d_"): value for name, value in got.items()}


_post_pre = fused_op(_forward, _backward)
