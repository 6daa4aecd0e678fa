"""Helpers of the modules for Flax and Equinox: streams, parameters, and the call of their layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_mhc import _check, _errors
from jax_mhc._call.dispatch import Implementation
from jax_mhc._ops.streams import Streams
from jax_mhc._ops.sublayer import Options, Sublayer
from jax_mhc._types import HeadParams, Layer, MHCConfig, MHCParams

Params = TypeVar("Params", MHCParams, HeadParams)
#: For each parameter by its name, a name, or None, for each of its dimensions.
AxisNames = Mapping[str, tuple[str | None, ...]]

# The dtypes in which the values of each param_dtype are exact.
_HOLDERS = {
    "bfloat16": ("bfloat16", "float32", "float64"),
    "float16": ("float16", "float32", "float64"),
    "float32": ("float32", "float64"),
    "float64": ("float64",),
}
_RANKS = {"phi": 2, "alpha": 1, "bias": 1, "norm_scale": 1}

# The constant that tells keys of connections from those of layers: "mhc" in ASCII.
_FOLDED = 0x6D6863


def key(base: jax.Array, *counts: jax.Array | int) -> jax.Array:
    """A key for a connection, of one that a layer draws from or is made with."""
    for number in (_FOLDED, *counts):
        base = jax.random.fold_in(base, number)
    return base


def streams(op: str, x: object, num_streams: int, hidden: int) -> jax.Array | Streams:
    """Streams `[..., n, C]` of the n and C that a module was made for."""
    _errors.num_streams(op, "streams", num_streams)
    _errors.width(op, hidden)
    if not isinstance(x, Streams):
        x = _check.array(op, "x", x)
    if x.shape[-2:] != (num_streams, hidden):
        raise _errors.Refusal(ValueError, op, "x").expected(
            f"streams [..., {num_streams}, {hidden}]",
            list(x.shape),
            f"Make streams from a hidden state [..., {hidden}] with "
            f"jax_mhc.expand(u, streams={num_streams}), once, in front of the first layer.",
        )
    return x if isinstance(x, Streams) else _check.streams(op, "x", x)


def settings(
    op: str,
    *,
    layer: object,
    static: object,
    norm: object,
    norm_scale_eps: object,
    implementation: object,
) -> None:
    """Checks what the initial values do not."""
    remedy = "Pass the layer that the residual connection goes around."
    _errors.function(op, "layer", layer, "a module or function, layer(u, ...)", remedy)
    _errors.flag(op, "static", static)
    _errors.flag(op, "norm", norm)
    _check.norm_scale_eps(op, norm_scale_eps, np.dtype(np.float32))
    _check.implementation(op, implementation)


def param_dtype(op: str, value: DTypeLike | None) -> np.dtype:
    """The dtype in which a module stores its parameters."""
    try:
        # None is NumPy's float64.
        dtype = jnp.dtype("" if value is None else value)
        name = dtype.name
    except Exception:  # even a SyntaxError
        name = _errors.shown(value)
    if name in _HOLDERS:
        return dtype
    raise _errors.Refusal(TypeError, op, "param_dtype").expected(
        f"one of {', '.join(_HOLDERS)}",
        name,
        "Take float32, the default; coefficients are never computed in less.",
    )


def axis_names(op: str, value: object, parameters: Sequence[str] = tuple(_RANKS)) -> AxisNames:
    """Names of the parameters' dimensions; none where there is no value."""
    names = {} if value is None else value
    if not isinstance(names, Mapping) or not all(
        name in parameters
        and isinstance(axes, tuple | list)
        and len(axes) == _RANKS[name]
        and all(axis is None or isinstance(axis, str) for axis in axes)
        for name, axes in names.items()
    ):
        raise _errors.Refusal(ValueError, op, "axis_names").expected(
            f"a mapping of {', '.join(parameters)}, or some of them, to a name or None for each "
            "dimension",
            _errors.shown(value),
            "Give phi two and the others one, such as {'phi': ('embed', None), 'bias': (None,)}.",
        )
    return {name: tuple(axes) for name, axes in names.items()}


def initial(
    init: Callable[..., Params], key: object, dtype: DTypeLike, **arguments: object
) -> Params:
    """The values that `init` makes, stored in a module's param_dtype."""
    dtype = jnp.dtype(dtype)
    params = init(key, dtype=_check.accumulation_dtype(dtype), **arguments)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def widened(op: str, name: str, value: Any, dtype: DTypeLike) -> Any:
    """A stored parameter as the functions of jax_mhc take it: in float32, or float64 as it is.

    Its values are exact. One with less precision than the module's param_dtype is refused: it was
    rounded where nobody asked for it.
    """
    stored = getattr(value, "dtype", None)
    if stored is None:  # None, or what stands for an array in a tree
        return value
    dtype = jnp.dtype(dtype).name
    if stored.name not in _HOLDERS[dtype]:
        cast = ""
        if stored.name in _HOLDERS:
            cast = f" Or make the module with param_dtype=jnp.{stored.name}."
        raise _errors.Refusal(TypeError, op, name).expected(
            f"the module's param_dtype, {dtype}, or more precision",
            stored.name,
            "Where a model is cast whole, cast only what jax_mhc.param_labels calls 'other', as "
            f"docs/dtypes.md shows.{cast}",
        )
    return value if stored.name in ("float32", "float64") else value.astype(np.float32)


def all_widened(op: str, params: Params, dtype: DTypeLike) -> Params:
    """`widened` of all parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, value: widened(op, path[0].name, value, dtype), params
    )


def residual(
    op: str,
    layer: Layer,
    x: jax.Array | Streams,
    params: MHCParams,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    *,
    config: MHCConfig,
    norm_scale: jax.Array | None,
    norm_scale_eps: float,
    implementation: Implementation,
) -> tuple[Any, jax.Array]:
    """`mhc_residual`, and h_res; of a layer that returns `(y, *rest)`, `(streams, *rest)`."""

    def run(u: jax.Array) -> tuple[jax.Array, tuple[object, ...] | None]:
        out = _check.call(op, "layer", "u and the arguments of the call", layer, u, *args, **kwargs)
        # An empty tuple is no array, which the check says.
        returns_rest = isinstance(out, tuple) and len(out) > 0
        y, rest = (out[0], out[1:]) if returns_rest else (out, None)
        return _check.layer_output(op, "the layer's result", y, x), rest

    options: Options = {
        "config": config,
        "norm_scale_eps": norm_scale_eps,
        "hidden_axis_name": None,
        "implementation": implementation,
    }
    x_new, ctx, rest = Sublayer(run, params, norm_scale, options).run(x)
    return (x_new if rest is None else (x_new, *rest)), ctx.h_res
