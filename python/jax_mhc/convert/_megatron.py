"""Parameters of Megatron Core's hyper-connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax.typing import ArrayLike

from jax_mhc._types import MHCParams
from jax_mhc.convert import _arrays

if TYPE_CHECKING:
    from jaxtyping import Float


def from_megatron(
    weight: Float[ArrayLike, "*L K n*C"],
    alpha: Float[ArrayLike, "*L 3"],
    bias: Float[ArrayLike, "*L K"],
) -> MHCParams:
    """Parameters of a Megatron Core hyper-connection; use them with `presets.MEGATRON`.

    This is the form of `HyperConnectionModule` in its branch main (as of August 2026), which
    multiplies the streams by h_res as we do, so that nothing is transposed but the weight. Its
    branch dev went over to DeepSeek-V4's convention in May 2026: parameters trained with that are
    `from_deepseek_v4(weight, bias, alpha)` with `presets.MEGATRON_DEV`.

    Names and shapes are the same in both, and the wrong form is off by 0.6 without an error. What
    tells them apart is the code that trained the parameters, in its Sinkhorn and its product:

    - main: exp of the logits less the largest of their row, then divisions by sums clamped at
      eps. The streams are multiplied by h_res.
    - dev: `softmax(dim=-1) + eps`, then divisions by `sum + eps`. The streams are multiplied by the
      transpose of h_res (`H_res^T`).

    Or what that code computes with an eps of 1e-2: the columns of main's h_res sum to 1 to
    rounding, those of dev's to 1 less about eps. With a checkpoint alone compare the model's loss
    under both: the right one gives that of the training.

    Args:
        weight: `mapping_proj.weight`, `[n² + 2n, nC]`, or several `[L, n² + 2n, nC]`.
        alpha: gates `[3]`: `alpha_pre`, `alpha_post` and `alpha_res`, concatenated.
        bias: `bias`, `[n² + 2n]`.

    Returns:
        MHCParams for streams whose number n is read off K = n² + 2n.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    weight, bias, alpha, _ = _arrays.connection(
        "convert.from_megatron", ("weight", weight), ("bias", bias), ("alpha", alpha)
    )
    return MHCParams(phi=weight.mT, alpha=alpha, bias=bias)


def to_megatron(
    params: MHCParams, *, streams: int | None = None
) -> tuple[Float[jax.Array, "*L K n*C"], Float[jax.Array, "*L 3"], Float[jax.Array, "*L K"]]:
    """The inverse of `from_megatron`: `(weight, alpha, bias)`, bit for bit.

    For its branch dev take `to_deepseek_v4`, whose `(fn, base, scale)` are weight, bias and alpha.

    Args:
        params: of one hyper-connection, or of several stacked.
        streams: n, which is checked; None: as the shape of phi tells it.

    Raises:
        TypeError: anything but MHCParams, or a dtype that does not fit.
        ValueError: static coefficients, or parameters without the n² columns of h_res.
    """
    phi, alpha, bias, _ = _arrays.parts_of("convert.to_megatron", params, streams)
    return phi.mT, alpha, bias
