"""Calls on auto axes: XLA says how the operands are sharded when it partitions the program."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_mhc._axes import Axes, axes_of, spec_axes
from jax_mhc._call.table import Value, Values, fingerprint
from jax_mhc._mesh.manual import on_device, sum_up
from jax_mhc._mesh.spread import MeshLayout, Spread, run_here

if TYPE_CHECKING:
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule


def run_auto(spread: Spread, operands: Values) -> Values:
    """The results of a call on all devices."""
    call = spread.call
    streams = operands[call.operands[0]]
    mesh = jax.typeof(streams).sharding.mesh
    num = math.prod(mesh.shape[axis] for axis in axes_of(streams, AxisType.Auto))
    if jax.device_count() == 1 or (num == 1 and not mesh.empty):
        return run_here(spread, operands)
    in_order = [operands[name] for name in call.operands]
    results = _on_all(spread, mesh)(*in_order, fingerprint(call))
    return dict(zip(call.results, results, strict=True))


def _run_in_order(
    run: Callable[[Values], Values], spread: Spread, operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """The results of `run` in the order of the call, from operands in that order."""
    results = run(dict(zip(spread.call.operands, operands, strict=True)))
    return [results[name] for name in spread.call.results]


@functools.cache
def _on_all(spread: Spread, mesh: AbstractMesh) -> Callable[..., Any]:
    """The program of all devices; the mesh is empty where the program names none."""
    # Its import takes 20 ms.
    from jax.experimental.custom_partitioning import custom_partitioning

    @custom_partitioning
    def on_all(*operands_and_fingerprint: jax.Array) -> list[jax.Array]:
        run = functools.partial(run_here, spread)
        return _run_in_order(run, spread, operands_and_fingerprint[:-1])

    # Shardings are decoded here: JAX's own decoder knows no mesh that is partly manual.
    on_all.def_partition(
        functools.partial(_partition, spread, mesh),
        sharding_rule=functools.partial(_rule, spread),
        decode_shardings=False,
    )
    return jax.jit(on_all)


def empty_auto(shape: tuple[int, ...], dtype: Any, mesh: AbstractMesh) -> Any:
    """Memory that may hold anything, and is sharded as XLA finds that its use requires.

    Of `jax.lax.empty` XLA would give every device a replica.
    """
    return _empty_on_all(shape, jnp.dtype(dtype), mesh)(jnp.zeros(()))


@functools.cache
def _empty_on_all(shape: tuple[int, ...], dtype: Any, mesh: AbstractMesh) -> Callable[..., Any]:
    from jax.experimental.custom_partitioning import (
        ArrayMapping,
        SdyShardingRule,
        custom_partitioning,
    )

    @custom_partitioning
    def on_all(_: Any) -> Any:
        return jax.lax.empty(shape, dtype)

    def partition(of_all: Mesh, operands: Any, result: Any) -> tuple[Any, ...]:
        of_all, auto = _meshes(mesh, of_all, operands)
        axes = _split_axes(result, auto)
        own = tuple(
            size // math.prod(auto.shape[axis] for axis in some)
            for size, some in zip(shape, axes, strict=True)
        )
        sharded = NamedSharding(auto, PartitionSpec(*(some or None for some in axes)))
        replicated = NamedSharding(auto, PartitionSpec())
        return of_all, lambda _: jax.lax.empty(own, dtype), sharded, (replicated,)

    rule = SdyShardingRule(
        (ArrayMapping(),), (ArrayMapping(*(f"d{at}" for at in range(len(shape)))),)
    )
    on_all.def_partition(partition, sharding_rule=rule, decode_shardings=False)
    return jax.jit(on_all)


# ---- the rule that XLA moves shardings along by -------------------------------------------------


def _rule(
    spread: Spread, _: Mesh, operand_types: Sequence[Any], result_types: Sequence[Any]
) -> SdyShardingRule:
    """Tokens, streams and channels pass from values to values; nothing else is sharded."""
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule

    replicated: list[str] = []

    def mapping(value: Value, is_mapped: bool, shape: Sequence[int]) -> ArrayMapping:
        num_tokens = len(shape) - is_mapped - len(value.dims)
        factors = ["b"] if is_mapped else []
        factors += [f"t{at}" for at in range(num_tokens)]
        for dim in value.dims:
            # Streams are not sharded either; their factor is there so that XLA reports if they are.
            if dim == "C" or (dim == "n" and value.is_streams):
                factors.append(dim)
            else:
                factors.append(f"w{len(replicated)}")
                replicated.append(factors[-1])
        return ArrayMapping(*factors)

    operands = [
        mapping(*value, type.shape)
        for value, type in zip(spread.operands().values(), operand_types[:-1], strict=True)
    ]
    replicated.append("f")  # here: Shardy requires them in the order of their first use
    operands.append(ArrayMapping("f"))
    results = [
        mapping(*value, type.shape)
        for value, type in zip(spread.results().values(), result_types, strict=True)
    ]
    return SdyShardingRule(
        tuple(operands), tuple(results), need_replication_factors=tuple(replicated)
    )


# ---- one device's program -----------------------------------------------------------------------


def _partition(
    spread: Spread, abstract: AbstractMesh, mesh: Mesh, operands: Any, results: Any
) -> tuple[Any, ...]:
    """For `custom_partitioning`: the mesh, the program, the shardings of results and operands."""
    *operands, _ = operands
    mesh, auto = _meshes(abstract, mesh, operands)
    layout = _layout(spread, auto, operands)
    operand_specs = [layout.spec(spread, *value) for value in spread.operands().values()]
    results_of = spread.results()
    result_specs = {name: layout.spec(spread, *value) for name, value in results_of.items()}
    sums = {
        name: tuple(
            axis
            for axis in layout.axes()
            if results_of[name][0].is_gradient and axis not in spec_axes(spec)
        )
        for name, spec in result_specs.items()
    }

    def on_one(*operands_and_fingerprint: jax.Array) -> list[jax.Array]:
        of_one = spread._replace(hidden_axes=layout.hidden)

        def run(operands: Values) -> Values:
            return sum_up(on_device(run_here, of_one, operands), sums)

        return _run_in_order(run, spread, operands_and_fingerprint[:-1])

    def shardings(specs: Iterable[PartitionSpec]) -> list[NamedSharding]:
        return [NamedSharding(auto, spec) for spec in specs]

    of_operands = tuple(shardings([*operand_specs, PartitionSpec()]))
    return mesh, on_one, shardings(result_specs.values()), of_operands


def _meshes(
    abstract: AbstractMesh, mesh: Mesh, operands: Sequence[Any]
) -> tuple[Mesh, AbstractMesh]:
    """The mesh of all devices, and that of its axes that XLA speaks of: all but manual ones."""
    if not abstract.empty:
        devices = operands[0].sharding._device_assignment
        mesh = Mesh(np.reshape(devices, abstract.axis_sizes), abstract.axis_names)
    of_types = mesh if abstract.empty else abstract
    axes = zip(of_types.axis_names, of_types.axis_sizes, of_types.axis_types, strict=True)
    # To XLA explicit axes are no other than auto ones.
    named = [(name, size) for name, size, kind in axes if kind != AxisType.Manual]
    names, sizes = zip(*named, strict=True)
    return mesh, AbstractMesh(sizes, names)


def _layout(spread: Spread, mesh: AbstractMesh, operands: Sequence[Any]) -> MeshLayout:
    """The layout of the streams; XLA reshards what is sharded otherwise."""
    described = list(spread.operands().values())
    lead: tuple[Axes, ...] = ()
    if spread.has_batch:
        first = next(
            operand
            for operand, (_, is_mapped) in zip(operands, described, strict=True)
            if is_mapped
        )
        lead = _split_axes(first, mesh)[:1]
    value, is_mapped = described[0]
    *tokens, of_streams, hidden = _split_axes(operands[0], mesh)[is_mapped:]
    if value.is_streams and of_streams:
        _warn_of_streams(of_streams)
    return MeshLayout((*lead, *tokens), hidden if value.is_streams else ())


@functools.cache
def _warn_of_streams(axes: Axes) -> None:
    """Warns once of streams that XLA gathers, since nobody may have asked for their sharding."""
    logging.getLogger("jax_mhc").warning(
        "XLA splits the streams of a token (n) over the mesh axes %s, and gathers them for every "
        "op, in which each stream mixes with all others; sharding constraints on [..., n, C] "
        "should name an axis for each dimension, and None for n", axes
    )  # fmt: skip


def _split_axes(array: Any, mesh: AbstractMesh) -> tuple[Axes, ...]:
    """The axes over which XLA shards each dimension, but for those that do not divide it."""
    sharding = array.sharding._to_xla_hlo_sharding(len(array.shape))
    if sharding.is_replicated():
        return ((),) * len(array.shape)
    places = np.array(sharding.tile_assignment_devices()).reshape(
        sharding.tile_assignment_dimensions()
    )
    # The places of a dimension that is sharded over some axes count up along these.
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
