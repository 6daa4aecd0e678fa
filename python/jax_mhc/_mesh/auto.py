"""Calls on auto axes: XLA reports how the operands are sharded when it partitions the program."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_mhc._axes import Axes, axes_of, spec_axes
from jax_mhc._call import Values
from jax_mhc._call.table import fingerprint
from jax_mhc._mesh.manual import on_device, sum_up
from jax_mhc._mesh.spread import MeshLayout, Spread, SpreadValue, run_here

if TYPE_CHECKING:
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule

# For `custom_partitioning`: the mesh, one device's program, the shardings of results and operands.
Partitioned: TypeAlias = tuple[
    Mesh,
    Callable[..., Any],
    NamedSharding | list[NamedSharding],
    tuple[NamedSharding, ...],
]


def run_auto(spread: Spread, operands: Values) -> Values:
    """Runs a call on all devices."""
    streams = operands[spread.call.operands[0]]
    mesh = jax.typeof(streams).sharding.mesh
    num = math.prod(mesh.shape[axis] for axis in axes_of(streams, AxisType.Auto))
    if jax.device_count() == 1 or (num == 1 and not mesh.empty):
        return run_here(spread, operands)
    in_order = [operands[name] for name in spread.call.operands]
    results = _on_all(spread, mesh)(*in_order, fingerprint(spread.call))
    return dict(zip(spread.call.results, results, strict=True))


@functools.cache
def _on_all(spread: Spread, mesh: AbstractMesh) -> Callable[..., list[jax.Array]]:
    """The call on operands in order, and its fingerprint.

    mesh: of the program; empty where the program does not say.
    """
    # An import of 20 ms.
    from jax.experimental.custom_partitioning import custom_partitioning

    @custom_partitioning
    def on_all(*operands_and_fingerprint: jax.Array) -> list[jax.Array]:
        return _in_order(spread, run_here(spread, _by_name(spread, operands_and_fingerprint)))

    # Shardings are decoded here: JAX's own decoder knows no mesh that is partly manual.
    on_all.def_partition(
        functools.partial(_partition, spread, mesh),
        sharding_rule=functools.partial(_rule, spread),
        decode_shardings=False,
    )
    return jax.jit(on_all)


def _by_name(spread: Spread, operands_and_fingerprint: Sequence[jax.Array]) -> Values:
    return dict(zip(spread.call.operands, operands_and_fingerprint[:-1], strict=True))


def _in_order(spread: Spread, results: Values) -> list[jax.Array]:
    return [results[name] for name in spread.call.results]


def empty_auto(shape: tuple[int, ...], dtype: np.dtype, mesh: AbstractMesh) -> jax.Array:
    """Memory that may hold anything, sharded as XLA finds best for its use.

    Of `jax.lax.empty` XLA would give every device all of it.
    """
    return _empty_on_all(shape, jnp.dtype(dtype), mesh)(jnp.zeros(()))


@functools.cache
def _empty_on_all(
    shape: tuple[int, ...], dtype: np.dtype, mesh: AbstractMesh
) -> Callable[..., jax.Array]:
    from jax.experimental.custom_partitioning import (
        ArrayMapping,
        SdyShardingRule,
        custom_partitioning,
    )

    @custom_partitioning
    def on_all(_: jax.Array) -> jax.Array:
        return jax.lax.empty(shape, dtype)

    def partition(
        of_all: Mesh, operands: Sequence[jax.ShapeDtypeStruct], result: jax.ShapeDtypeStruct
    ) -> Partitioned:
        of_all, auto = _meshes(mesh, of_all, operands)
        axes = _sharded_axes(result, auto)
        own = tuple(
            size // math.prod(auto.shape[axis] for axis in of_dim)
            for size, of_dim in zip(shape, axes, strict=True)
        )
        sharded = NamedSharding(auto, PartitionSpec(*(of_dim or None for of_dim in axes)))
        replicated = NamedSharding(auto, PartitionSpec())
        return of_all, lambda _: jax.lax.empty(own, dtype), sharded, (replicated,)

    rule = SdyShardingRule(
        (ArrayMapping(),), (ArrayMapping(*(f"d{at}" for at in range(len(shape)))),)
    )
    on_all.def_partition(partition, sharding_rule=rule, decode_shardings=False)
    return jax.jit(on_all)


# ---- the rule that XLA moves shardings along by -------------------------------------------------


def _rule(
    spread: Spread,
    _: Mesh,
    operand_types: Sequence[jax.core.ShapedArray],
    result_types: Sequence[jax.core.ShapedArray],
) -> SdyShardingRule:
    """Tokens, streams and channels pass from values to values; nothing else is sharded.

    Streams are not sharded either; their factor is there so that it is reported if they are.
    """
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule

    replicated: list[str] = []

    def mapping(value: SpreadValue, shape: Sequence[int]) -> ArrayMapping:
        factors = value.factors(len(shape))
        for at, factor in enumerate(factors):
            if factor == "-":
                factors[at] = f"w{len(replicated)}"
                replicated.append(factors[at])
        return ArrayMapping(*factors)

    operands = [
        mapping(value, type.shape)
        for value, type in zip(spread.operands.values(), operand_types[:-1], strict=True)
    ]
    replicated.append("f")  # here: Shardy expects them in the order of their first use
    operands.append(ArrayMapping("f"))
    results = [
        mapping(value, type.shape)
        for value, type in zip(spread.results.values(), result_types, strict=True)
    ]
    return SdyShardingRule(
        tuple(operands), tuple(results), need_replication_factors=tuple(replicated)
    )


# ---- one device's program -----------------------------------------------------------------------


def _partition(
    spread: Spread,
    abstract: AbstractMesh,
    mesh: Mesh,
    operands: Sequence[jax.ShapeDtypeStruct],
    results: Sequence[jax.ShapeDtypeStruct],
) -> Partitioned:
    """For `custom_partitioning`: the mesh, one device's program, and the shardings."""
    *operands, _fingerprint = operands
    mesh, auto = _meshes(abstract, mesh, operands)
    layout = _layout(spread, auto, operands)
    specs = {name: layout.spec(value) for name, value in spread.results.items()}
    sums = {
        name: tuple(
            axis
            for axis in layout.axes()
            if value.value.is_gradient and axis not in spec_axes(specs[name])
        )
        for name, value in spread.results.items()
    }
    of_device = spread._replace(hidden_axes=layout.hidden)

    def on_one(*operands_and_fingerprint: jax.Array) -> list[jax.Array]:
        own = _by_name(spread, operands_and_fingerprint)
        return _in_order(spread, sum_up(on_device(run_here, of_device, own), sums))

    operand_specs = [layout.spec(value) for value in spread.operands.values()]
    return (
        mesh,
        on_one,
        [NamedSharding(auto, specs[name]) for name in spread.call.results],
        tuple(NamedSharding(auto, spec) for spec in [*operand_specs, PartitionSpec()]),
    )


def _meshes(
    abstract: AbstractMesh, mesh: Mesh, operands: Sequence[jax.ShapeDtypeStruct]
) -> tuple[Mesh, AbstractMesh]:
    """The mesh of all devices, and the one of its axes that XLA sees: all but manual ones."""
    if not abstract.empty:
        devices = _sharding(operands[0])._device_assignment
        mesh = Mesh(np.reshape(devices, abstract.axis_sizes), abstract.axis_names)
    of_types = mesh if abstract.empty else abstract
    axes = zip(of_types.axis_names, of_types.axis_sizes, of_types.axis_types, strict=True)
    # To XLA explicit axes are no other than auto ones.
    named = [(name, size) for name, size, kind in axes if kind != AxisType.Manual]
    names, sizes = zip(*named, strict=True)
    return mesh, AbstractMesh(sizes, names)


def _layout(
    spread: Spread, mesh: AbstractMesh, operands: Sequence[jax.ShapeDtypeStruct]
) -> MeshLayout:
    """The layout of the streams; XLA moves what is sharded otherwise."""
    values = list(spread.operands.values())
    batch: Axes = ()
    if spread.mapped is not None:
        first = next(o for o, value in zip(operands, values, strict=True) if value.is_mapped)
        batch = _sharded_axes(first, mesh)[0]
    axes = _sharded_axes(operands[0], mesh)
    factors = values[0].factors(len(axes))
    by_factor = dict(zip(factors, axes, strict=True))
    if of_streams := by_factor.get("n"):
        _warn_of_streams(of_streams)
    tokens = tuple(by_factor[factor] for factor in factors if factor.startswith("t"))
    return MeshLayout(batch, tokens, by_factor.get("C", ()))


@functools.cache
def _warn_of_streams(axes: Axes) -> None:
    """Warns once of streams that XLA gathers, since nobody may have asked for their sharding."""
    logging.getLogger("jax_mhc").warning(
        "XLA splits the streams of a token (n) over the mesh axes %s, and gathers them for every "
        "op, in which each stream mixes with all others; sharding constraints on [..., n, C] "
        "should name an axis for each dimension, and None for n",
        axes,
    )


def _sharded_axes(array: jax.ShapeDtypeStruct, mesh: AbstractMesh) -> tuple[Axes, ...]:
    """The axes over which XLA shards each dimension, but for those that do not divide it."""
    sharding = _sharding(array)._to_xla_hlo_sharding(len(array.shape))
    if sharding.is_replicated():
        return ((),) * len(array.shape)
    places = np.array(sharding.tile_assignment_devices()).reshape(
        sharding.tile_assignment_dimensions()
    )
    # The places of a dimension that is sharded over axes count up along these.
    coordinates = np.unravel_index(places, mesh.axis_sizes)
    found = []
    for at, size in enumerate(array.shape):
        first = tuple(slice(None) if other == at else 0 for other in range(places.ndim))
        lines = [coordinate[first] for coordinate in coordinates]
        moving = [
            (int(np.argmax(line != line[0])), name)
            for line, name in zip(lines, mesh.axis_names, strict=True)
            if (line != line[0]).any()
        ]
        axes = tuple(name for _, name in sorted(moving, reverse=True))
        num = math.prod(dict(mesh.shape)[name] for name in axes)
        found.append(axes if num == places.shape[at] and size % num == 0 else ())
    return tuple(found)


def _sharding(array: jax.ShapeDtypeStruct) -> Any:
    """The sharding that XLA gives an array: of a type that JAX does not publish."""
    return array.sharding
