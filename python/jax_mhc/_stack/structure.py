"""The structure of jaxprs as a key: equal for programs that are alike, whichever call traced them.

Outside of `jax.jit` every call traces its layers anew, and functions written in place are new
objects every time. What is compiled for such a call is found again by the structure of what it
traced.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import jax


def structure(jaxpr: Any) -> Hashable:
    """The structure of a jaxpr: its primitives, their parameters, and what flows between them.

    A parameter that cannot be compared by value, such as an array or a function that was traced
    anew, equals itself alone.
    """
    numbers: dict[int, int] = {}

    def define(variables: Iterable[Any]) -> Hashable:
        for variable in variables:
            numbers[id(variable)] = len(numbers)
        return tuple(variable.aval for variable in variables)

    def use(atom: Any) -> Hashable:
        if id(atom) in numbers:
            return numbers[id(atom)]
        return _value(getattr(atom, "val", atom)), atom.aval

    inputs = define(jaxpr.constvars), define(jaxpr.invars)
    eqns = []
    for eqn in jaxpr.eqns:
        used = tuple(map(use, eqn.invars))
        parameters = tuple((name, _value(eqn.params[name])) for name in sorted(eqn.params))
        eqns.append((eqn.primitive, used, parameters, define(eqn.outvars)))
    return inputs, tuple(eqns), tuple(map(use, jaxpr.outvars))


def _value(value: Any) -> Hashable:
    if hasattr(value, "jaxpr") and hasattr(value, "consts"):
        return structure(value.jaxpr), tuple(map(_value, value.consts))
    if hasattr(value, "eqns"):
        return structure(value)
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_value, value))
    if isinstance(value, bool | int | float | complex) and not isinstance(value, jax.Array):
        # The sign of a zero, and a NaN, are told by the text alone.
        return type(value), repr(value)
    try:
        hash(value)
    except TypeError:
        return _Itself(value)
    return value


class _Itself:
    """A value that equals nothing but itself, and is kept, so that no other takes its place."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value
