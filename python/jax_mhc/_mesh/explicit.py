"""Calls on explicit axes: the types of the operands tell how they lie."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, reshard

from jax_mhc._axes import Axes, entries, varying_axes
from jax_mhc._call.table import Call, dims, is_parameter
from jax_mhc._errors import fail
from jax_mhc._mesh.manual import missing_axes, on_device, sum_up
from jax_mhc._mesh.spread import Layout, Spread, check_streams, pack, run_here, unpack


def run_explicit(spread: Spread, *operands: Any) -> list[Any]:
    """Runs a call on all devices. What does not lie as the streams do is brought there."""
    mesh = jax.typeof(operands[0]).sharding.mesh
    if AxisType.Auto in mesh.axis_types:
        _warn_of_auto(mesh)
    layout, values = _layout(spread, operands), spread.operands()
    batch = layout.lead[0] or None if spread.mapped is not None else None
    # Gradients lie as what they are gradients of, those of elements of a batch where these lie.
    of_batch = [batch] * (spread.mapped is not None)
    specs_kept = {
        f"d_{value.name}": PartitionSpec(*of_batch, *jax.typeof(o).sharding.spec[value.mapped :])
        for value, o in zip(values, operands, strict=True)
    }

    def lie(array: Any, spec: PartitionSpec) -> Any:
        return reshard(array, NamedSharding(mesh, spec))

    # phi's rows, n times C, cannot be split as C is: it goes through a form that is whole.
    whole = [
        lie(o, PartitionSpec(*[batch] * value.mapped)) if value.name == "phi" else o
        for value, o in zip(values, operands, strict=True)
    ]
    packed = pack(values, whole, operands[0].shape[-2])
    specs = [layout.spec(spread, value) for value in values]
    types = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in packed)
    results = _on_all(spread, layout, mesh, types)(*map(lie, packed, specs))
    whole = [
        lie(result, PartitionSpec(*[batch] * value.mapped)) if value.name == "d_phi" else result
        for value, result in zip(spread.results(), results, strict=True)
    ]
    return [
        lie(result, specs_kept[value.name]) if value.name in specs_kept else result
        for value, result in zip(spread.results(), unpack(spread.results(), whole), strict=True)
    ]


@functools.cache
def _warn_of_auto(mesh: AbstractMesh) -> None:
    logging.getLogger("jax_mhc").warning(
        "the mesh %s has auto axes beside explicit ones: XLA gathers what is split over auto axes "
        "for the kernels; make them explicit, or run the op in jax.shard_map over them", mesh
    )  # fmt: skip


@functools.cache
def _on_all(
    spread: Spread, layout: Layout, mesh: AbstractMesh, types: tuple[jax.ShapeDtypeStruct, ...]
) -> Callable[..., Any]:
    """types: those of the operands, which are not to be taken from the program (`kept.py`)."""
    operand_specs = tuple(layout.spec(spread, value) for value in spread.operands())
    result_specs = tuple(layout.spec(spread, value) for value in spread.results())
    result_types = jax.eval_shape(functools.partial(run_here, spread), *types)
    spread = spread._replace(hidden_axes=layout.hidden)
    batch = layout.lead[0] if spread.mapped is not None else ()

    def of_one(*values: Any) -> Any:
        own = [_part(type, spec, mesh) for type, spec in zip(types, operand_specs, strict=True)]
        operands = _with_empty(values, own)
        # Every element of a batch has a gradient of its own.
        kept = [varying_axes(operand).union(batch) for operand in operands]
        results = on_device(run_here, spread, *operands)
        return _without_empty(sum_up(results, missing_axes(spread, kept, operands)), result_types)

    run = of_one
    if layout.axes():
        run = jax.shard_map(
            of_one,
            mesh=mesh,
            in_specs=_without_empty(operand_specs, types),
            out_specs=_without_empty(result_specs, result_types),
            # Not those over which nothing is split: an enclosing jax.vmap may have them.
            axis_names=set(layout.axes()),
        )

    def of_all(*operands: Any) -> list[Any]:
        results = _with_empty(run(*_without_empty(operands, types)), result_types)
        return [
            reshard(r, NamedSharding(mesh, s)) for r, s in zip(results, result_specs, strict=True)
        ]

    return jax.jit(of_all)


def _without_empty(values: Sequence[Any], types: Sequence[jax.ShapeDtypeStruct]) -> tuple[Any, ...]:
    """The values, one for each of the types, but those of the types that are empty."""
    return tuple(value for value, type in zip(values, types, strict=True) if type.size)


def _with_empty(values: Sequence[Any], types: Sequence[jax.ShapeDtypeStruct]) -> list[Any]:
    """The other way round."""
    rest = iter(values)
    return [next(rest) if type.size else jnp.zeros(type.shape, type.dtype) for type in types]


def _part(
    type: jax.ShapeDtypeStruct, spec: PartitionSpec, mesh: AbstractMesh
) -> jax.ShapeDtypeStruct:
    """What one device has of an array of a type."""
    shape = [
        size // math.prod(mesh.shape[axis] for axis in axes)
        for size, axes in zip(type.shape, entries(spec, len(type.shape)), strict=True)
    ]
    return jax.ShapeDtypeStruct(shape, type.dtype)


def _layout(spread: Spread, operands: Sequence[Any]) -> Layout:
    """That of the streams; what they leave open is as other operands have it."""
    has_batch = spread.mapped is not None
    rank = operands[0].ndim - 2 - spread.operands()[0].mapped
    found: dict[Any, Axes] = {}
    for value, operand in zip(spread.operands(), operands, strict=True):
        if is_parameter(value.name):
            continue
        # Which dimension of the call each one of the operand is: a number, or its letter.
        which: list[Any] = [0] if value.mapped else []
        for dim in dims(value.name):
            which += range(has_batch, has_batch + rank) if dim == "*" else [dim]
        of_dims = entries(jax.typeof(operand).sharding.spec, operand.ndim)
        for dim, axes in zip(which, of_dims, strict=True):
            check_streams(spread.call, value.name, axes if dim == "n" else ())
            if axes and dim != "-" and found.setdefault(dim, axes) != axes:
                _fail_to_agree(spread.call, value.name, found[dim], axes)
    layout = Layout(tuple(found.get(at, ()) for at in range(has_batch + rank)), found.get("C", ()))
    if len(set(layout.axes())) < len(layout.axes()):
        _fail_to_agree(spread.call, "y", layout.lead, layout.hidden)
    return layout


def _fail_to_agree(call: Call, name: str, known: object, other: object) -> NoReturn:
    fail(
        ValueError, call.op, name, f"the same dimensions split over the same mesh axes as those of "
        f"the streams, {known}", other, "Bring it there with jax.sharding.reshard.",
    )  # fmt: skip
