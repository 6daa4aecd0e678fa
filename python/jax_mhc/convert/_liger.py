"""Parameters of Liger-Kernel's hyper-connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_mhc._types import MHCParams
from jax_mhc.convert import _arrays

if TYPE_CHECKING:
    from jaxtyping import Float

GATES = "alpha_pre", "alpha_post", "alpha_res"


def from_liger(
    phi: Float[ArrayLike, "*L n*C K"],
    b: Float[ArrayLike, "*L K"],
    alpha_pre: Float[ArrayLike, "*L"],
    alpha_post: Float[ArrayLike, "*L"],
    alpha_res: Float[ArrayLike, "*L"],
) -> MHCParams:
    """Parameters of a `LigerMHC`; use them with `presets.LIGER`.

    Projection and h_res have our orientation, and it normalises rows first. Its defaults are those
    of the preset; `pre_eps`, `rms_eps` and `post_mult` are our pre_eps, norm_eps and post_scale.

    Args:
        phi: projection `[nC, n² + 2n]`, or several `[L, nC, n² + 2n]`.
        b: static part `[n² + 2n]`.
        alpha_pre: gate of pre, a scalar.
        alpha_post: gate of post, a scalar.
        alpha_res: gate of res, a scalar.

    Returns:
        MHCParams for streams whose number n is read off K = n² + 2n.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    op = "convert.from_liger"
    weight, batch, n = _arrays.weight(op, ("phi", phi), columns_last=True)
    gates = zip(GATES, (alpha_pre, alpha_post, alpha_res), strict=True)
    return MHCParams(
        phi=weight.mT,
        alpha=jnp.stack([_arrays.shaped(op, *gate, batch) for gate in gates], axis=-1),
        bias=_arrays.shaped(op, "b", b, (*batch, _arrays.square(n))),
    )


def to_liger(
    params: MHCParams, *, streams: int | None = None
) -> tuple[
    Float[jax.Array, "*L n*C K"],
    Float[jax.Array, "*L K"],
    Float[jax.Array, "*L"],
    Float[jax.Array, "*L"],
    Float[jax.Array, "*L"],
]:
    """The inverse of `from_liger`: `(phi, b, alpha_pre, alpha_post, alpha_res)`, bit for bit.

    Args:
        params: of one hyper-connection, or of several stacked.
        streams: n, which is checked; None: as the shape of phi tells it.

    Raises:
        TypeError: anything but MHCParams, or a dtype that does not fit.
        ValueError: static coefficients, or parameters without the n² columns of h_res.
    """
    phi, alpha, bias, _ = _arrays.parts_of("convert.to_liger", params, streams)
    return phi, bias, alpha[..., 0], alpha[..., 1], alpha[..., 2]
