"""The warning for a layer that is a function over a module, whose parameters nobody sees."""

from __future__ import annotations

import dis
import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Packages whose frames lie between the warning and the line that made the module.
_NOT_THE_USER = {"jax_mhc", "flax", "equinox", "jax"}


def warn_if_hidden(
    op: str, layer: object, module: type, hides: Callable[[Any], bool], *, remedy: str = ""
) -> None:
    """Warns if a layer, a function, holds something whose parameters its module does not have.

    Args:
        op: the public module.
        layer: what the module wraps.
        module: the library's class of modules, whose parameters the model has.
        hides: whether a value that a function holds has parameters.
        remedy: what to do beside handing over the module.
    """
    if isinstance(layer, module):
        return
    for held in _held(layer, hides, set()):
        if hides(held):
            warnings.warn(
                f"jax_mhc.{op}: layer: expected a module, or a function without parameters, got a "
                f"function over a {type(held).__name__}, whose parameters the model does not have, "
                "so that no optimizer finds them. Pass the module itself, or one of your own that "
                f"has it as an attribute and does what the function does. {remedy}".rstrip(),
                stacklevel=_level(),
            )
            return


def _held(value: Any, hides: Callable[[Any], bool], seen: set[int]) -> Iterator[Any]:
    """Values that functions hold: in closures, bound arguments, defaults and globals they read."""
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, jax.tree_util.Partial):
        parts = [value.func]  # the arguments are leaves, which the model has
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        parts = [value.__self__]
    elif isinstance(value, types.FunctionType):
        parts = [*_cells(value), value.__defaults__, value.__kwdefaults__]
        # A function among them may be anyone's, and lead anywhere.
        parts += [each for each in _globals(value) if not callable(each) or hides(each)]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, dict):
        parts = list(value.values())
    elif hides(value):
        yield value
    elif "__wrapped__" in getattr(value, "__dict__", {}):  # what jax.jit makes of a function
        parts = [value.__wrapped__]
    for part in parts:
        yield from _held(part, hides, seen)


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # of a name that has no value yet
            continue


def _globals(function: types.FunctionType) -> Iterator[Any]:
    """The values of the global names that a function, or one within it, reads."""
    codes = [function.__code__]
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
        for instruction in dis.get_instructions(code):
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval in function.__globals__:
                yield function.__globals__[instruction.argval]


def _level() -> int:
    """The stack level of the line that made the module."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_USER:
            break
        frame, level = frame.f_back, level + 1
    return level
