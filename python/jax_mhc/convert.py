"""Parameters of other implementations, and back.

All of them order the coefficients pre, post, res and hold the projection as a weight `[K, nC]`, the
transpose of our phi. What differs is which index of the n x n matrix meets the old streams.
Arrays may be NumPy's or JAX's, of float32, bfloat16, float16 or float64; results are float32
(float64 where the input is, while JAX's 64-bit types are on), so that nothing is rounded on the way
there and back. Settings are not part of parameters: each function names those to use.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_mhc._check import accumulation_dtype, array
from jax_mhc._errors import Refusal, num_streams
from jax_mhc._limits import MAX_STREAMS, STREAM_DTYPES
from jax_mhc._types import HeadParams, MHCParams

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "from_deepseek_v4",
    "from_hy4",
    "from_megatron",
    "head_from_deepseek_v4",
    "to_deepseek_v4",
    "to_hy4",
]

# An array and the name of its argument.
Named: TypeAlias = tuple[str, ArrayLike]


def from_deepseek_v4(
    fn: Float[ArrayLike, "K n*C"], base: Float[ArrayLike, " K"], scale: Float[ArrayLike, " 3"]
) -> MHCParams:
    """Parameters of one DeepSeek-V4 hyper-connection; use them with `presets.DEEPSEEK_V4`.

    Its kernels sum over the first index of `comb`, so h_res[i, j] = comb[j, i]: the n x n block of
    the last n² rows of fn and entries of base is transposed.

    Args:
        fn: projection `[n² + 2n, nC]` (`hc_attn_fn`, `hc_ffn_fn`).
        base: static part `[n² + 2n]` (`hc_attn_base`, `hc_ffn_base`).
        scale: gates of pre, post and res `[3]` (`hc_attn_scale`, `hc_ffn_scale`).

    Returns:
        MHCParams for streams whose number n is read off K = n² + 2n.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    op = "convert.from_deepseek_v4"
    fn, base, scale, n = _checked(op, ("fn", fn), ("base", base), ("scale", scale))
    return MHCParams(phi=_transpose_res(fn, n).T, alpha=scale, bias=_transpose_res(base, n))


def to_deepseek_v4(
    params: MHCParams, *, streams: int | None = None
) -> tuple[Float[jax.Array, "K n*C"], Float[jax.Array, " K"], Float[jax.Array, " 3"]]:
    """The inverse of `from_deepseek_v4`: `(fn, base, scale)`, bit for bit.

    Parameters for constraint "identity" have no columns for h_res, and DeepSeek-V4 cannot do
    without. In two cases phi has the shape of either, and `streams` must say which it is:

    - `[·, 8]` with a multiple of 4 rows: 2 streams, or 4 without h_res;
    - `[·, 24]` with a multiple of 12 rows (4 streams of a C that 3 divides, such as 768): 4
      streams, or 12 without h_res.

    Args:
        params: of one hyper-connection.
        streams: n; None: as the shape of phi tells it.

    Returns:
        fn `[n² + 2n, nC]`, base `[n² + 2n]` and scale `[3]`.

    Raises:
        TypeError: anything but MHCParams, or a dtype that does not fit.
        ValueError: static coefficients, or parameters without the n² columns of h_res (made for
            constraint "identity" or "permutations"): DeepSeek-V4 has neither. Parameters that may
            be such, where streams is None.
    """
    op = "convert.to_deepseek_v4"
    phi, alpha = _dynamic(op, params, "DeepSeek-V4")
    _check_columns(op, phi.shape, streams)
    fn, base, scale, n = _checked(
        op, ("params.phi.T", phi.T), ("params.bias", params.bias), ("params.alpha", alpha)
    )
    return _transpose_res(fn, n), _transpose_res(base, n), scale


def head_from_deepseek_v4(
    hc_fn: Float[ArrayLike, "n n*C"],
    hc_base: Float[ArrayLike, " n"],
    hc_scale: Float[ArrayLike, " 1"],
) -> HeadParams:
    """Parameters of DeepSeek-V4's head; use them with `presets.DEEPSEEK_V4`.

    Args:
        hc_fn: projection `[n, nC]` (`hc_head_fn`).
        hc_base: static part `[n]` (`hc_head_base`).
        hc_scale: gate `[1]` (`hc_head_scale`).

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    op = "convert.head_from_deepseek_v4"
    fn = _floating(op, "hc_fn", hc_fn)
    n = fn.shape[0] if fn.ndim == 2 else 0
    if not 1 <= n <= MAX_STREAMS or not fn.shape[1] or fn.shape[1] % n:
        raise Refusal(ValueError, op, "hc_fn").expected(
            f"shape [n, n·C] with n from 1 to {MAX_STREAMS}",
            list(fn.shape),
            "It is the weight of the projection, one row for each stream.",
        )
    return HeadParams(
        phi=fn.T,
        alpha=_shaped(op, "hc_scale", hc_scale, (1,)),
        bias=_shaped(op, "hc_base", hc_base, (n,)),
    )


def from_megatron(
    weight: Float[ArrayLike, "K n*C"], alpha: Float[ArrayLike, " 3"], bias: Float[ArrayLike, " K"]
) -> MHCParams:
    """Parameters of one Megatron Core hyper-connection; use them with `presets.MEGATRON`.

    This is the form of `HyperConnectionModule` in its branch main (as of August 2026), which
    multiplies the streams by h_res as we do, so that nothing is transposed but the weight. Its
    branch dev went over to DeepSeek-V4's convention in May 2026. Parameters trained with that are
    `from_deepseek_v4(weight, bias, alpha)` with
    `dataclasses.replace(presets.DEEPSEEK_V4, norm_eps_mode="outside")`.

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
        weight: `mapping_proj.weight`, `[n² + 2n, nC]`.
        alpha: gates `[3]`: `alpha_pre`, `alpha_post` and `alpha_res`, concatenated.
        bias: `bias`, `[n² + 2n]`.

    Returns:
        MHCParams for streams whose number n is read off K = n² + 2n.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    weight, bias, alpha, _ = _checked(
        "convert.from_megatron", ("weight", weight), ("bias", bias), ("alpha", alpha)
    )
    return MHCParams(phi=weight.T, alpha=alpha, bias=bias)


def from_hy4(
    fn: Float[ArrayLike, "K n*C"], base: Float[ArrayLike, " K"], scale: Float[ArrayLike, " 2"]
) -> MHCParams:
    """Parameters of one hyper-connection of Tencent's Hy4; use them with `presets.HY4`.

    Its streams do not mix, so that there are K = 2n coefficients and two gates. Of its config.json
    `hc_magnitude` is post_scale (2 in the preset), `hc_eps` both pre_eps and post_eps (1e-6), and
    `rms_norm_eps` norm_eps (1e-5). Its head is that of DeepSeek-V4, under the same names:
    `head_from_deepseek_v4(hc_fn, hc_base, hc_scale)`, with `presets.HY4`.

    Args:
        fn: projection `[2n, nC]` (`attn_hc.fn`, `ffn_hc.fn`).
        base: static part `[2n]` (`attn_hc.base`, `ffn_hc.base`).
        scale: gates of pre and post `[2]` (`attn_hc.scale`, `ffn_hc.scale`).

    Returns:
        MHCParams for streams whose number n is read off K = 2n.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    fn, base, scale = _hy4("convert.from_hy4", ("fn", fn), ("base", base), ("scale", scale))
    return MHCParams(phi=fn.T, alpha=scale, bias=base)


def to_hy4(
    params: MHCParams,
) -> tuple[Float[jax.Array, "K n*C"], Float[jax.Array, " K"], Float[jax.Array, " 2"]]:
    """The inverse of `from_hy4`: `(fn, base, scale)`, bit for bit.

    Args:
        params: of one hyper-connection with constraint "identity".

    Returns:
        fn `[2n, nC]`, base `[2n]` and scale `[2]`.

    Raises:
        TypeError: anything but MHCParams, or a dtype that does not fit.
        ValueError: static coefficients, or parameters with columns for h_res: Hy4 has neither.
    """
    op = "convert.to_hy4"
    phi, alpha = _dynamic(op, params, "Hy4")
    return _hy4(op, ("params.phi.T", phi.T), ("params.bias", params.bias), ("params.alpha", alpha))


def _hy4(
    op: str, weight: Named, bias: Named, alpha: Named
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three arrays of a connection without h_res, widened and checked against each other."""
    fn = _floating(op, *weight)
    num = fn.shape[0] if fn.ndim == 2 else 0
    n = num // 2
    if num % 2 or not 1 <= n <= MAX_STREAMS or not fn.shape[1] or fn.shape[1] % n:
        raise Refusal(ValueError, op, weight[0]).expected(
            f"shape [2n, n·C] with n from 1 to {MAX_STREAMS}, such as [8, 4·C]",
            list(fn.shape),
            "It is the weight of the projection, one row for each coefficient.",
        )
    return fn, _shaped(op, *bias, (num,)), _shaped(op, *alpha, (2,))


def _dynamic(op: str, params: MHCParams, model: str) -> tuple[jax.Array, ArrayLike]:
    """Phi and alpha of parameters that have them, as all of `model` do."""
    if not isinstance(params, MHCParams):
        raise Refusal(TypeError, op, "params").expected(
            "jax_mhc.MHCParams", type(params).__name__, "Make them with jax_mhc.init_params."
        )
    if params.phi is None or params.alpha is None:
        raise Refusal(ValueError, op, "params.phi").expected(
            "a projection [nC, K]",
            None,
            f"{model} has no static coefficients; a phi of zeros computes the same.",
        )
    return array(op, "params.phi", params.phi), params.alpha


def _check_columns(op: str, shape: tuple[int, ...], streams: int | None) -> None:
    """Refuses parameters without the columns of h_res, and what may be such.

    For constraint "identity" K is 2n, which is n² + 2n of fewer streams, too, for n = 4 and 12. Of
    the K for "permutations", 3, 6, 12 and 32, only the first is, of one stream, whose h_res is 1.
    """
    rows, num = shape if len(shape) == 2 else (0, 0)
    if streams is not None:
        n = num_streams(op, "streams", streams)
        if (rows % n, num) != (0, n * n + 2 * n):
            raise Refusal(ValueError, op, "params.phi").expected(
                f"shape [{n}·C, {n * n + 2 * n}] for {n} streams",
                list(shape),
                "Parameters for constraint 'identity' or 'permutations' have other "
                "columns, and DeepSeek-V4 has neither constraint.",
            )
        return
    n, others = math.isqrt(num + 1) - 1, num // 2
    if num in (8, 24) and rows % others == 0:
        raise Refusal(ValueError, op, "streams").expected(
            f"the number of streams, since phi {list(shape)} may be of {n}, or of {others} for "
            "constraint 'identity'",
            None,
            f"Pass streams={n}, if {n * n} of the {num} columns are those of h_res; DeepSeek-V4 "
            "has no counterpart of the other.",
        )


def _checked(
    op: str,
    weight: tuple[str, ArrayLike],
    bias: tuple[str, ArrayLike],
    alpha: tuple[str, ArrayLike],
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """The three arrays, widened and checked against each other, and n."""
    fn = _floating(op, *weight)
    num = fn.shape[0] if fn.ndim == 2 else 0
    n = math.isqrt(num + 1) - 1
    fits = 1 <= n <= MAX_STREAMS and n * n + 2 * n == num
    if not fits or not fn.shape[1] or fn.shape[1] % n:
        raise Refusal(ValueError, op, weight[0]).expected(
            f"shape [n² + 2n, n·C] with n from 1 to {MAX_STREAMS}, such as [24, 4·C]",
            list(fn.shape),
            "It is the weight of the projection, one row for each coefficient.",
        )
    return fn, _shaped(op, *bias, (num,)), _shaped(op, *alpha, (3,)), n


def _shaped(op: str, argument: str, value: object, shape: tuple[int, ...]) -> jax.Array:
    value = _floating(op, argument, value)
    if value.shape != shape:
        raise Refusal(ValueError, op, argument).expected(
            f"shape {list(shape)}", list(value.shape), "Pass the arrays of one hyper-connection."
        )
    return value


def _floating(op: str, argument: str, value: object) -> jax.Array:
    value = array(op, argument, value)
    # Of float8 and the like the scales are missing.
    if value.dtype.name not in STREAM_DTYPES:
        raise Refusal(TypeError, op, argument).expected(
            f"dtype {', '.join(STREAM_DTYPES)}",
            value.dtype.name,
            "Pass the stored parameters; quantised ones have to be multiplied by their scales.",
        )
    return value.astype(accumulation_dtype(value.dtype))


def _transpose_res(rows: jax.Array, n: int) -> jax.Array:
    """Swaps i and j in the last n² rows, which hold z[i, j] row by row."""
    res = rows[2 * n :].reshape(n, n, *rows.shape[1:]).swapaxes(0, 1)
    return jnp.concatenate([rows[: 2 * n], res.reshape(n * n, *rows.shape[1:])])
