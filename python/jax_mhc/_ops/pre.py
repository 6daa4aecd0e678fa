"""Width connection: coefficients of a sublayer, and the layer's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from jax_mhc import _check, reference
from jax_mhc._call import Implementation, Settings, Values
from jax_mhc._ops import given, post_pre
from jax_mhc._ops.deferred import Cotangent, context, cotangents_of
from jax_mhc._ops.fused_op import fused_call, fused_op, normalizers, present
from jax_mhc._ops.streams import Streams
from jax_mhc._types import Context, MHCConfig, MHCParams
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float


def pre(
    x: Float[jax.Array, "*tokens n C"] | Streams,
    params: MHCParams,
    *,
    config: MHCConfig = PAPER,
    norm_scale: Float[jax.Array, " C"] | None = None,
    norm_scale_eps: float = 1e-6,
    h_pre: Float[jax.Array, "*tokens n"] | None = None,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[jax.Array, "*tokens C"], Context]:
    """The layer's input and the coefficients of one sublayer (equations 14 to 19).

        r      = 1 / sqrt(mean(X²) + norm_eps)
        m      = r · (vec(X) phi)
        z      = alpha_group · m + bias                 groups: pre, post, res
        h_pre  = sigmoid(z_pre) + pre_eps
        h_post = post_scale · sigmoid(z_post) + post_eps
        h_res  = sinkhorn(z_res)                        or as config.constraint says
        u      = Σ_i h_pre[i] X[i]
        u      = norm_scale · u / sqrt(mean(u²) + norm_scale_eps)    where norm_scale is given

    With h_pre, or in the delayed schedule ([D1] of docs/mathematics.md), u is the sum with those
    weights and not with its own h_pre, which the context has for the sublayer after it. u is then
    rounded before its norm, too.

    `h_res[i, j]` is the weight of stream j in new stream i. Source: arXiv 2512.24880;
    docs/mathematics.md has the settings and the gradients.

    Coefficients and sums are float32 (float64 for float64 streams); u is rounded once, to the
    dtype of x.

    Differentiable with respect to x, all parameters, norm_scale and h_pre, in reverse mode of first
    order (the reference: in every mode). The backward pass keeps x, the parameters, h_res and K + 1
    numbers a token (with norm_scale one more; with both norm_scale and h_pre, u before its norm),
    and repeats Sinkhorn's iterations. For `jax.checkpoint` policies such as
    `jax.checkpoint_policies.save_only_these_names`, u is named "mhc_layer_input", and h_pre,
    h_post, h_res and these numbers are named "mhc_coefficients": with both saved, the op does not
    run again.

    Under `jax.vmap` a mapped x makes one call with one more leading dimension; mapped parameters,
    and the backward pass of a mapped call (whose parameter gradients differ from element to
    element), run element by element; small elements, for which a kernel has next to nothing to do,
    together in plain JAX unless `implementation="fused"`. Leading dimensions of x cost nothing:
    prefer them to vmap.

    Args:
        x: the streams `[..., n, C]`, n from 1 to 16: float32, bfloat16, float16, float64 (in plain
            JAX on GPUs); or `Streams`, whose pending post runs together with this (`post_pre`).
        params: from `init_params`; float32, or float64 for float64 streams. phi = None: static
            coefficients, the same for all tokens.
        config: settings.
        norm_scale: w `[C]` of the RMSNorm that the layer begins with, of the parameters' dtype; u
            is then rounded once, after the norm. None: u is not normalised.
        norm_scale_eps: added to mean(u²) in it.
        h_pre: weights of the streams in u `[..., n]`, of the coefficients' dtype, in place of its
            own; differentiable. None: its own, or with schedule "delayed" those of the sublayer
            before, which Streams carry.
        hidden_axis_name: the mesh axis over which C is split inside `jax.shard_map`, or several: x
            and u then have the channels of one device, and parameters have all channels. None: C
            is not split there. Outside of it JAX itself knows how C is split.
        implementation: "fused": the kernels. "reference": plain JAX. None: the kernels on CPUs;
            on NVIDIA GPUs whichever of the two is faster with gradients, by what was measured of
            the nearest configuration (docs/performance.md has the table); plain JAX elsewhere, for
            float64 streams on a GPU, and on GPUs that cannot be used (older than compute capability
            8.0, a driver older than CUDA 12, a build without CUDA kernels), which is logged once.
            The platform is that which a program is lowered for; docs/deployment.md has the details,
            and what exported programs need.

    Returns:
        u `[..., C]`, of x's dtype, and the context for `post`: `.x`, `.h_pre` `[..., n]`,
        `.h_post` `[..., n]`, `.h_res` `[..., n, n]`; `Context` tells what may be done with it.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, an array and no h_pre where the
            schedule is delayed, an unknown implementation, or
            "fused" on a platform without kernels or with float64 streams on a GPU; forward mode
            through the fused op.
        RuntimeError: the shared library with the kernels cannot be used; "fused" on a GPU that
            cannot be used.
    """
    op = "pre"
    if isinstance(x, Streams):
        config = _check.config(op, config, x.dtype)
        if x.is_first or config.form != "mhc":
            if h_pre is None and config.schedule == "delayed":
                h_pre = x.h_pre
            x = x.array(implementation=implementation)
        else:
            return post_pre.run(
                op,
                *x.pending(),
                params,
                config=config,
                norm_scale=norm_scale,
                norm_scale_eps=norm_scale_eps,
                h_pre=h_pre,
                hidden_axis_name=hidden_axis_name,
                implementation=implementation,
                plain_post=x.plain_array,
            )
    x = _check.streams(op, "x", x)
    config = _check.config(op, config, x.dtype)
    axes = _check.hidden_axes(op, hidden_axis_name, x)
    phi, alpha, bias = _check.params(op, params, x, config, hidden_axes=axes)
    norm_scale, eps = _check.norm_scale(op, norm_scale, norm_scale_eps, x, hidden_axes=axes)
    of_given = None
    if h_pre is not None or config.schedule == "delayed":
        h_pre = _check.given_weights(op, h_pre, x)
        norm_scale, of_given = None, norm_scale
    u, ctx = _pre(
        present(x=x, phi=phi, alpha=alpha, bias=bias, norm_scale=norm_scale, h_given=h_pre),
        Settings(config, eps, axes),
        implementation,
        lambda: reference.pre(
            x,
            MHCParams(phi, alpha, bias),
            config=config,
            norm_scale=norm_scale,
            norm_scale_eps=eps,
            h_pre=h_pre,
        ),
    )
    return given.normalized(u, of_given, eps, axes), ctx


def _forward(operands: Values, results: Values) -> tuple[tuple[jax.Array, Context], Values]:
    ctx = context(operands["x"], results)
    return (results["u"], ctx), operands | normalizers(results) | {"h_res": results["h_res"]}


def _backward(settings: Settings, saved: Values, cotangents: tuple[Cotangent, Context]) -> Values:
    d_u, d_ctx = cotangents
    to = given.incoming(settings, saved, d_u, d_ctx)
    return to.gradients | fused_call(
        "pre_bwd",
        settings,
        to.saved | cotangents_of(to.d_u, d_ctx) | {"d_x_in": to.d_x},
        deferred=to.deferred,
    )


_pre = fused_op("pre", _forward, _backward, given.pre_forward)
