"""Calls on explicit axes: the types of the operands say how they are sharded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NoReturn

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, reshard

from jax_mhc._axes import Axes, entries, varying_axes
from jax_mhc._call.table import Call, Values
from jax_mhc._errors import fail
from jax_mhc._mesh.manual import missing_axes, on_device, sum_up
from jax_mhc._mesh.spread import MeshLayout, Spread, check_streams, run_here


def run_explicit(spread: Spread, operands: Values) -> Values:
    """The results of a call on all devices. Operands are resharded as the streams are."""
    mesh = jax.typeof(operands[spread.call.operands[0]]).sharding.mesh
    if AxisType.Auto in mesh.axis_types:
        _warn_of_auto(mesh)
    layout, described = _layout(spread, operands), spread.operands()
    # Gradients are sharded as their operands are, gradients of elements of a batch as the batch.
    of_batch = [layout.lead[0] or None] if spread.has_batch else []
    specs_kept = {
        f"d_{name}": PartitionSpec(*of_batch, *jax.typeof(operands[name]).sharding.spec[is_mapped:])
        for name, (_, is_mapped) in described.items()
    }

    def resharded(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        return reshard(array, NamedSharding(mesh, spec))

    given = {
        name: resharded(operands[name], layout.spec(spread, *value))
        for name, value in described.items()
    }
    results = _on_all(spread, layout, mesh)(given)
    return {
        name: resharded(result, specs_kept[name]) if name in specs_kept else result
        for name, result in results.items()
    }


@functools.cache
def _warn_of_auto(mesh: AbstractMesh) -> None:
    logging.getLogger("jax_mhc").warning(
        "the mesh %s has auto axes beside explicit ones: XLA gathers what is split over auto axes "
        "for the kernels; make them explicit, or run the op in jax.shard_map over them", mesh
    )  # fmt: skip


@functools.cache
def _on_all(spread: Spread, layout: MeshLayout, mesh: AbstractMesh) -> Callable[[Values], Values]:
    operand_specs = {name: layout.spec(spread, *v) for name, v in spread.operands().items()}
    result_specs = {name: layout.spec(spread, *v) for name, v in spread.results().items()}
    spread = spread._replace(hidden_axes=layout.hidden)
    batch = layout.lead[0] if spread.has_batch else ()

    def of_one(operands: Values) -> Values:
        # Every element of a batch has a gradient of its own.
        kept = {name: varying_axes(array).union(batch) for name, array in operands.items()}
        results = on_device(run_here, spread, operands)
        return sum_up(results, missing_axes(spread, kept, operands))

    run: Callable[[Values], Values] = of_one
    if layout.axes():
        run = jax.shard_map(
            of_one,
            mesh=mesh,
            in_specs=(operand_specs,),
            out_specs=result_specs,
            # No axis over which nothing is sharded: an enclosing jax.vmap may have it.
            axis_names=set(layout.axes()),
        )

    def of_all(operands: Values) -> Values:
        return {
            name: reshard(result, NamedSharding(mesh, result_specs[name]))
            for name, result in run(operands).items()
        }

    return jax.jit(of_all)


def _layout(spread: Spread, operands: Values) -> MeshLayout:
    """The layout of the streams; other operands say what these leave open."""
    described = spread.operands()
    (streams, of_batch), *_ = described.values()
    rank = operands[streams.name].ndim - 2 - of_batch
    found: dict[int | str, Axes] = {}
    for name, (value, is_mapped) in described.items():
        if not value.has_tokens:
            continue
        # The dimension of the call that each dimension of the operand is: a number, or a letter.
        which: list[int | str] = [0] if is_mapped else []
        which += range(spread.has_batch, spread.has_batch + rank)
        which += value.dims
        of_dims = entries(jax.typeof(operands[name]).sharding.spec, operands[name].ndim)
        for dim, axes in zip(which, of_dims, strict=True):
            check_streams(spread.call, name, axes if value.is_streams and dim == "n" else ())
            is_shared = isinstance(dim, int) or dim == "C"
            if axes and is_shared and found.setdefault(dim, axes) != axes:
                _fail_to_agree(spread.call, name, found[dim], axes)
    lead = tuple(found.get(at, ()) for at in range(spread.has_batch + rank))
    layout = MeshLayout(lead, found.get("C", ()))
    if len(set(layout.axes())) < len(layout.axes()):
        _fail_to_agree(spread.call, "y", layout.lead, layout.hidden)
    return layout


def _fail_to_agree(call: Call, name: str, known: object, other: object) -> NoReturn:
    fail(
        ValueError, call.op, name, f"the same dimensions split over the same mesh axes as those of "
        f"the streams, {known}", other, "Bring it there with jax.sharding.reshard.",
    )  # fmt: skip
