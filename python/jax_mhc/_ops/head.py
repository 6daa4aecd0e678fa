"""The learned exit from the streams."""

from __future__ import annotations

from collections.abc import Sequence
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
from jax_mhc._types import HeadParams, MHCConfig
from jax_mhc.presets import PAPER


def head(
    x: jax.Array,
    params: HeadParams,
    *,
    config: MHCConfig = PAPER,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
) -> jax.Array:
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
        x: the streams `[..., n, C]`, n from 1 to 16: float32, bfloat16, float16, float64 (in plain
            JAX on GPUs).
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
    x = _check.streams(op, "x", x)
    config = _check.config(op, config, x.dtype)
    axes = _check.hidden_axes(op, hidden_axis_name, x)
    phi, alpha, bias = _check.head_params(op, params, x, axes)
    with jax.named_scope("mhc_head"):
        if not use_fused(op, implementation, x.dtype, axes):
            return reference.head(x, HeadParams(phi, alpha, bias), config=config)
        settings = Settings(config, hidden_axes=axes, fused=implementation == "fused")
        return _head(settings, *reverse_mode_only(op, x, phi, alpha, bias))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(settings: Settings, *operands: Any) -> Any:
    return _head_fwd(settings, *operands)[0]


def _head_fwd(settings: Settings, *operands: Any) -> Any:
    u, *normalized = fused_call("head_fwd", settings, *operands)
    m, r = checkpoint_name(normalized, "mhc_coefficients")
    return checkpoint_name(u, "mhc_layer_input"), (*operands, m, r)


def _head_bwd(settings: Settings, saved: Any, d_u: Any) -> Any:
    return tuple(fused_call("head_bwd", settings, *saved, d_u))


_head.defvjp(_head_fwd, _head_bwd)
