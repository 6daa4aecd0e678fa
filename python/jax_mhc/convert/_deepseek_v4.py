"""Parameters of DeepSeek-V4, of the models that follow it, and of Megatron Core's branch dev."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax.typing import ArrayLike

from jax_mhc._types import HeadParams, MHCParams
from jax_mhc.convert import _arrays

if TYPE_CHECKING:
    from jaxtyping import Float


def from_deepseek_v4(
    fn: Float[ArrayLike, "*L K n*C"],
    base: Float[ArrayLike, "*L K"],
    scale: Float[ArrayLike, "*L 3"],
) -> MHCParams:
    """Parameters of a DeepSeek-V4 hyper-connection; use them with `presets.DEEPSEEK_V4`.

    Its kernels sum over the first index of `comb`, so h_res[i, j] = comb[j, i]: the n x n block of
    the last n² rows of fn and entries of base is transposed.

    GLM-5.3 has the same (`presets.GLM5`), and so has Megatron Core's branch dev:
    `from_deepseek_v4(weight, bias, alpha)` with `presets.MEGATRON_DEV`.

    Args:
        fn: projection `[n² + 2n, nC]` (`hc_attn_fn`, `hc_ffn_fn`), or several `[L, n² + 2n, nC]`.
        base: static part `[n² + 2n]` (`hc_attn_base`, `hc_ffn_base`).
        scale: gates of pre, post and res `[3]` (`hc_attn_scale`, `hc_ffn_scale`).

    Returns:
        MHCParams for streams whose number n is read off K = n² + 2n.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    fn, base, scale, n = _arrays.connection(
        "convert.from_deepseek_v4", ("fn", fn), ("base", base), ("scale", scale)
    )
    return MHCParams(
        phi=_arrays.transpose_res(fn, n, axis=-2).mT,
        alpha=scale,
        bias=_arrays.transpose_res(base, n, axis=-1),
    )


def to_deepseek_v4(
    params: MHCParams, *, streams: int | None = None
) -> tuple[Float[jax.Array, "*L K n*C"], Float[jax.Array, "*L K"], Float[jax.Array, "*L 3"]]:
    """The inverse of `from_deepseek_v4`: `(fn, base, scale)`, bit for bit.

    Args:
        params: of one hyper-connection, or of several stacked.
        streams: n, which is checked; None: as the shape of phi tells it.

    Returns:
        fn `[n² + 2n, nC]`, base `[n² + 2n]` and scale `[3]`.

    Raises:
        TypeError: anything but MHCParams, or a dtype that does not fit.
        ValueError: static coefficients, or parameters without the n² columns of h_res (made for
            constraint "identity" or "permutations"): DeepSeek-V4 has neither.
    """
    phi, alpha, bias, n = _arrays.parts_of("convert.to_deepseek_v4", params, streams)
    return (
        _arrays.transpose_res(phi.mT, n, axis=-2),
        _arrays.transpose_res(bias, n, axis=-1),
        alpha,
    )


def head_from_deepseek_v4(
    hc_fn: Float[ArrayLike, "*L n n*C"],
    hc_base: Float[ArrayLike, "*L n"],
    hc_scale: Float[ArrayLike, "*L 1"],
) -> HeadParams:
    """Parameters of DeepSeek-V4's head; use them with `presets.DEEPSEEK_V4`.

    Args:
        hc_fn: projection `[n, nC]` (`hc_head_fn`).
        hc_base: static part `[n]` (`hc_head_base`).
        hc_scale: gate `[1]` (`hc_head_scale`).

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    return _arrays.head(
        "convert.head_from_deepseek_v4",
        ("hc_fn", hc_fn),
        ("hc_base", hc_base),
        ("hc_scale", hc_scale),
    )


def head_to_deepseek_v4(
    params: HeadParams,
) -> tuple[Float[jax.Array, "*L n n*C"], Float[jax.Array, "*L n"], Float[jax.Array, "*L 1"]]:
    """The inverse of `head_from_deepseek_v4`: `(hc_fn, hc_base, hc_scale)`, bit for bit.

    Raises:
        TypeError: anything but HeadParams, or a dtype that does not fit.
        ValueError: shapes that do not fit.
    """
    phi, alpha, bias = _arrays.head_parts_of("convert.head_to_deepseek_v4", params)
    return phi.mT, bias, alpha
