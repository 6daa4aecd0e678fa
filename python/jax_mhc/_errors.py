"""Errors at trace time: every message says op, argument, expected, got, and the remedy."""

from __future__ import annotations

import importlib
import inspect
import math
import reprlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np

from jax_mhc._limits import MAX_STREAMS

Choice = TypeVar("Choice", bound=str | None)

# The largest size of a dimension that XLA indexes with 32 bits.
MAX_SIZE = 2**31 - 1

_repr = reprlib.Repr()
_repr.maxother = _repr.maxstring = 60


class Refusal(NamedTuple):
    """The error for an argument that is refused: `raise Refusal(TypeError, op, x).expected(...)`.

    Attributes:
        error: the type of the error.
        op: the public function.
        argument: the argument, or a part of it, such as `params.bias`.
    """

    error: type[Exception]
    op: str
    argument: str

    def expected(self, expected: str, got: object, remedy: str) -> Exception:
        """The error, in the one form that all messages have."""
        where = f"jax_mhc.{self.op}: {self.argument}"
        return self.error(f"{where}: expected {expected}, got {got}. {remedy}")


def require(op: str, package: str, extra: str) -> ModuleType:
    """The optional dependency `package`, imported; the extra `jax-mhc[extra]` brings it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        # A package that is there and lacks one of its own tells more by itself.
        if error.name != package:
            raise
    raise Refusal(ImportError, op, package).expected(
        "an installed package", "none", f"Install it: pip install 'jax-mhc[{extra}]'."
    )


def shown(value: object) -> str:
    """A value in a message: on one line and short, whatever it is."""
    try:
        return " ".join(_repr.repr(value).split())
    except ValueError:
        assert isinstance(value, int)  # of more digits than Python prints
        return f"an int of {value.bit_length()} bits"


def typed(value: object) -> str:
    """A value of a wrong type in a message."""
    return f"{shown(value)} ({type(value).__name__})"


def integer(op: str, argument: str, value: object, low: int, high: int | None, remedy: str) -> int:
    """`value` as an int in [low, high]; bool is no number here."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise Refusal(TypeError, op, argument).expected("an int", typed(value), remedy)
    if value < low or (high is not None and value > high):
        bounds = f"an int of at least {low}" if high is None else f"an int from {low} to {high}"
        raise Refusal(ValueError, op, argument).expected(bounds, shown(int(value)), remedy)
    return int(value)


def number(op: str, argument: str, value: object, *, positive: bool = False) -> float:
    """`value` as a finite float of at least 0, or above 0."""
    remedy = "Settings are compiled in: pass a Python number."
    # Of NumPy's numbers complex ones are left, of which float() drops a part.
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise Refusal(TypeError, op, argument).expected("a float", typed(value), remedy)
    try:
        result = float(value)
    except OverflowError:  # an int
        result = math.inf
    if not math.isfinite(result) or result < 0 or (positive and result == 0):
        expected = "a finite number above 0" if positive else "a finite number of at least 0"
        raise Refusal(ValueError, op, argument).expected(expected, result, remedy)
    return result


def held(op: str, argument: str, value: float, dtype: np.dtype) -> float:
    """`value`, which `dtype` can hold: it would be infinity there, or 0, or 0 on some devices."""
    limits = np.finfo(dtype)
    least, most = float(limits.tiny), float(limits.max)
    if value and not least <= value <= most:
        raise Refusal(ValueError, op, argument).expected(
            f"0 or a number from {least:.2g} to {most:.2g}",
            value,
            f"Coefficients are computed in {dtype.name}, where it would be infinity or nothing.",
        )
    return value


def flag(op: str, argument: str, value: object) -> bool:
    """`value` as a bool: of anything else the truth may be another than is meant."""
    if not isinstance(value, bool | np.bool_):
        raise Refusal(TypeError, op, argument).expected(
            "True or False", typed(value), "It is a Python bool, known when the program is made."
        )
    return bool(value)


def text(op: str, argument: str, value: object) -> None:
    """`value` is a string."""
    if not isinstance(value, str):
        raise Refusal(TypeError, op, argument).expected(
            "a string", typed(value), "Give a name to be shown."
        )


def function(op: str, argument: str, value: object, expected: str, remedy: str) -> None:
    """`value` can be called."""
    if not callable(value):
        raise Refusal(TypeError, op, argument).expected(expected, type(value).__name__, remedy)


def takes(function: Callable[..., object], /, *args: object, **kwargs: object) -> bool:
    """True if a function can be called with these arguments, or does not tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def num_streams(op: str, argument: str, value: object) -> int:
    """A number of streams that the ops accept."""
    remedy = f"The number of streams is small (4 in the paper), at most {MAX_STREAMS}."
    return integer(op, argument, value, 1, MAX_STREAMS, remedy)


def width(op: str, value: object) -> int:
    """C, where it is given as a number."""
    return integer(op, "hidden", value, 1, MAX_SIZE, "It is the width of the layer, C.")


def choice(
    op: str, argument: str, value: object, choices: tuple[Choice, ...], *others: str
) -> Choice:
    """Returns the element of `choices` (None and strings) that equals `value`.

    The error names `others` beside them.
    """
    # Arrays have an == of their own.
    if value is None or isinstance(value, str):
        for each in choices:
            if each == value:
                return each
    raise Refusal(ValueError, op, argument).expected(
        f"one of {', '.join([*map(repr, choices), *others])}", shown(value), "Choose one of these."
    )
