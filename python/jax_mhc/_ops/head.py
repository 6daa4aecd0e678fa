"""The learned exit from the streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from jax_mhc import _check, reference
from jax_mhc._call import Implementation, Settings, Values
from jax_mhc._ops.deferred import Cotangent, instantiate
from jax_mhc._ops.fused_op import fused_call, fused_op
from jax_mhc._ops.streams import Streams
from jax_mhc._types import HeadParams, MHCConfig
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float


def head(
    x: Float[jax.Array, "*tokens n C"] | Streams,
    params: HeadParams,
    *,
    config: MHCConfig = PAPER,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
) -> Float[jax.Array, "*tokens C"]:
    """The learned exit: a weighted sum of the streams, as before the final norm of DeepSeek-V4.

        r = 1 / sqrt(mean(X²) + norm_eps)
        m = r · (vec(X) phi)
        u = Σ_i (sigmoid(alpha · m[i] + bias[i]) + pre_eps) X[i]

    Sums are float32 (float64 for float64 streams); u is rounded once. Differentiable with respect
    to x and all parameters, in reverse mode of first order (the reference: in every mode); the
    backward pass keeps x, the parameters and n + 1 numbers a token. Names for `jax.checkpoint`
    policies: "mhc_layer_input" (u) and "mhc_coefficients" (the n + 1 numbers). For `jax.vmap` see
    `pre`.

    Args:
        x: the streams `[..., n, C]` or `Streams`, n from 1 to 16: float32, bfloat16, float16,
            float64 (in plain JAX on GPUs).
        params: from `init_head`; float32, or float64 for float64 streams.
        config: `norm_eps`, `norm_eps_mode` and `pre_eps` are used.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: None, "fused" or "reference"; see `pre`.

    Returns:
        u `[..., C]`, of x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: what `pre` raises.
    """
    op = "head"
    x = x.array() if isinstance(x, Streams) else _check.streams(op, "x", x)
    config = _check.config(op, config, x.dtype)
    axes = _check.hidden_axes(op, hidden_axis_name, x)
    phi, alpha, bias = _check.head_params(op, params, x, axes)
    return _head(
        {"x": x, "phi": phi, "alpha": alpha, "bias": bias},
        Settings(config, hidden_axes=axes),
        implementation,
        lambda: reference.head(x, HeadParams(phi, alpha, bias), config=config),
    )


def _forward(operands: Values, results: Values) -> tuple[jax.Array, Values]:
    u = results.pop("u")
    return u, operands | results


def _backward(settings: Settings, saved: Values, d_u: Cotangent) -> Values:
    return fused_call("head_bwd", settings, saved | {"d_u": instantiate(d_u)})


_head = fused_op("head", _forward, _backward)
