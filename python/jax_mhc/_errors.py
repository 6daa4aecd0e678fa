"""Errors at trace time: every message says op, argument, expected, got, and the remedy."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

# The kernels keep one token's coefficients in registers and on the stack. A larger number is nearly
# always a tensor laid out [..., hidden, streams].
MAX_STREAMS = 16

# Streams of which there are few enough permutations: 5 have 120.
MAX_PERMUTED_STREAMS = 4


def fail(
    error: type[Exception], op: str, argument: str, expected: str, got: object, remedy: str
) -> NoReturn:
    """Raises `error` in the one form that all messages have."""
    raise error(f"jax_mhc.{op}: {argument}: expected {expected}, got {got}. {remedy}")


def require(op: str, package: str, extra: str) -> ModuleType:
    """The optional dependency `package`, imported; the extra `jax-mhc[extra]` brings it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        # A package that is there and lacks one of its own tells more by itself.
        if error.name != package:
            raise
    fail(
        ImportError, op, package, "an installed package", "none",
        f"Install it: pip install 'jax-mhc[{extra}]'.",
    )  # fmt: skip


def integer(op: str, argument: str, value: Any, low: int, high: int | None, remedy: str) -> int:
    """`value` as an int in [low, high]; bool is no number here."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        fail(TypeError, op, argument, "an int", f"{value!r} ({type(value).__name__})", remedy)
    if value < low or (high is not None and value > high):
        bounds = f"an int of at least {low}" if high is None else f"an int from {low} to {high}"
        fail(ValueError, op, argument, bounds, int(value), remedy)
    return int(value)


def number(op: str, argument: str, value: Any, *, positive: bool = False) -> float:
    """`value` as a finite float of at least 0, or above 0."""
    remedy = "Settings are compiled in: pass a Python number."
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        fail(TypeError, op, argument, "a float", f"{value!r} ({type(value).__name__})", remedy)
    value = float(value)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        expected = "a finite number above 0" if positive else "a finite number of at least 0"
        fail(ValueError, op, argument, expected, value, remedy)
    return value


def num_streams(op: str, argument: str, value: Any) -> int:
    """A number of streams that the ops accept."""
    return integer(
        op, argument, value, 1, MAX_STREAMS,
        f"The number of streams is small (4 in the paper), at most {MAX_STREAMS}.",
    )  # fmt: skip


def choice(op: str, argument: str, value: Any, choices: tuple[Any, ...]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        fail(
            ValueError, op, argument, f"one of {', '.join(map(repr, choices))}", repr(value),
            "Choose one of these.",
        )  # fmt: skip
