"""Checks of the arguments of the watch and of the plots."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mhc import _check, _errors
from jax_mhc._errors import Refusal
from jax_mhc.diagnostics._numbers import BAND, Gain, Mixing


def band(op: str, value: Any) -> tuple[float, float]:
    """The least and the largest gain that are in order."""
    try:
        low, high = map(float, value)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    if not 0 < low < high:
        raise Refusal(ValueError, op, "band").expected(
            "two numbers above 0, the smaller first",
            _errors.shown(value),
            f"A plain residual connection has 1; {BAND} suits mHC.",
        )
    return low, high


def gain(op: str, argument: str, value: Any) -> Gain:
    """A gain of arrays: of Python's and NumPy's numbers NumPy's, which ask no device."""
    if not isinstance(value, Gain):
        raise Refusal(TypeError, op, argument).expected(
            "jax_mhc.diagnostics.Gain",
            type(value).__name__,
            "Make it with jax_mhc.diagnostics.amax_gain.",
        )
    return _fields(op, argument, value)


def curves(op: str, argument: str, values: Gain | Mixing) -> Any:
    """The values of gains or of mixing `[L, ...]`, on the host."""
    values = _fields(op, argument, values)
    if any(isinstance(value, jax.core.Tracer) for value in values):
        raise Refusal(TypeError, op, argument).expected(
            "values that are known",
            "values of a traced function",
            "Return them from the jitted function and plot them outside of it.",
        )
    values = jax.device_get(values)
    for value in values:
        if np.ndim(value) < 1 or np.size(value) == 0 or np.shape(value) != np.shape(values[0]):
            raise Refusal(ValueError, op, argument).expected(
                "shape [L] or [L, ...], that of all its fields",
                list(np.shape(value)),
                "Give those of several sublayers or steps.",
            )
    return values


def _fields(op: str, argument: str, values: Any) -> Any:
    named = zip(values._fields, values, strict=True)
    return type(values)(*(_real_numbers(op, f"{argument}.{name}", value) for name, value in named))


def _real_numbers(op: str, argument: str, value: Any) -> Any:
    """Numbers that have an order; of Python's and NumPy's an array of NumPy's."""
    if isinstance(value, int | float | np.ndarray | np.generic):
        value = np.asarray(value)
    else:
        value = _check.array(op, argument, value)
    if jnp.issubdtype(value.dtype, jnp.integer):
        value = value.astype(float)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise Refusal(TypeError, op, argument).expected(
            "real numbers",
            f"dtype {value.dtype}",
            "Take what the functions of jax_mhc.diagnostics return.",
        )
    return value
