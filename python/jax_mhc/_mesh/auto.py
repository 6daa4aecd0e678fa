"""Calls on auto axes: XLA tells how the operands lie when it splits the program up."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_mhc._axes import Axes, axes_of, spec_axes
from jax_mhc._call.table import dims, fingerprint, is_gradient
from jax_mhc._mesh.manual import on_device, sum_up
from jax_mhc._mesh.spread import Layout, Spread, run_here


def run_auto(spread: Spread, *operands: Any) -> Sequence[Any]:
    """Runs a call on all devices, phi being [n, C, K]."""
    mesh = jax.typeof(operands[0]).sharding.mesh
    num = math.prod(mesh.shape[axis] for axis in axes_of(operands[0], AxisType.Auto))
    if jax.device_count() == 1 or (num == 1 and not mesh.empty):
        return run_here(spread, *operands)
    return _on_all(spread, mesh)(*operands, fingerprint(spread.call))


@functools.cache
def _on_all(spread: Spread, mesh: AbstractMesh) -> Callable[..., Any]:
    """mesh: of the program; empty where the program does not say."""
    # Its import takes 20 ms.
    from jax.experimental.custom_partitioning import custom_partitioning

    @custom_partitioning
    def on_all(*operands_and_fingerprint: Any) -> list[Any]:
        return list(run_here(spread, *operands_and_fingerprint[:-1]))

    # Shardings are decoded here: JAX's own decoder knows no mesh that is partly manual.
    on_all.def_partition(
        functools.partial(_partition, spread, mesh),
        sharding_rule=functools.partial(_rule, spread),
        decode_shardings=False,
    )
    return jax.jit(on_all)


def empty_auto(shape: tuple[int, ...], dtype: Any, mesh: AbstractMesh) -> Any:
    """Memory that may hold anything, and is split as XLA finds that its use wants it.

    Of `jax.lax.empty` XLA would give every device the whole.
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
        lies = NamedSharding(auto, PartitionSpec(*(some or None for some in axes)))
        whole = NamedSharding(auto, PartitionSpec())
        return of_all, lambda _: jax.lax.empty(own, dtype), lies, (whole,)

    rule = SdyShardingRule(
        (ArrayMapping(),), (ArrayMapping(*(f"d{at}" for at in range(len(shape)))),)
    )
    on_all.def_partition(partition, sharding_rule=rule, decode_shardings=False)
    return jax.jit(on_all)


# ---- the rule that XLA moves shardings along by -------------------------------------------------


def _rule(
    spread: Spread, _: Mesh, operand_types: Sequence[Any], result_types: Sequence[Any]
) -> Any:
    """Tokens, streams and channels pass from values to values; nothing else is split."""
    from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule

    whole: list[str] = []

    def mapping(value: Any, shape: Sequence[int]) -> Any:
        behind = dims(value.name)
        num_tokens = len(shape) - value.mapped - len(behind) + ("*" in behind)
        factors = ["b"] if value.mapped else []
        for dim in behind:
            factors += [f"t{at}" for at in range(num_tokens)] if dim == "*" else [dim]
        for at, (factor, size) in enumerate(zip(factors, shape, strict=True)):
            # Streams are not split either; their factor is there so that it is told if they are.
            if factor == "-" or (factor == "C" and size == 0):
                factors[at] = f"w{len(whole)}"
                whole.append(factors[at])
        return ArrayMapping(*factors)

    operands = [
        mapping(value, type.shape)
        for value, type in zip(spread.operands(), operand_types[:-1], strict=True)
    ]
    whole.append("f")  # here: Shardy wants them in the order of their first use
    operands.append(ArrayMapping("f"))
    results = [
        mapping(value, type.shape)
        for value, type in zip(spread.results(), result_types, strict=True)
    ]
    return SdyShardingRule(tuple(operands), tuple(results), need_replication_factors=tuple(whole))


# ---- one device's program -----------------------------------------------------------------------


def _partition(
    spread: Spread, abstract: AbstractMesh, mesh: Mesh, operands: Any, results: Any
) -> tuple[Any, ...]:
    """For `custom_partitioning`: the mesh, the program, and how results and operands lie."""
    *operands, _ = operands
    mesh, auto = _meshes(abstract, mesh, operands)
    layout = _layout(spread, auto, operands)
    operand_specs = [layout.spec(spread, value) for value in spread.operands()]
    result_specs = [layout.spec(spread, value) for value in spread.results()]
    sums = [
        tuple(a for a in layout.axes() if is_gradient(value.name) and a not in spec_axes(spec))
        for value, spec in zip(spread.results(), result_specs, strict=True)
    ]

    def on_one(*operands_and_fingerprint: Any) -> list[Any]:
        of_one = spread._replace(hidden_axes=layout.hidden)
        return sum_up(on_device(run_here, of_one, *operands_and_fingerprint[:-1]), sums)

    def lie(specs: list[PartitionSpec]) -> list[NamedSharding]:
        return [NamedSharding(auto, spec) for spec in specs]

    return mesh, on_one, lie(result_specs), tuple(lie([*operand_specs, PartitionSpec()]))


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


def _layout(spread: Spread, mesh: AbstractMesh, operands: Sequence[Any]) -> Layout:
    """How the streams lie; what lies otherwise XLA brings there."""
    has_batch = spread.mapped is not None
    lead: tuple[Axes, ...] = ()
    if has_batch:
        first = next(
            o for o, value in zip(operands, spread.operands(), strict=True) if value.mapped
        )
        lead = _split_axes(first, mesh)[:1]
    value, streams = spread.operands()[0], operands[0]
    *tokens, of_streams, hidden = _split_axes(streams, mesh)[value.mapped :]
    if dims(value.name)[-2] == "n" and of_streams:
        _warn_of_streams(of_streams)
    return Layout((*lead, *tokens), hidden if dims(value.name)[-1] == "C" else ())


@functools.cache
def _warn_of_streams(axes: Axes) -> None:
    """Tells once of streams that XLA gathers, since nobody may have asked for their split."""
    logging.getLogger("jax_mhc").warning(
        "XLA splits the streams of a token (n) over the mesh axes %s, and gathers them for every "
        "op, in which each stream mixes with all others; sharding constraints on [..., n, C] "
        "should name an axis for each dimension, and None for n", axes
    )  # fmt: skip


def _split_axes(array: Any, mesh: AbstractMesh) -> tuple[Axes, ...]:
    """The axes over which XLA splits each dimension, but for those that do not divide it."""
    sharding = array.sharding._to_xla_hlo_sharding(len(array.shape))
    if sharding.is_replicated():
        return ((),) * len(array.shape)
    places = np.array(sharding.tile_assignment_devices()).reshape(
        sharding.tile_assignment_dimensions()
    )
    # The places of a dimension that is split over some axes count up along these.
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
