"""Checks of the arguments of the ops, at trace time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_mhc import _errors
from jax_mhc._axes import varying_axes
from jax_mhc._errors import Refusal
from jax_mhc._limits import MAX_PERMUTED_STREAMS, MAX_STREAMS, STREAM_DTYPES
from jax_mhc._types import NUMBERS, Context, HeadParams, MHCConfig, MHCParams

Result = TypeVar("Result")


class Shaped(Protocol):
    """Streams, as an array or as `jax_mhc.Streams`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype."""


def accumulation_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of coefficients, parameters and sums for streams of `dtype`."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def array(op: str, argument: str, value: object) -> jax.Array:
    """`value` as a JAX array that is not weakly typed."""
    if hasattr(type(value), "is_deferred"):  # Streams, which build on this file
        raise Refusal(TypeError, op, argument).expected(
            "an array",
            repr(value),
            "Streams are for the argument x alone: x.array() gives them as an array [..., n, C], "
            "jax_mhc.reduce(x) a hidden state [..., C].",
        )
    if not isinstance(value, jax.Array | np.ndarray | np.generic) and not hasattr(
        value, "__jax_array__"
    ):
        raise Refusal(TypeError, op, argument).expected(
            "an array", type(value).__name__, "Convert it with jax.numpy.asarray."
        )
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise Refusal(TypeError, op, argument).expected(
            "an array of numbers",
            _errors.typed(value),
            "Arrays of Python objects or of strings, and masked ones, have to be converted.",
        ) from error
    if not isinstance(value, jax.core.Tracer) and value.is_deleted():
        raise Refusal(ValueError, op, argument).expected(
            "an array with values",
            f"a deleted one, {value.dtype.name}{list(value.shape)}",
            "Its memory was given away, such as by donate_argnums; use what came back instead.",
        )
    # A weak type would not survive the op, and so would change a scan's carry.
    return jnp.asarray(value, dtype=value.dtype)


def shape(op: str, argument: str, value: object) -> tuple[int, ...]:
    """The shape of what JAX takes for an array, Python's numbers too, which stays what it is."""
    try:
        return jax.typeof(jnp.asarray(value) if hasattr(value, "__jax_array__") else value).shape
    except TypeError as error:
        raise Refusal(TypeError, op, argument).expected(
            "an array", _errors.typed(value), "Convert it with jax.numpy.asarray."
        ) from error


def key(op: str, argument: str, value: object) -> None:
    """Checks one random key, of either of JAX's kinds."""
    key, got = None, _errors.typed(value)
    if isinstance(value, jax.Array | np.ndarray) or hasattr(type(value), "__jax_array__"):
        key = array(op, argument, value)
        got = f"{key.dtype.name}{list(key.shape)}"
        if key.dtype == np.uint32:  # the older kind
            try:
                key = jax.random.wrap_key_data(key)
            except (TypeError, ValueError):
                key = None
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        raise Refusal(TypeError, op, argument).expected(
            "a random key", got, "Make one with jax.random.key(seed); for several, use jax.vmap."
        )


def hidden_state(op: str, argument: str, u: object) -> jax.Array:
    """A hidden state `[..., C]` of a dtype that the ops accept."""
    u = array(op, argument, u)
    if u.dtype.name not in STREAM_DTYPES:
        raise Refusal(TypeError, op, argument).expected(
            f"dtype {', '.join(STREAM_DTYPES)}",
            u.dtype.name,
            "Convert it, for example with u.astype(jnp.float32).",
        )
    if u.ndim < 1 or u.shape[-1] < 1:
        raise Refusal(ValueError, op, argument).expected(
            "shape [..., C] with C at least 1",
            list(u.shape),
            "The last axis is the hidden width; only leading axes may be empty.",
        )
    return u


def streams(op: str, argument: str, x: object) -> jax.Array:
    """Residual streams `[..., n, C]` of a dtype that the ops accept."""
    x = array(op, argument, x)
    if x.dtype.name not in STREAM_DTYPES:
        raise Refusal(TypeError, op, argument).expected(
            f"streams of dtype {', '.join(STREAM_DTYPES)}",
            x.dtype.name,
            "Convert them, for example with x.astype(jnp.float32).",
        )
    if x.ndim < 2:
        raise Refusal(ValueError, op, argument).expected(
            "streams of shape [..., n, C]",
            list(x.shape),
            "Make streams from a hidden state [..., C] with jax_mhc.expand.",
        )
    if not 1 <= x.shape[-2] <= MAX_STREAMS:
        remedy = "The streams are the axis before the last"
        if 1 <= x.shape[-1] <= MAX_STREAMS:
            remedy += "; swap the last two axes?"
        elif x.ndim > 3 and 1 <= x.shape[0] <= MAX_STREAMS:
            remedy += "; if they are the first, move them with jnp.moveaxis(x, 0, -2)."
        else:
            remedy += ": make them of a hidden state [..., C] with jax_mhc.expand."
        raise Refusal(ValueError, op, argument).expected(
            f"shape [..., n, C] with n from 1 to {MAX_STREAMS}", list(x.shape), remedy
        )
    if x.shape[-1] < 1:
        raise Refusal(ValueError, op, argument).expected(
            "shape [..., n, C] with C at least 1",
            list(x.shape),
            "The last axis is the hidden width; only leading axes may be empty.",
        )
    return x


def hidden_axes(op: str, value: object, x: jax.Array) -> tuple[str, ...]:
    """The axes of the enclosing `jax.shard_map` over which the channels of x are split."""
    argument = "hidden_axis_name"
    remedy = (
        "It is for C that is split inside of jax.shard_map (with check_vma=True); elsewhere "
        "leave it out, since JAX itself knows how C is split."
    )
    names = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise Refusal(TypeError, op, argument).expected(
            "the name of a mesh axis, or several, or None", _errors.typed(value), remedy
        )
    varying = varying_axes(x)
    if not varying.issuperset(names) or len(set(names)) < len(names):
        raise Refusal(ValueError, op, argument).expected(
            f"different mesh axes over which x varies, here {sorted(varying)}",
            _errors.shown(value),
            remedy,
        )
    return tuple(names)


def implementation(op: str, value: object) -> None:
    """Checks an implementation: None, "fused" or "reference"."""
    _errors.choice(op, "implementation", value, (None, "fused", "reference"))


def num_channels(x: Shaped, hidden_axes: tuple[str, ...]) -> int:
    """C, of which x may have a part."""
    return x.shape[-1] * math.prod(jax.lax.axis_size(axis) for axis in hidden_axes)


def call(
    op: str,
    argument: str,
    what: str,
    layer: Callable[..., Result],
    /,
    *args: object,
    **kwargs: object,
) -> Result:
    """Calls a layer; if these arguments do not fit, the error names them by `what`."""
    try:
        return layer(*args, **kwargs)
    except TypeError as error:
        if _errors.takes(layer, *args, **kwargs):
            raise
        reason = str(error).partition("\n")[0].rstrip(".")
    raise Refusal(TypeError, op, argument).expected(
        f"a function of {what}",
        f"one that is not: {reason}",
        "Bind its other arguments, for example with functools.partial.",
    )


def output_and_aux(op: str, argument: str, result: Any, *, has_aux: bool) -> tuple[Any, Any]:
    """The output of a layer and, with has_aux, what it returned beside it."""
    is_tuple = isinstance(result, tuple)
    got = f"a tuple of {len(result)}" if is_tuple else type(result).__name__
    if has_aux:
        if not is_tuple or len(result) != 2:
            raise Refusal(TypeError, op, argument).expected(
                "a pair (y, aux), since has_aux is set",
                got,
                "Return (y, None) where there is no aux, or leave has_aux out.",
            )
        y, aux = result
        return y, aux
    if is_tuple:
        raise Refusal(TypeError, op, argument).expected(
            "one array", got, "Set has_aux=True for a layer that returns (y, aux)."
        )
    return result, None


def layer_output(op: str, argument: str, y: object, x: Shaped) -> jax.Array:
    """A layer's result `[..., C]` that belongs to the streams `x`."""
    y = array(op, argument, y)
    if y.dtype != x.dtype:
        raise Refusal(TypeError, op, argument).expected(
            f"the dtype of the streams, {x.dtype.name}",
            y.dtype.name,
            f"Convert it with y.astype(jnp.{x.dtype.name}).",
        )
    expected = (*x.shape[:-2], x.shape[-1])
    if y.shape != expected:
        raise Refusal(ValueError, op, argument).expected(
            f"shape {list(expected)} for streams {list(x.shape)}",
            list(y.shape),
            "The layer must return one array of the shape of its input.",
        )
    return y


def _parameter(
    op: str, argument: str, value: object, shape: tuple[int, ...], dtype: np.dtype, remedy: str
) -> jax.Array:
    value = array(op, argument, value)
    if value.dtype != dtype:
        raise Refusal(TypeError, op, argument).expected(
            f"dtype {dtype.name} (parameters are float32, or float64 where the streams are)",
            value.dtype.name,
            f"Convert the parameters with .astype(jnp.{dtype.name}).",
        )
    if value.shape != shape:
        raise Refusal(ValueError, op, argument).expected(
            f"shape {list(shape)}", list(value.shape), remedy
        )
    return value


def params(
    op: str,
    params: MHCParams,
    x: Shaped,
    config: MHCConfig,
    argument: str = "params",
    hidden_axes: tuple[str, ...] = (),
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    """phi, alpha and bias of one sublayer, checked against the streams and the config."""
    if not isinstance(params, MHCParams):
        raise Refusal(TypeError, op, argument).expected(
            "jax_mhc.MHCParams", type(params).__name__, "Make them with jax_mhc.init_params."
        )
    n, hidden = x.shape[-2], num_channels(x, hidden_axes)
    dtype = accumulation_dtype(x.dtype)
    num = config.num_coefficients(n, hidden=hidden, op=op)
    is_static = config.form == "channels"
    remedy = (
        f"For streams {list(x.shape)} and {config._described()} make them with "
        f"jax_mhc.init_params(key, streams={n}, hidden={hidden}, config=config"
        f"{', static=True' if is_static else ''})."
    )
    if (own := _streams_of(params, hidden, config, op)) not in (None, n):
        places = [at for at, size in enumerate(x.shape[:-2]) if size == own]
        move = f": move them with jnp.moveaxis(x, {places[0]}, -2)." if places else "."
        remedy = (
            f"These are of {own} streams, and streams {list(x.shape)} have {n}, the axis before "
            f"the last{move}"
        )
    bias = _parameter(op, f"{argument}.bias", params.bias, (num,), dtype, remedy)
    if (params.phi is None) != (params.alpha is None):
        got = "phi=None" if params.phi is None else "alpha=None"
        raise Refusal(ValueError, op, argument).expected(
            "phi and alpha both given, or both None (static)",
            got,
            "Static coefficients come from the bias alone: set both to None.",
        )
    if params.phi is None:
        return None, None, bias
    if is_static:
        raise Refusal(ValueError, op, f"{argument}.phi").expected(
            "None for form 'channels'", "an array", remedy
        )
    shape = config._phi_shape(n, hidden, op)
    phi = _parameter(op, f"{argument}.phi", params.phi, shape, dtype, remedy)
    alpha = _parameter(op, f"{argument}.alpha", params.alpha, (config.num_gates(),), dtype, remedy)
    return phi, alpha, bias


def _streams_of(params: MHCParams, hidden: int, config: MHCConfig, op: str) -> int | None:
    """The number of streams that parameters of this width are of; None where they do not tell."""
    phi: tuple[int, ...] = getattr(params.phi, "shape", ())
    bias: tuple[int, ...] = getattr(params.bias, "shape", ())
    if len(phi) != 2 or phi[0] % hidden or not 1 <= phi[0] // hidden <= MAX_STREAMS:
        return None
    own = phi[0] // hidden
    if config.constraint == "permutations" and own > MAX_PERMUTED_STREAMS:
        return None
    fits = bias == (config.num_coefficients(own, hidden=hidden, op=op),)
    return own if fits else None


def norm_scale(
    op: str,
    scale: object,
    eps: object,
    x: Shaped,
    argument: str = "norm_scale",
    hidden_axes: tuple[str, ...] = (),
) -> tuple[jax.Array | None, float]:
    """The norm of the layer's input: its parameter, checked against the streams, and its eps."""
    dtype = accumulation_dtype(x.dtype)
    eps = norm_scale_eps(op, eps, dtype)
    if scale is None:
        return None, eps
    remedy = f"It has one value for each channel of the streams {list(x.shape)}."
    shape = (num_channels(x, hidden_axes),)
    return _parameter(op, argument, scale, shape, dtype, remedy), eps


def output_bias(op: str, bias: object, y: jax.Array) -> jax.Array:
    """The bias of a layer's output, checked against that output."""
    remedy = f"It has one value for each channel of the layer's output {list(y.shape)}."
    return _parameter(op, "bias", bias, (y.shape[-1],), accumulation_dtype(y.dtype), remedy)


def norm_scale_eps(op: str, eps: object, dtype: np.dtype) -> float:
    """The eps of a norm that is computed in `dtype`."""
    return _errors.held(op, argument := "norm_scale_eps", _errors.number(op, argument, eps), dtype)


def head_params(
    op: str, params: HeadParams, x: jax.Array, hidden_axes: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """phi, alpha and bias of the head, checked against the streams."""
    if not isinstance(params, HeadParams):
        raise Refusal(TypeError, op, "params").expected(
            "jax_mhc.HeadParams", type(params).__name__, "Make them with jax_mhc.init_head."
        )
    n, hidden = x.shape[-2], num_channels(x, hidden_axes)
    dtype = accumulation_dtype(x.dtype)
    remedy = (
        f"For streams {list(x.shape)} make them with "
        f"jax_mhc.init_head(key, streams={n}, hidden={hidden})."
    )
    return (
        _parameter(op, "params.phi", params.phi, (n * hidden, n), dtype, remedy),
        _parameter(op, "params.alpha", params.alpha, (1,), dtype, remedy),
        _parameter(op, "params.bias", params.bias, (n,), dtype, remedy),
    )


def context(op: str, ctx: Context) -> Context:
    """A context whose arrays fit together."""
    if not isinstance(ctx, Context):
        raise Refusal(TypeError, op, "ctx").expected(
            "the context that jax_mhc.pre or jax_mhc.post_pre returned",
            type(ctx).__name__,
            "Pass the second value that pre returned.",
        )
    x = streams(op, "ctx.x", ctx.x)
    *tokens, n, hidden = x.shape
    of_streams = (*tokens, n)
    if getattr(ctx.h_post, "ndim", None) == x.ndim:  # of form "channels"
        of_streams = (*(1 for _ in tokens), n, hidden)
    dtype = accumulation_dtype(x.dtype)
    remedy = "Pass the context as pre returned it; its arrays belong together."
    deferred = ctx._deferred
    if deferred is not None:
        deferred = array(op, "ctx", deferred)
        if (deferred.shape, deferred.dtype) != (x.shape, x.dtype):
            raise Refusal(ValueError, op, "ctx").expected(
                f"leaves for streams {x.dtype.name}{list(x.shape)}",
                f"one for {deferred.dtype.name}{list(deferred.shape)}",
                remedy,
            )
    return Context._of(
        x=x,
        deferred=deferred,
        h_pre=_coefficient(op, "ctx.h_pre", ctx.h_pre, of_streams, dtype, remedy),
        h_post=_coefficient(op, "ctx.h_post", ctx.h_post, of_streams, dtype, remedy),
        h_res=_coefficient(op, "ctx.h_res", ctx.h_res, (*tokens, n, n), dtype, remedy),
    )


def _coefficient(
    op: str, argument: str, value: object, shape: tuple[int, ...], dtype: np.dtype, remedy: str
) -> jax.Array:
    value = array(op, argument, value)
    if value.dtype != dtype:
        raise Refusal(TypeError, op, argument).expected(
            f"dtype {dtype.name}", value.dtype.name, remedy
        )
    if value.shape != shape:
        raise Refusal(ValueError, op, argument).expected(
            f"shape {list(shape)}", list(value.shape), remedy
        )
    return value


def given_weights(op: str, h_pre: object, x: Shaped, argument: str = "h_pre") -> jax.Array:
    """Weights `[..., n]` of the streams in their sum, which an array of streams does not carry."""
    if h_pre is None:
        raise Refusal(ValueError, op, "x").expected(
            "Streams, which carry the h_pre of the sublayer before, or h_pre beside an array",
            f"an array {list(x.shape)} alone",
            "Begin with jax_mhc.expand or jax_mhc.as_streams, and keep the Streams that the "
            "sublayers return.",
        )
    dtype, remedy = accumulation_dtype(x.dtype), "Each token has a weight for each of its streams."
    return _coefficient(op, argument, h_pre, x.shape[:-1], dtype, remedy)


def matrices(op: str, argument: str, value: object) -> jax.Array:
    """Matrices `[..., n, n]`, such as h_res or its logits, in an accumulation dtype."""
    value = array(op, argument, value)
    if value.dtype.name not in ("float32", "float64"):
        raise Refusal(TypeError, op, argument).expected(
            "matrices of dtype float32 or float64",
            value.dtype.name,
            f"Convert them with {argument}.astype(jnp.float32): sums of half precision are not 1.",
        )
    shape = value.shape
    if value.ndim < 2 or shape[-1] != shape[-2] or not 1 <= shape[-1] <= MAX_STREAMS:
        raise Refusal(ValueError, op, argument).expected(
            f"shape [..., n, n] with n from 1 to {MAX_STREAMS}",
            list(shape),
            "Each token has one square matrix; of others rows and columns cannot all sum to 1.",
        )
    return value


def config(op: str, config: MHCConfig, dtype: np.dtype) -> MHCConfig:
    """A config for streams of `dtype`, whose coefficients can hold its numbers."""
    if not isinstance(config, MHCConfig):
        raise Refusal(TypeError, op, "config").expected(
            "jax_mhc.MHCConfig",
            type(config).__name__,
            "Make one with jax_mhc.MHCConfig(...) or take one of jax_mhc.presets.",
        )
    for field in NUMBERS:
        _errors.held(op, f"config.{field}", getattr(config, field), accumulation_dtype(dtype))
    return config
