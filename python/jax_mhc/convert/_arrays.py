"""Arrays of other implementations, checked against each other, and those of our parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_mhc import _errors
from jax_mhc._check import accumulation_dtype, array
from jax_mhc._errors import Refusal
from jax_mhc._limits import MAX_STREAMS, STREAM_DTYPES
from jax_mhc._types import HeadParams, MHCParams

#: An array and the name of its argument.
Named: TypeAlias = tuple[str, ArrayLike]
#: K of n streams.
Count: TypeAlias = Callable[[int], int]


def square(n: int) -> int:
    """K of n streams with a whole matrix h_res."""
    return n * n + 2 * n


def permuted(n: int) -> int:
    """K of n streams for constraint "permutations"."""
    return 2 * n + math.factorial(n)


def unmixed(n: int) -> int:
    """K of n streams for constraint "identity"."""
    return 2 * n


def plain(op: str, argument: str, value: object) -> jax.Array:
    """An array, or a copy of a tensor of PyTorch, as JAX's, of a dtype that parameters have."""
    if all(hasattr(value, name) for name in ("detach", "cpu", "numpy")):
        tensor: Any = value
        tensor = tensor.detach().cpu()
        dtype = _stored(op, argument, str(tensor.dtype).removeprefix("torch."))
        # PyTorch gives NumPy no bfloat16. An array of its own memory would change with it.
        whole = tensor.float() if dtype == jnp.bfloat16 else tensor
        value = np.array(whole.numpy(), dtype)
    value = array(op, argument, value)
    _stored(op, argument, value.dtype.name)
    return value


def floating(op: str, argument: str, value: object) -> jax.Array:
    """An array, or a tensor of PyTorch, widened to the dtype of our parameters."""
    value = plain(op, argument, value)
    return value.astype(accumulation_dtype(value.dtype))


def _stored(op: str, argument: str, dtype: str) -> np.dtype:
    """A dtype that parameters are stored in; of float8 and the like the scales are missing."""
    if dtype not in STREAM_DTYPES:
        raise Refusal(TypeError, op, argument).expected(
            f"dtype {', '.join(STREAM_DTYPES)}",
            dtype,
            "Pass the stored parameters; quantised ones have to be multiplied by their scales.",
        )
    return np.dtype(dtype)


def shaped(op: str, argument: str, value: object, shape: tuple[int, ...]) -> jax.Array:
    """A floating array of this shape."""
    value = floating(op, argument, value)
    if value.shape != shape:
        raise Refusal(ValueError, op, argument).expected(
            f"shape {list(shape)}",
            list(value.shape),
            "Pass the arrays of one hyper-connection, or of all of them, stacked alike.",
        )
    return value


def weight(
    op: str, named: Named, count: Count = square, *, columns_last: bool = False
) -> tuple[jax.Array, tuple[int, ...], int]:
    """A projection as `[..., K, nC]`, its leading dimensions, and n.

    With columns_last it comes as `[..., nC, K]`.
    """
    given = floating(op, *named)
    fn = given.mT if columns_last and given.ndim > 1 else given
    num, width = _last_two(fn)
    n = streams_of(num, count)
    if not n or not width or width % n:
        sides, such = [_WORDS[count], "n·C"], [str(count(4)), "4·C"]
        step = -1 if columns_last else 1
        raise Refusal(ValueError, op, named[0]).expected(
            f"shape [{', '.join(sides[::step])}] with n from 1 to {MAX_STREAMS}, "
            f"such as [{', '.join(such[::step])}], or several stacked",
            list(given.shape),
            "It is the weight of the projection, with a row or column for each coefficient.",
        )
    return fn, fn.shape[:-2], n


def connection(
    op: str, projection: Named, bias: Named, alpha: Named, count: Count = square
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """A projection `[..., K, nC]`, bias `[..., K]`, a gate for each group, and n."""
    fn, batch, n = weight(op, projection, count)
    gates = shaped(op, *alpha, (*batch, num_gates(count)))
    return fn, shaped(op, *bias, (*batch, count(n))), gates, n


def head(
    op: str, projection: Named, bias: Named, alpha: Named, *, columns_last: bool = False
) -> HeadParams:
    """Parameters of the head from `[..., n, nC]`, or `[..., nC, n]` with columns_last."""
    fn = floating(op, *projection)
    n, width = _last_two(fn.mT if columns_last and fn.ndim > 1 else fn)
    if not 1 <= n <= MAX_STREAMS or not width or width % n:
        raise Refusal(ValueError, op, projection[0]).expected(
            f"shape {'[n·C, n]' if columns_last else '[n, n·C]'} with n from 1 to {MAX_STREAMS}, "
            "or several stacked",
            list(fn.shape),
            "It is the weight of the projection, with a row or column for each stream.",
        )
    batch = fn.shape[:-2]
    return HeadParams(
        phi=fn if columns_last else fn.mT,
        alpha=shaped(op, *alpha, (*batch, 1)),
        bias=shaped(op, *bias, (*batch, n)),
    )


def parts_of(
    op: str,
    params: MHCParams,
    streams: int | None,
    counts: tuple[Count, ...] = (square,),
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """Projection phi `[..., nC, K]`, alpha, bias `[..., K]` and n of our parameters.

    Parameters for constraint "identity" have 2n columns, which is K of fewer streams, too: 8 is
    n² + 2n of 2 streams and 2n of 4. Their two gates tell them apart.

    Args:
        op: what an error names.
        params: of a hyper-connection, or of several stacked.
        streams: n, which is checked; None: as the shape of phi tells it.
        counts: of n, the K that the implementation has.
    """
    if not isinstance(params, MHCParams):
        raise Refusal(TypeError, op, "params").expected(
            "jax_mhc.MHCParams", type(params).__name__, "Make them with jax_mhc.init_params."
        )
    if params.phi is None or params.alpha is None:
        raise Refusal(ValueError, op, "params.phi").expected(
            "a projection [nC, K]",
            None,
            "This implementation has no static coefficients; a phi of zeros computes the same.",
        )
    phi = floating(op, "params.phi", params.phi)
    n = _num_streams(op, phi, streams, counts)
    batch, num = phi.shape[:-2], phi.shape[-1]
    alpha = floating(op, "params.alpha", params.alpha)
    if alpha.shape != (gates := (*batch, num_gates(counts[0]))):
        raise Refusal(ValueError, op, "params.alpha").expected(
            f"shape {list(gates)}",
            list(alpha.shape),
            "Parameters for constraint 'identity' have two gates and all others three: pass those "
            "for a constraint that this implementation has.",
        )
    return phi, alpha, shaped(op, "params.bias", params.bias, (*batch, num)), n


def head_parts_of(op: str, params: HeadParams) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projection phi `[..., nC, n]`, alpha `[..., 1]` and bias `[..., n]` of our head."""
    if not isinstance(params, HeadParams):
        raise Refusal(TypeError, op, "params").expected(
            "jax_mhc.HeadParams", type(params).__name__, "Make them with jax_mhc.init_head."
        )
    names = "params.phi", "params.bias", "params.alpha"
    values = params.phi, params.bias, params.alpha
    checked = head(op, *zip(names, values, strict=True), columns_last=True)
    return checked.phi, checked.alpha, checked.bias


def difference(wanted: Iterable[object], given: Iterable[object]) -> str:
    """The names that are missing and those that are too many, a few of each, for a message."""
    expected, names = ([str(name) for name in each] for each in (wanted, given))
    missing = [name for name in expected if name not in set(names)]
    surplus = [name for name in names if name not in set(expected)]
    parts = [("none of", missing), ("besides", surplus)]
    return ", ".join(f"{word} {few(some)}" for word, some in parts if some)


def few(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def transpose_res(array: jax.Array, n: int, *, axis: int) -> jax.Array:
    """Swaps i and j in the last n² entries of an axis, which hold z[i, j] row by row.

    The axis counts from the end.
    """
    kept, res = jnp.split(array, [2 * n], axis=axis)
    before, after = res.shape[:axis], res.shape[array.ndim + axis + 1 :]
    turned = res.reshape(*before, n, n, *after).swapaxes(len(before), len(before) + 1)
    return jnp.concatenate([kept, turned.reshape(res.shape)], axis=axis)


def streams_of(num: int, *counts: Count) -> int:
    """The number of streams that have this K by one of `counts`; 0 where none has."""
    numbers = range(1, MAX_STREAMS + 1)
    return next((n for n in numbers if any(count(n) == num for count in counts)), 0)


def num_gates(count: Count) -> int:
    """The number of gates: those of pre and post, and one of res where it has coefficients."""
    return 2 if count is unmixed else 3


def _num_streams(op: str, phi: jax.Array, streams: int | None, counts: tuple[Count, ...]) -> int:
    """Number of streams of a phi with K columns, one of `counts`; or an error."""
    rows, num = _last_two(phi)
    if streams is not None:
        n = _errors.num_streams(op, "streams", streams)
        wanted = sorted({count(n) for count in counts})
        if rows % n or num not in wanted:
            raise Refusal(ValueError, op, "params.phi").expected(
                f"shape [{n}·C, {' or '.join(map(str, wanted))}] for {n} streams",
                list(phi.shape),
                "Parameters for other constraints have other columns, and this implementation "
                "does not have those.",
            )
        return n
    n = streams_of(num, *counts)
    if not n or not rows or rows % n:
        raise Refusal(ValueError, op, "params.phi").expected(
            f"shape [n·C, {' or '.join(_WORDS[count] for count in counts)}] "
            f"with n from 1 to {MAX_STREAMS}, or several stacked",
            list(phi.shape),
            "Parameters for other constraints have other columns, and this implementation does "
            "not have those.",
        )
    return n


_WORDS: dict[Count, str] = {square: "n² + 2n", permuted: "2n + n!", unmixed: "2n"}


def _last_two(array: jax.Array) -> tuple[int, int]:
    """The last two dimensions; zeros of an array that has fewer."""
    rows, columns = array.shape[-2:] if array.ndim > 1 else (0, 0)
    return rows, columns
