"""A call that is spread over devices, and how its arrays are sharded on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from jax_mhc._axes import Axes
from jax_mhc._call import Call, Value, Values, bind
from jax_mhc._errors import Refusal


class SpreadValue(NamedTuple):
    """An operand or result of a call that is spread.

    Attributes:
        value: its value in the table.
        is_mapped: whether it has the axis of a batch in front; see `Spread`.
    """

    value: Value
    is_mapped: bool

    def factors(self, rank: int) -> list[str]:
        """Factor along which each dimension of an array of this rank may be sharded.

        "b": the batch. "t0", "t1" and so on: the tokens. "n": the streams of values `[..., n, C]`.
        "C": the channels. "-": nothing; the dimension is replicated.
        """
        num_tokens = rank - self.is_mapped - len(self.value.dims)
        along = {"C": "C"} | ({"n": "n"} if self.value.is_streams else {})
        return [
            *["b"] * self.is_mapped,
            *(f"t{at}" for at in range(num_tokens)),
            *(along.get(dim, "-") for dim in self.value.dims),
        ]


class Spread(NamedTuple):
    """A call, and how it is spread; hashable.

    Attributes:
        call: the call.
        mapped: the operands whose first axis is that of a batch whose elements have parameters, or
            gradients of parameters, of their own; all results have this axis. None: no such batch.
        hidden_axes: the manual axes over which C is sharded.
    """

    call: Call
    mapped: tuple[str, ...] | None = None
    hidden_axes: Axes = ()

    @property
    def operands(self) -> dict[str, SpreadValue]:
        """The operands by name, in order."""
        mapped = self.mapped or ()
        values = self.call.operand_values
        return {value.name: SpreadValue(value, value.name in mapped) for value in values}

    @property
    def results(self) -> dict[str, SpreadValue]:
        """The results by name, in order."""
        values = self.call.result_values
        return {value.name: SpreadValue(value, self.mapped is not None) for value in values}


class MeshLayout(NamedTuple):
    """The axes of a mesh over which the arrays of a call are sharded.

    Attributes:
        batch: the axes of the batch; none where there is no batch.
        tokens: the axes of each dimension of the tokens.
        hidden: the axes of C.
    """

    batch: Axes
    tokens: tuple[Axes, ...]
    hidden: Axes

    def axes(self) -> Axes:
        """All axes over which anything is sharded."""
        return tuple(a for axes in (self.batch, *self.tokens, self.hidden) for a in axes)

    def spec(self, value: SpreadValue) -> PartitionSpec:
        """The sharding of one value."""
        along = {f"t{at}": axes for at, axes in enumerate(self.tokens)}
        along |= {"b": self.batch, "C": self.hidden}
        num_tokens = len(self.tokens) if value.value.has_tokens else 0
        factors = value.factors(value.is_mapped + num_tokens + len(value.value.dims))
        return PartitionSpec(*(along.get(factor) or None for factor in factors))


def check_streams(call: Call, name: str, axes: Axes) -> None:
    """Raises an error unless the streams of a token are on one device."""
    if axes:
        raise Refusal(ValueError, call.op, name).expected(
            "streams [..., n, C] whose n is not split over devices",
            f"n split over mesh axes {axes}",
            "Every stream mixes with every other: split leading dimensions, or C.",
        )


def run_here(spread: Spread, operands: Mapping[str, jax.Array]) -> Values:
    """Runs a call, or a batch of calls, on one device."""
    return bind(spread.call, operands, mapped=spread.mapped)


def map_batch(
    function: Callable[[Values], Values], spread: Spread, operands: Mapping[str, jax.Array]
) -> Values:
    """Runs one element of a batch after the other; operands that are not mapped are shared."""
    mapped = {name: operands[name] for name in spread.mapped or ()}
    return jax.lax.map(lambda elements: function({**operands, **elements}), mapped)
