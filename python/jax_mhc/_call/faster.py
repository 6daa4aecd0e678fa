"""Configurations in which plain JAX is faster than the kernels on GPUs, by measurements.

`faster.json` has, for each configuration that was measured, the time of a sublayer with all
gradients in the kernels and in plain JAX, and that of a stack, which `jax_mhc.estimate` goes by.
`python -m benches plots` writes it from the newest record of `python -m benches configurations`;
docs/performance.md shows the record.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jax_mhc._axes import entries
from jax_mhc._call.table import Settings

_PATH = Path(__file__).with_name("faster.json")


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A sublayer, as far as it decides which implementation is faster.

    Attributes:
        streams: n.
        hidden: C.
        dtype: of the streams.
        tokens: their number; None where it is a symbol, and taken for many.
        constraint: that of the coefficients, "static" for those of all tokens, "head" for a head;
            None where an op does not know it.
        norm: whether the layer's input is normalised; not known where constraint is not.
    """

    streams: int
    hidden: int
    dtype: str
    tokens: int | None
    constraint: str | None = None
    norm: bool = False

    def __str__(self) -> str:
        """For messages."""
        norm = " with a norm" if self.norm else ""
        sizes = f"{self.tokens} tokens of {self.streams} x {self.hidden} {self.dtype}"
        return f"{sizes}, {self.constraint}{norm}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a configuration: microseconds of a sublayer with all gradients.

    stack_us: that of a stack of four sublayers in the kernels; None of a head.
    """

    configuration: Configuration
    fused_us: float
    plain_us: float
    stack_us: float | None = None

    @property
    def is_plain_faster(self) -> bool:
        """Whether plain JAX is faster than the kernels."""
        return self.plain_us < self.fused_us


def configuration_of(
    x: jax.Array, constraint: str | None = None, norm: bool = False
) -> Configuration | None:
    """The configuration of streams `[..., n, C]`; None where explicit axes split their channels.

    Plain JAX does not run there.
    """
    *tokens, n, hidden = x.shape
    if entries(jax.typeof(x).sharding.spec, x.ndim)[-1]:
        return None
    is_known = all(isinstance(size, int) for size in tokens)
    num = math.prod(tokens) if is_known else None
    return Configuration(n, hidden, x.dtype.name, num, constraint, norm)


def configuration_of_op(
    op: str, operands: Mapping[str, jax.Array], settings: Settings
) -> Configuration | None:
    """The configuration of an op's operands; None where it runs the kernels as they are.

    That is sinkhorn, collapse, and post after a pre that ran them.
    """
    if op in ("sinkhorn", "collapse") or (op == "post" and settings.defers):
        return None
    constraint = None
    if op == "head":
        constraint = "head"
    elif op != "post" and settings.config is not None:
        constraint = settings.config.constraint if "phi" in operands else "static"
    return configuration_of(operands["x"], constraint, "norm_scale" in operands)


def plain(configuration: Configuration) -> Measured | None:
    """The measured configuration by which plain JAX is faster; None where the kernels are.

    The nearest measured one decides. Without a constraint plain JAX is taken to be faster if it is
    with any, so that post runs in it wherever pre may have done so.
    """
    kinds = {(configuration.constraint, configuration.norm)}
    if configuration.constraint is None:
        known = (row.configuration for row in measured())
        kinds = {(c.constraint, c.norm) for c in known if c.constraint != "head"}
    for constraint, norm in sorted(kinds, key=str):
        row = nearest(dataclasses.replace(configuration, constraint=constraint, norm=norm))
        if row is not None and row.is_plain_faster:
            return row
    return None


@functools.lru_cache(maxsize=1024)
def nearest(configuration: Configuration) -> Measured | None:
    """The measured configuration that is nearest; None where nothing was measured.

    First come what other kernels are for: numbers of streams that are powers of two, and channels
    that are a multiple of 8; then the number of streams, the dtype, the constraint and the norm;
    last the widths and, counting a quarter, the tokens, in log scale.
    """
    return min(measured(), key=functools.partial(_distance, configuration), default=None)


def nearest_stack(configuration: Configuration) -> Measured:
    """The measured configuration of a stack that is nearest: in width before all tokens.

    Streams of whole lines of 128 bytes, which kernels copy at once, are not near to others.
    """
    own = configuration

    def distance(row: Measured) -> tuple[float, ...]:
        other = row.configuration
        sizes = _ratio(own.hidden, other.hidden), _ratio(own.tokens, other.tokens)
        are_lines = _are_lines(own) != _are_lines(other)
        return are_lines, *_distance(own, row)[:-1], *sizes

    return min((row for row in measured() if row.stack_us is not None), key=distance)


def _distance(own: Configuration, row: Measured) -> tuple[float, ...]:
    other = row.configuration
    return (
        _is_power_of_two(own.streams) != _is_power_of_two(other.streams),
        (own.hidden % 8 == 0) != (other.hidden % 8 == 0),
        _ratio(own.streams, other.streams),
        own.dtype != other.dtype,
        own.constraint != other.constraint,
        own.norm != other.norm,
        4 * _ratio(own.hidden, other.hidden) + _ratio(own.tokens, other.tokens),
    )


def _are_lines(configuration: Configuration) -> bool:
    return configuration.hidden % (32 if configuration.dtype == "float32" else 64) == 0


def _is_power_of_two(number: int) -> bool:
    return number.bit_count() == 1


def _ratio(own: int | None, other: int | None) -> float:
    """The ratio of two sizes in log scale; None is more than any."""
    return abs(math.log2(max(_MANY if own is None else own, 1)) - math.log2(other or _MANY))


_MANY = 1 << 40


@functools.cache
def measured() -> tuple[Measured, ...]:
    """All configurations that were measured."""
    return tuple(
        Measured(
            Configuration(
                row["streams"],
                row["hidden"],
                row["dtype"],
                row["tokens"],
                row["constraint"],
                row["norm"],
            ),
            row["fused_us"],
            row["plain_us"],
            row.get("stack_us"),
        )
        for row in description()["rows"]
    )


@functools.cache
def description() -> dict[str, Any]:
    """The table as it is in the file, with what the record says of its run."""
    found: dict[str, Any] = json.loads(_PATH.read_text(encoding="utf-8"))
    return found
