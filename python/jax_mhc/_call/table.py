"""The table of calls, which is the library's description of itself, and a call with its settings.

A call is one direction of an op: `pre_fwd`, `pre_bwd` and so on. A row of the table has the call's
operands and results in order. Some of them belong to a group that a call may lack: operands and
results of an absent group are not in the call. docs/calls.md shows the table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple, NoReturn, TypeAlias

import jax
import numpy as np

from jax_mhc._call import library
from jax_mhc._errors import Refusal
from jax_mhc._limits import KERNEL_DTYPES
from jax_mhc._types import MHCConfig

#: Operands or results of a call by name. Never rely on their order: JAX sorts the keys.
Values: TypeAlias = dict[str, jax.Array]


class Value(NamedTuple):
    """An operand or result of a call, as the table describes it.

    Attributes:
        name: such as `h_res`; `d_h_res` is its cotangent.
        precision: "streams", the dtype of the streams, or "accumulation", that of sums.
        has_tokens: whether the dimensions of the tokens come first. A value without them is a
            parameter, the same for all tokens, or the gradient of one.
        dims: the dimensions behind those of the tokens: n streams, C channels, K coefficients, A
            gates, or "1".
        group: the group that the value is absent with, if any.
    """

    name: str
    precision: str
    has_tokens: bool
    dims: tuple[str, ...]
    group: str | None

    @property
    def is_gradient(self) -> bool:
        """True if a result is a gradient, and so a sum over all that depends on the value."""
        return self.name.startswith("d_")

    @property
    def is_streams(self) -> bool:
        """True if the value has the form of the streams, `[..., n, C]`."""
        return self.has_tokens and self.dims == ("n", "C")


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        operands: the operands in order, of all groups.
        results: the results in order, of all groups.
        adds_in_place: whether the first result takes the memory of the last operand, to which the
            kernel adds.
        has_config: whether the settings of an `MHCConfig` are attributes of the call.
        attributes: the names of all attributes.
    """

    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    adds_in_place: bool
    has_config: bool
    attributes: tuple[str, ...]

    @property
    def groups(self) -> list[str]:
        """The groups that a call of this row may lack."""
        values = (*self.operands, *self.results)
        return list(dict.fromkeys(value.group for value in values if value.group is not None))


@functools.cache
def rows() -> dict[str, Row]:
    """The rows of the table by the names of the calls.

    Raises:
        RuntimeError: the library that has the table cannot be used.
    """
    described = library.description()["calls"]

    def values(of_row: list[library.DescribedValue]) -> tuple[Value, ...]:
        return tuple(
            Value(
                value["name"],
                value["precision"],
                value["has_tokens"],
                tuple(value["dims"]),
                value["group"],
            )
            for value in of_row
        )

    return {
        row["name"]: Row(
            values(row["operands"]),
            values(row["results"]),
            row["adds_in_place"],
            row["has_config"],
            tuple(attribute["name"] for attribute in row["attributes"]),
        )
        for row in described
    }


class Call(NamedTuple):
    """A call with its settings; hashable.

    Attributes:
        name: the name of its row.
        config: the settings of the coefficients; None for calls without any.
        attributes: the attributes beside those of the config and of the groups.
        groups: the groups of operands and results that the call has.
        fused: whether nothing but the kernels may run it (implementation="fused").
    """

    name: str
    config: MHCConfig | None = None
    attributes: tuple[tuple[str, bool | float], ...] = ()
    groups: tuple[str, ...] = ()
    fused: bool = False

    @property
    def op(self) -> str:
        """The public name of the op that the call belongs to."""
        return self.name.removesuffix("_fwd").removesuffix("_bwd")

    @property
    def is_forward(self) -> bool:
        """True if the call is the forward direction of its op."""
        return self.name.endswith("_fwd")

    @property
    def row(self) -> Row:
        """The row of the table."""
        return rows()[self.name]

    @property
    def operands(self) -> list[str]:
        """The names of the operands, in order."""
        return [value.name for value in self.operand_values]

    @property
    def results(self) -> list[str]:
        """The names of the results, in order."""
        return [value.name for value in self.result_values]

    @property
    def operand_values(self) -> list[Value]:
        """The table's values of the operands, in order."""
        return _present(self.row.operands, self.groups)

    @property
    def result_values(self) -> list[Value]:
        """The table's values of the results, in order."""
        return _present(self.row.results, self.groups)

    def attribute(self, name: str) -> bool | float:
        """The value of one of `attributes`."""
        return dict(self.attributes)[name]


def _present(values: Sequence[Value], groups: Collection[str]) -> list[Value]:
    return [value for value in values if value.group is None or value.group in groups]


class Settings(NamedTuple):
    """The settings that the forward and the backward call of an op share; hashable.

    Attributes:
        config: the settings of the coefficients; None for calls without any.
        norm_scale_eps: the eps of the norm of the layer's input.
        hidden_axes: the axes of a `jax.shard_map` over which C is sharded.
        fused: whether nothing but the kernels may run the calls (implementation="fused").
        defers: whether the op's cotangent of the streams that post reads is that of the streams
            which post makes of them (_ops/deferred.py).
    """

    config: MHCConfig | None = None
    norm_scale_eps: float = 0.0
    hidden_axes: tuple[str, ...] = ()
    fused: bool = False
    defers: bool = False

    def call(self, name: str, operands: Collection[str], **attributes: bool | float) -> Call:
        """The call `name` with these operands, which determine its groups, and these settings."""
        row = rows()[name]
        if "norm_scale_eps" in row.attributes:
            attributes["norm_scale_eps"] = self.norm_scale_eps
        groups = [value.group for value in row.operands if value.name in operands and value.group]
        call = Call(
            name,
            self.config if row.has_config else None,
            tuple(attributes.items()),
            tuple(dict.fromkeys(groups)),
            self.fused,
        )
        if set(operands) != set(call.operands):
            raise TypeError(f"{name}: expected operands {call.operands}, got {sorted(operands)}")
        return call


def sizes(
    values: Sequence[Value], shapes: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The sizes of the tokens' dimensions, and of the others by letter, from operands' shapes."""
    tokens = shapes[0][: len(shapes[0]) - len(values[0].dims)]
    by_letter = {"1": 1}
    for value, shape in zip(values, shapes, strict=True):
        by_letter |= zip(value.dims, shape[len(shape) - len(value.dims) :], strict=True)
    return tokens, by_letter


def refuse_fused(op: str, platform: str, dtype: str) -> NoReturn:
    """Raises that there are no kernels for a platform, or for this dtype on it."""
    if platform not in KERNEL_DTYPES:
        raise Refusal(ValueError, op, "implementation='fused'").expected(
            f"a platform with kernels ({', '.join(KERNEL_DTYPES)})",
            platform,
            "Use implementation=None or implementation='reference' here.",
        )
    raise Refusal(TypeError, op, "implementation='fused'").expected(
        f"dtype {', '.join(KERNEL_DTYPES[platform])} on platform {platform!r}",
        dtype,
        "Use implementation=None or implementation='reference', or convert the arrays.",
    )


def attributes(call: Call) -> dict[str, np.generic | str]:
    """The attributes of the custom call: of fixed width, whatever the x64 setting is."""
    fixed = {bool: np.int64, int: np.int64, float: np.float64, str: str}
    attributes: dict[str, bool | int | float | str] = dict(call.attributes)
    attributes |= {group: group in call.groups for group in call.row.groups}
    if call.config is not None:
        # Settings that no kernel has, such as the schedule, are none of the call.
        config = dataclasses.asdict(call.config)
        attributes |= {name: config[name] for name in call.row.attributes if name in config}
    return {name: fixed[type(value)](value) for name, value in attributes.items()}


def fingerprint(call: Call) -> np.ndarray:
    """32 bytes that differ between calls with different settings, the same in every process."""
    import hashlib

    text = repr((library.target_name(call.name), sorted(attributes(call).items())))
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
