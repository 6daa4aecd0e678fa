"""Projection of one matrix per token onto the doubly stochastic matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_mhc import _check, _errors, reference
from jax_mhc._call import Implementation, Settings, Values
from jax_mhc._ops.deferred import Cotangent, instantiate
from jax_mhc._ops.fused_op import fused_call, fused_op
from jax_mhc._types import MHCConfig
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float


def sinkhorn(
    logits: Float[jax.Array, "*tokens n n"],
    *,
    config: MHCConfig = PAPER,
    implementation: Implementation = None,
) -> Float[jax.Array, "*tokens n n"]:
    """Sinkhorn-Knopp on exp(logits): equation 9, what `pre` does to z_res.

        M = exp(logits);  config.sinkhorn_iters times:  M = T_r(T_c(M))

    T_c divides each column by its sum (over i of M[i, j]), T_r each row; `config.order` swaps them.
    The axis that comes last sums to 1 to rounding, the other only to convergence, which is slow
    for peaked logits. Finite logits up to 1e38 in size give finite results and gradients (but for
    sinkhorn_iters = 0, which is exp). A common offset of a row or a column costs no digits: with
    sinkhorn_eps = 0 the results are right to some roundings where the logits of a column (of a row,
    if rows come first) differ by less than 2^31, in float64 by less than 2^60. Source: arXiv
    2512.24880; docs/mathematics.md has the place of each epsilon.

    Computed in the dtype of the logits. Differentiable through all iterations, in reverse mode of
    first order (the reference: in every mode); the backward pass keeps the logits alone and repeats
    the iterations. The result is named "mhc_coefficients" for `jax.checkpoint` policies. Under
    `jax.vmap` this is one call with one more leading dimension.

    Args:
        logits: `[..., n, n]`, n from 1 to 16: float32 or float64 (in plain JAX on GPUs).
        config: `sinkhorn_iters`, `sinkhorn_eps`, `sinkhorn_eps_mode` and `order` are used.
        implementation: None, "fused" or "reference"; see `pre`.

    Returns:
        The projected matrices `[..., n, n]`.

    Raises:
        ValueError, TypeError: logits of another shape or dtype; a config whose constraint is not
            "birkhoff", and what `pre` raises.
        RuntimeError: the kernels cannot be used; see `pre`.
    """
    op = "sinkhorn"
    logits = _check.matrices(op, "logits", logits)
    config = _check.config(op, config, logits.dtype)
    if config.constraint != "birkhoff":
        raise _errors.Refusal(ValueError, op, "config.constraint").expected(
            "'birkhoff'",
            repr(config.constraint),
            "Sinkhorn is the projection of this constraint alone.",
        )
    return _sinkhorn(
        {"z": logits},
        Settings(config),
        implementation,
        lambda: checkpoint_name(reference.sinkhorn(logits, config=config), "mhc_coefficients"),
    )


def _forward(operands: Values, results: Values) -> tuple[jax.Array, Values]:
    return results["h_res"], operands


def _backward(settings: Settings, saved: Values, d_h_res: Cotangent) -> Values:
    return fused_call("sinkhorn_bwd", settings, saved | {"d_h_res": instantiate(d_h_res)})


_sinkhorn = fused_op("sinkhorn", _forward, _backward)
