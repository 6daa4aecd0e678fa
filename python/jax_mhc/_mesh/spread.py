"""A call that is spread over devices, and how its arrays lie on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jax_mhc._axes import Axes
from jax_mhc._call.primitive import bind
from jax_mhc._call.table import Call, dims
from jax_mhc._errors import fail


class Value(NamedTuple):
    """An operand or result of a call that is spread.

    mapped: whether it has the axis of a batch in front; see `Spread`.
    """

    name: str
    mapped: bool

    def each(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`function` of a value, or of each element of a batch of them."""
        return jax.vmap(function) if self.mapped else function


class Spread(NamedTuple):
    """A call, and how it is spread; hashable.

    mapped: of each operand, whether its first axis is that of a batch whose elements have
        parameters, or gradients of parameters, of their own; all results have this axis. None: no
        such batch.
    hidden_axes: the manual axes over which C is split.
    """

    call: Call
    mapped: tuple[bool, ...] | None = None
    hidden_axes: Axes = ()

    def operands(self) -> list[Value]:
        """Its operands, in order."""
        names = self.call.operands
        return list(map(Value, names, self.mapped or [False] * len(names)))

    def results(self) -> list[Value]:
        """Its results, in order."""
        return [Value(name, self.mapped is not None) for name in self.call.results]


class Layout(NamedTuple):
    """How the arrays of a call lie on a mesh.

    lead: the axes over which each leading dimension of the streams is split, first that of a batch
        if there is one.
    hidden: those of C.
    """

    lead: tuple[Axes, ...]
    hidden: Axes

    def axes(self) -> Axes:
        """All axes over which anything is split."""
        return tuple(axis for axes in (*self.lead, self.hidden) for axis in axes)

    def spec(self, spread: Spread, value: Value) -> PartitionSpec:
        """Of one value, phi being [n, C, K]."""
        tokens = self.lead if spread.mapped is None else self.lead[1:]
        of_dims: list[Axes] = [self.lead[0]] if value.mapped else []
        for dim in dims(value.name):
            of_dims += tokens if dim == "*" else [self.hidden if dim == "C" else ()]
        return PartitionSpec(*(axes or None for axes in of_dims))


def check_streams(call: Call, name: str, axes: Axes) -> None:
    """The streams of a token are on one device."""
    if axes:
        fail(
            ValueError, call.op, name, "streams [..., n, C] whose n is not split over devices",
            f"n split over mesh axes {axes}",
            "Every stream mixes with every other: split leading dimensions, or C.",
        )  # fmt: skip


def pack(values: Iterable[Value], arrays: Sequence[Any], streams: int) -> list[Any]:
    """phi, or its gradient, from [n·C, K] to [n, C, K]; others as they are."""

    def packed(array: Any) -> Any:
        return array.reshape(streams, array.shape[0] // streams, array.shape[1])

    return _of_phi(packed, values, arrays)


def unpack(values: Iterable[Value], arrays: Sequence[Any]) -> list[Any]:
    """The other way round."""

    def unpacked(array: Any) -> Any:
        return array.reshape(array.shape[0] * array.shape[1], array.shape[2])

    return _of_phi(unpacked, values, arrays)


def _of_phi(
    function: Callable[[Any], Any], values: Iterable[Value], arrays: Sequence[Any]
) -> list[Any]:
    return [
        value.each(function)(array) if value.name in ("phi", "d_phi") else array
        for value, array in zip(values, arrays, strict=True)
    ]


def run_here(spread: Spread, *operands: Any) -> Sequence[Any]:
    """Runs a call, or a batch of calls, on one device, phi being [n, C, K]."""
    whole = unpack(spread.operands(), operands)
    results = bind(spread.call, *whole, mapped=spread.mapped)
    return pack(spread.results(), results, operands[0].shape[-2])


def map_batch(function: Callable[..., Any], spread: Spread, operands: Sequence[Any]) -> Any:
    """One element of a batch after the other; operands that are not mapped are the same for all."""
    pairs = list(zip(spread.operands(), operands, strict=True))

    def one(elements: list[Any]) -> Any:
        element = iter(elements)
        return function(*(next(element) if value.mapped else array for value, array in pairs))

    return jax.lax.map(one, [array for value, array in pairs if value.mapped])
