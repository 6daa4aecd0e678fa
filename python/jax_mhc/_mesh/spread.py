"""A call that is spread over devices, and how its arrays are sharded over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from jax_mhc._axes import Axes
from jax_mhc._call.primitive import bind
from jax_mhc._call.table import Call, Value, Values
from jax_mhc._errors import fail


class Spread(NamedTuple):
    """A call, and how it is spread; hashable.

    Attributes:
        call: the call.
        mapped: the names of the operands whose first axis is that of a batch whose elements have
            parameters, or gradients of parameters, of their own; all results have this axis. None:
            no such batch.
        hidden_axes: the manual axes over which C is sharded.
    """

    call: Call
    mapped: tuple[str, ...] | None = None
    hidden_axes: Axes = ()

    @property
    def has_batch(self) -> bool:
        """Whether the call is a batch of calls."""
        return self.mapped is not None

    def is_mapped(self, operand: str) -> bool:
        """Whether an operand has the axis of a batch."""
        return self.mapped is not None and operand in self.mapped

    def operands(self) -> dict[str, tuple[Value, bool]]:
        """The operands by name: the row of the table, and whether it has the axis of a batch."""
        return {
            value.name: (value, self.is_mapped(value.name)) for value in self.call.operand_values
        }

    def results(self) -> dict[str, tuple[Value, bool]]:
        """The results by name: the row of the table, and whether it has the axis of a batch."""
        return {value.name: (value, self.has_batch) for value in self.call.result_values}


class MeshLayout(NamedTuple):
    """How the arrays of a call are sharded over a mesh.

    Attributes:
        lead: the axes over which each leading dimension of the streams is sharded, first that of a
            batch if there is one.
        hidden: the axes over which C is sharded.
    """

    lead: tuple[Axes, ...]
    hidden: Axes

    def axes(self) -> Axes:
        """All axes over which anything is sharded."""
        return tuple(axis for axes in (*self.lead, self.hidden) for axis in axes)

    def spec(self, spread: Spread, value: Value, is_mapped: bool) -> PartitionSpec:
        """The sharding of an operand or result."""
        tokens = self.lead[1:] if spread.has_batch else self.lead
        of_dims: list[Axes] = [self.lead[0]] if is_mapped else []
        if value.has_tokens:
            of_dims += tokens
        of_dims += [self.hidden if dim == "C" else () for dim in value.dims]
        return PartitionSpec(*(axes or None for axes in of_dims))


def check_streams(call: Call, name: str, axes: Axes) -> None:
    """Raises unless the streams of a token are on one device."""
    if axes:
        fail(
            ValueError, call.op, name, "streams [..., n, C] whose n is not split over devices",
            f"n split over mesh axes {axes}",
            "Every stream mixes with every other: split leading dimensions, or C.",
        )  # fmt: skip


def run_here(spread: Spread, operands: Values) -> Values:
    """The results of a call, or of a batch of calls, on one device."""
    return bind(spread.call, operands, mapped=spread.mapped)


def map_batch(function: Callable[[Values], Values], spread: Spread, operands: Values) -> Values:
    """The results of one element of a batch after the other; unmapped operands are shared."""
    assert spread.mapped is not None
    return jax.lax.map(
        lambda elements: function(operands | elements),
        {name: operands[name] for name in spread.mapped},
    )
