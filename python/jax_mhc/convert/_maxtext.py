"""Parameters of MaxText's hyper-connections, by the names of its checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_mhc import _errors
from jax_mhc._errors import Refusal
from jax_mhc._limits import MAX_PERMUTED_STREAMS, MAX_STREAMS
from jax_mhc._types import HeadParams, MHCParams
from jax_mhc.convert import _arrays

if TYPE_CHECKING:
    from jaxtyping import Float

GROUPS = "pre", "post", "res"
NORM = "mhc_norm.scale"
NAMES = (*(f"{group}_{of}" for of in ("alpha", "beta", "alpha_scale") for group in GROUPS), NORM)
HEAD_NAMES = "hc_fn", "hc_base", "hc_scale"


def from_maxtext(tensors: Mapping[str, object]) -> MHCParams:
    """Parameters of a MaxText hyper-connection; use them with `presets.MAXTEXT`, or MAXTEXT_LITE.

    Its `ManifoldConstrainedHyperConnections` norms the streams with a learned weight, which is
    folded into phi, and sums over the first index of its matrix, so that h_res is the transpose of
    that: phi = [pre_alpha, post_alpha, res_alphaᵀ] · mhc_norm.scale[:, None], where res_alphaᵀ has
    z[j, i] in the column of z[i, j]. With `enable_mhc_lite` the columns of res are those of the
    inverse permutations.

    The settings are those of its config: norm_eps is `normalization_layer_epsilon`, sinkhorn_iters
    `sinkhorn_iterations`. In half precision MaxText casts its parameters to the streams' dtype; the
    ops here keep them in float32, as they do the coefficients.

    Scanned layers have their axis where `param_scan_axis` says, second by default: with
    `jnp.moveaxis(tensor, 1, 0)` of each they are stacked as here. `load` takes them as they are.

    Args:
        tensors: by MaxText's names: `pre_alpha` and `post_alpha` `[nC, n]`, `res_alpha`
            `[nC, n²]`, `pre_beta` and `post_beta` `[n]`, `res_beta` `[n, n]`, `pre_alpha_scale`,
            `post_alpha_scale` and `res_alpha_scale` `[1]`, and `mhc_norm.scale` `[nC]`, which may
            be nested as `mhc_norm` and `scale`. For mHC-lite `res_alpha` is `[nC, n!]`, and
            `res_beta` `[n!]`.

    Returns:
        MHCParams of one hyper-connection, or of several stacked.

    Raises:
        TypeError: anything but a mapping, or a dtype that does not fit.
        ValueError: names that are missing or of another model; shapes that do not fit.
    """
    named = _read("convert.from_maxtext", tensors)
    n = named["pre_alpha"].shape[-1]
    turn = _inverse_permutations if _is_lite(named) else _transposed
    res_beta = named["res_beta"].reshape(*named["pre_beta"].shape[:-1], -1)
    betas = [named["pre_beta"], named["post_beta"], turn(res_beta, n)]
    gates = [named[f"{group}_alpha_scale"] for group in GROUPS]
    return MHCParams(
        phi=_columns(named) * named[NORM][..., None],
        alpha=jnp.concatenate(gates, axis=-1),
        bias=jnp.concatenate(betas, axis=-1),
    )


def to_maxtext(
    params: MHCParams,
    *,
    like: Mapping[str, object] | None = None,
    streams: int | None = None,
) -> dict[str, jax.Array]:
    """The inverse of `from_maxtext`: tensors by MaxText's names.

    Without `like` the weight of the norm is ones, and `from_maxtext` gives the parameters back bit
    for bit. With it the weight is that of `like`, by which phi is divided; an entry of phi that is
    still what `from_maxtext(like)` makes of it keeps its bits, so that tensors come back bit for
    bit. Where the weight is 0 and phi is not, nothing unfolds, and the weight becomes 1.

    Args:
        params: of one hyper-connection, or of several stacked. Those for constraint "permutations"
            are mHC-lite's.
        like: the tensors that the parameters came from; None: no others.
        streams: n, which is checked; None: as the shape of phi tells it.

    Returns:
        The tensors that `from_maxtext` names, with a dot in `mhc_norm.scale`.

    Raises:
        TypeError, ValueError: as `to_deepseek_v4` and `from_maxtext`; a `like` of other shapes.
    """
    op = "convert.to_maxtext"
    phi, alpha, bias, n = _arrays.parts_of(op, params, streams, (_arrays.square, _arrays.permuted))
    is_lite = phi.shape[-1] != _arrays.square(n)
    norm = jnp.ones(phi.shape[:-1], phi.dtype)
    if like is not None:
        before = _read(op, like, argument="like")
        phi, norm = _unfold(op, phi, before)
        is_lite = _is_lite(before)  # of one stream the shape does not tell
    turn = _inverse_permutations if is_lite else _transposed
    tensors = {NORM: norm}
    for group, columns, beta, gate in zip(
        GROUPS,
        jnp.split(phi, [n, 2 * n], axis=-1),
        jnp.split(bias, [n, 2 * n], axis=-1),
        jnp.split(alpha, 3, axis=-1),
        strict=True,
    ):
        is_res = group == "res"
        beta = turn(beta, n) if is_res else beta
        shape = (*beta.shape[:-1], n, n) if is_res and not is_lite else beta.shape
        tensors[f"{group}_alpha"] = turn(columns, n) if is_res else columns
        tensors[f"{group}_beta"] = beta.reshape(shape)
        tensors[f"{group}_alpha_scale"] = gate
    return tensors


def head_from_maxtext(
    hc_fn: Float[ArrayLike, "*L n*C n"],
    hc_base: Float[ArrayLike, "*L n"],
    hc_scale: Float[ArrayLike, "*L 1"],
) -> HeadParams:
    """Parameters of MaxText's `DeepSeek4HyperHead`; use them with `presets.MAXTEXT`.

    Args:
        hc_fn: projection `[nC, n]`, which is our phi.
        hc_base: static part `[n]`.
        hc_scale: gate `[1]`.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    values = zip(HEAD_NAMES, (hc_fn, hc_base, hc_scale), strict=True)
    return _arrays.head("convert.head_from_maxtext", *values, columns_last=True)


def head_to_maxtext(
    params: HeadParams,
) -> tuple[Float[jax.Array, "*L n*C n"], Float[jax.Array, "*L n"], Float[jax.Array, "*L 1"]]:
    """The inverse of `head_from_maxtext`: `(hc_fn, hc_base, hc_scale)`, bit for bit.

    Raises:
        TypeError: anything but HeadParams, or a dtype that does not fit.
        ValueError: shapes that do not fit.
    """
    phi, alpha, bias = _arrays.head_parts_of("convert.head_to_maxtext", params)
    return phi, bias, alpha


def _unfold(op: str, phi: jax.Array, like: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Projection without the weight of the norm of `like`, and that weight."""
    before, norm = _columns(like).astype(phi.dtype), like[NORM].astype(phi.dtype)
    if before.shape != phi.shape:
        raise Refusal(ValueError, op, "like").expected(
            f"tensors of parameters with phi {list(phi.shape)}",
            f"those of one {list(before.shape)}",
            "Pass the tensors that the parameters came from.",
        )
    is_kept = before * norm[..., None] == phi
    is_lost = (norm == 0) & ~jnp.all(is_kept, axis=-1)
    norm = jnp.where(is_lost, 1, norm)
    divisor = jnp.where(norm == 0, 1, norm)[..., None]
    return jnp.where(is_kept & ~is_lost[..., None], before, phi / divisor), norm


def _columns(named: dict[str, jax.Array]) -> jax.Array:
    """The projection in our columns, without the weight of the norm."""
    n = named["pre_alpha"].shape[-1]
    turn = _inverse_permutations if _is_lite(named) else _transposed
    res = turn(named["res_alpha"], n)
    return jnp.concatenate([named["pre_alpha"], named["post_alpha"], res], axis=-1)


def shapes(*, lite: bool) -> dict[str, Callable[[int, int], tuple[int, ...]]]:
    """Shapes of the tensors, in the order of `NAMES`, for n streams of C channels."""

    def res_beta(n: int, c: int) -> tuple[int, ...]:
        return (math.factorial(n),) if lite else (n, n)

    special = {
        "res_alpha": lambda n, c: (n * c, math.prod(res_beta(n, c))),
        "res_beta": res_beta,
        NORM: lambda n, c: (n * c,),
    }
    of_group = {
        "alpha": lambda n, c: (n * c, n),
        "beta": lambda n, c: (n,),
        "alpha_scale": lambda n, c: (1,),
    }
    return {name: special.get(name) or of_group[name.partition("_")[2]] for name in NAMES}


def _read(
    op: str, tensors: Mapping[str, object], *, argument: str = "tensors"
) -> dict[str, jax.Array]:
    """The tensors by name, checked against each other."""
    if not isinstance(tensors, Mapping):
        raise Refusal(TypeError, op, argument).expected(
            "a mapping from MaxText's names to arrays",
            _errors.typed(tensors),
            f"The names are {', '.join(NAMES)}.",
        )
    given = dict(tensors)
    outer = NORM.partition(".")[0]
    if isinstance(nested := given.get(outer), Mapping):
        del given[outer]
        given |= {f"{outer}.{name}": value for name, value in nested.items()}
    if given.keys() != set(NAMES):
        raise Refusal(ValueError, op, argument).expected(
            f"the names {', '.join(NAMES)}",
            _arrays.difference(NAMES, given),
            "Pass the tensors of one ManifoldConstrainedHyperConnections.",
        )

    def name(tensor: str) -> str:
        return f"{argument}[{tensor!r}]"

    first = _arrays.floating(op, name("pre_alpha"), given["pre_alpha"])
    *batch, width, n = (0, 0, *first.shape)[-max(first.ndim, 2) :]
    if not 1 <= n <= MAX_STREAMS or not width or width % n:
        raise Refusal(ValueError, op, name("pre_alpha")).expected(
            f"shape [n·C, n] with n from 1 to {MAX_STREAMS}, or several stacked",
            list(first.shape),
            "It has a column for each stream.",
        )
    beta = _arrays.floating(op, name("res_beta"), given["res_beta"])
    is_lite = beta.ndim == len(batch) + 1 and n <= MAX_PERMUTED_STREAMS
    read = {
        tensor: _arrays.shaped(op, name(tensor), given[tensor], (*batch, *shape(n, width // n)))
        for tensor, shape in shapes(lite=is_lite).items()
    }
    dtype = np.result_type(*(value.dtype for value in read.values()))
    return {tensor: value.astype(dtype) for tensor, value in read.items()}


def _is_lite(named: dict[str, jax.Array]) -> bool:
    return named["res_beta"].ndim == named["pre_beta"].ndim


def _transposed(columns: jax.Array, n: int) -> jax.Array:
    """Columns of z[j, i] where those of z[i, j] were; its own inverse."""
    split = columns.reshape(*columns.shape[:-1], n, n)
    return split.swapaxes(-1, -2).reshape(columns.shape)


def _inverse_permutations(columns: jax.Array, n: int) -> jax.Array:
    """Columns of the inverse permutations; its own inverse."""
    permutations = list(itertools.permutations(range(n)))
    inverse = [permutations.index(tuple(np.argsort(p).tolist())) for p in permutations]
    return columns[..., np.array(inverse)]
