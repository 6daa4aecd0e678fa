"""Entry, exit, and a whole sublayer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from jax_mhc import _check, _errors
from jax_mhc._call.dispatch import Implementation
from jax_mhc._copies import copies
from jax_mhc._ops.streams import Streams, first_streams
from jax_mhc._ops.sublayer import Options, Sublayer
from jax_mhc._types import Layer, MHCConfig, MHCParams
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float


def expand(
    u: Float[jax.Array, "*tokens C"],
    *,
    streams: int,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
) -> Streams:
    """Enters the streams: X[i] = u for every stream i.

    Args:
        u: hidden state `[..., C]`: float32, bfloat16, float16 or float64.
        streams: n, from 1 to 16.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: that of the sublayers to come; see `as_streams`.

    Returns:
        The streams, of u's dtype, and no sublayer before them: `.array()` is `[..., n, C]`. The
        gradient, a sum over the streams, is float32 (float64 for float64 streams) and rounded once.

    Raises:
        ValueError, TypeError: u without a hidden axis or of another dtype; streams out of range.
    """
    n = _errors.num_streams("expand", "streams", streams)
    u = _check.hidden_state("expand", "u", u)
    return first_streams("expand", copies(u, n, axis=-2), hidden_axis_name, implementation)


def reduce(
    x: Float[jax.Array, "*tokens n C"] | Streams, *, method: Literal["mean", "sum"] = "mean"
) -> Float[jax.Array, "*tokens C"]:
    """Leaves the streams: their mean (the default) or their sum.

    The mean gives back the value of equal streams, so that a model at initialisation is the plain
    residual model; the sum, as in the paper of hyper-connections, is n times that.

    Args:
        x: the streams `[..., n, C]`, or `Streams`.
        method: "mean" or "sum".

    Returns:
        `[..., C]`, of x's dtype; summed in float32 (float64 for float64 streams) and rounded once.
        Differentiable in every mode.

    Raises:
        ValueError, TypeError: x that is no streams, or another method.
    """
    x = x.array() if isinstance(x, Streams) else _check.streams("reduce", "x", x)
    _errors.choice("reduce", "method", method, ("mean", "sum"))
    total = jnp.sum(x, axis=-2, dtype=_check.accumulation_dtype(x.dtype))
    return (total / x.shape[-2] if method == "mean" else total).astype(x.dtype)


def mhc_residual(
    layer: Layer,
    x: Float[jax.Array, "*tokens n C"] | Streams,
    params: MHCParams,
    *,
    config: MHCConfig = PAPER,
    norm_scale: Float[jax.Array, " C"] | None = None,
    norm_scale_eps: float = 1e-6,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
    has_aux: bool = False,
) -> Any:
    """Applies one sublayer with its manifold-constrained hyper-connection (equation 3).

        u     = Σ_i h_pre[i] X[i]
        X'[i] = Σ_j h_res[i, j] X[j] + h_post[i] · layer(u)

    the counterpart of `x + layer(x)`. `h_res[i, j]` is the weight of stream j in new stream i.
    Source: arXiv 2512.24880. It is `pre`, `layer` and `post`, which see for dtypes, gradients and
    batching. Where one sublayer follows another, `Streams` save a pass over the streams: the next
    sublayer runs the post of this one. For
    `jax.checkpoint` policies the layer's output is named "mhc_layer_output".

    Args:
        layer: a function `[..., C] -> [..., C]` that keeps the dtype: attention or MLP with its own
            norm in front, or without it where norm_scale is given.
        x: the streams `[..., n, C]`, or `Streams`; with schedule "delayed" these alone, which carry
            the h_pre of the sublayer before.
        params: from `init_params`.
        config: settings.
        norm_scale: of an RMSNorm of u `[C]`, which pre then computes; see `pre`.
        norm_scale_eps: its eps.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: None, "fused" or "reference"; see `pre`.
        has_aux: layer returns `(y, aux)`.

    Returns:
        The new streams `[..., n, C]`, or `Streams` where x is; `(streams, aux)` with has_aux.

    Raises:
        ValueError, TypeError: what `pre` raises; a layer that is no function of u, or returns
            another shape or dtype.
    """
    op = "mhc_residual"
    remedy = "Pass the sublayer itself: mhc_residual(layer, x, params)."
    _errors.function(op, "layer", layer, "a function from [..., C] to [..., C]", remedy)
    has_aux = _errors.flag(op, "has_aux", has_aux)
    if not isinstance(x, Streams):
        x = _check.streams("pre", "x", x)

    def run(u: jax.Array) -> tuple[jax.Array, Any]:
        result = _check.call(op, "layer", "u", layer, u)
        y, aux = _check.output_and_aux(op, "layer's result", result, has_aux=has_aux)
        return _check.layer_output(op, "layer's result", y, x), aux

    options: Options = {
        "config": config,
        "norm_scale_eps": norm_scale_eps,
        "hidden_axis_name": hidden_axis_name,
        "implementation": implementation,
    }
    x_new, _, aux = Sublayer(run, params, norm_scale, options).run(x)
    return (x_new, aux) if has_aux else x_new
