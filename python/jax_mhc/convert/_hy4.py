"""Parameters of Tencent's Hy4."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax.typing import ArrayLike

from jax_mhc._types import MHCParams
from jax_mhc.convert import _arrays

if TYPE_CHECKING:
    from jaxtyping import Float


def from_hy4(
    fn: Float[ArrayLike, "*L K n*C"],
    base: Float[ArrayLike, "*L K"],
    scale: Float[ArrayLike, "*L 2"],
) -> MHCParams:
    """Parameters of a hyper-connection of Tencent's Hy4; use them with `presets.HY4`.

    Its streams do not mix, so that there are K = 2n coefficients and two gates. Of its config.json
    `hc_magnitude` is post_scale (2 in the preset), `hc_eps` both pre_eps and post_eps (1e-6), and
    `rms_norm_eps` norm_eps (1e-5). Its head is that of DeepSeek-V4, under the same names:
    `head_from_deepseek_v4(hc_fn, hc_base, hc_scale)`, with `presets.HY4`.

    Args:
        fn: projection `[2n, nC]` (`attn_hc.fn`, `ffn_hc.fn`), or several `[L, 2n, nC]`.
        base: static part `[2n]` (`attn_hc.base`, `ffn_hc.base`).
        scale: gates of pre and post `[2]` (`attn_hc.scale`, `ffn_hc.scale`).

    Returns:
        MHCParams for streams whose number n is read off K = 2n.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    fn, base, scale, _ = _arrays.connection(
        "convert.from_hy4", ("fn", fn), ("base", base), ("scale", scale), _arrays.unmixed
    )
    return MHCParams(phi=fn.mT, alpha=scale, bias=base)


def to_hy4(
    params: MHCParams, *, streams: int | None = None
) -> tuple[Float[jax.Array, "*L K n*C"], Float[jax.Array, "*L K"], Float[jax.Array, "*L 2"]]:
    """The inverse of `from_hy4`: `(fn, base, scale)`, bit for bit.

    Args:
        params: of one hyper-connection with constraint "identity", or of several stacked.
        streams: n, which is checked; None: as the shape of phi tells it.

    Returns:
        fn `[2n, nC]`, base `[2n]` and scale `[2]`.

    Raises:
        TypeError: anything but MHCParams, or a dtype that does not fit.
        ValueError: static coefficients, or parameters with columns for h_res: Hy4 has neither.
    """
    phi, alpha, bias, _ = _arrays.parts_of("convert.to_hy4", params, streams, (_arrays.unmixed,))
    return phi.mT, bias, alpha
