"""Parameters of TransformerEngine's hyper-connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax.typing import ArrayLike

from jax_mhc._types import MHCParams
from jax_mhc.convert import _arrays

if TYPE_CHECKING:
    from jaxtyping import Float


def from_transformer_engine(
    phi: Float[ArrayLike, "*L K C*n"],
    alpha: Float[ArrayLike, "*L 3"],
    beta: Float[ArrayLike, "*L 1 K"],
    norm_weight: Float[ArrayLike, "*L C*n"] | None = None,
) -> MHCParams:
    """Parameters of `mhc_generate_mix_and_aggregate`; use them with `presets.TRANSFORMER_ENGINE`.

    Its streams are `[..., C, n]`, ours `x.swapaxes(-1, -2)`: column c·n + i of phi is our row
    i·C + c. It multiplies the streams by H_res from the right and normalises the rows of H_res
    first, so that h_res[i, j] = H_res[j, i], column first. A weight of the norm is folded into phi.

    Args:
        phi: projection `[n² + 2n, Cn]`, or several `[L, n² + 2n, Cn]`.
        alpha: gates of pre, post and res `[3]`.
        beta: static part `[1, n² + 2n]`.
        norm_weight: weight of the RMSNorm over all channels `[Cn]`; None: ones.

    Returns:
        MHCParams for streams whose number n is read off K = n² + 2n.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    op = "convert.from_transformer_engine"
    weight, batch, n = _arrays.weight(op, ("phi", phi))
    width, num = weight.shape[-1], _arrays.square(n)
    alpha = _arrays.shaped(op, "alpha", alpha, (*batch, 3))
    bias = _arrays.shaped(op, "beta", beta, (*batch, 1, num))[..., 0, :]
    if norm_weight is not None:
        norm_weight = _arrays.shaped(op, "norm_weight", norm_weight, (*batch, width))
        weight = weight * norm_weight[..., None, :].astype(weight.dtype)
    return MHCParams(
        phi=_arrays.transpose_res(_swap_channels(weight, width // n, n), n, axis=-2).mT,
        alpha=alpha,
        bias=_arrays.transpose_res(bias, n, axis=-1),
    )


def to_transformer_engine(
    params: MHCParams, *, streams: int | None = None
) -> tuple[Float[jax.Array, "*L K C*n"], Float[jax.Array, "*L 3"], Float[jax.Array, "*L 1 K"]]:
    """The inverse of `from_transformer_engine`: `(phi, alpha, beta)`, bit for bit.

    They are for a norm without weight, or with one of ones.

    Args:
        params: of one hyper-connection, or of several stacked.
        streams: n, which is checked; None: as the shape of phi tells it.

    Raises:
        TypeError: anything but MHCParams, or a dtype that does not fit.
        ValueError: static coefficients, or parameters without the n² columns of h_res.
    """
    phi, alpha, bias, n = _arrays.parts_of("convert.to_transformer_engine", params, streams)
    weight = _arrays.transpose_res(phi.mT, n, axis=-2)
    beta = _arrays.transpose_res(bias, n, axis=-1)[..., None, :]
    return _swap_channels(weight, n, weight.shape[-1] // n), alpha, beta


def _swap_channels(weight: jax.Array, first: int, second: int) -> jax.Array:
    """Columns `[first · second]` in the order of `[second · first]`."""
    split = weight.reshape(*weight.shape[:-1], first, second)
    return split.swapaxes(-1, -2).reshape(weight.shape)
