"""Calls on explicit axes: the types of the operands say how they are sharded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, reshard

from jax_mhc._axes import Axes, axes_of, entries, varying_axes
from jax_mhc._call import Call, Values
from jax_mhc._errors import Refusal
from jax_mhc._mesh.manual import missing_axes, on_device, sum_up
from jax_mhc._mesh.spread import MeshLayout, Spread, check_streams, run_here


def is_explicit(streams: jax.Array) -> bool:
    """True if a call on these streams runs on explicit axes."""
    return bool(axes_of(streams, AxisType.Explicit))


def run_explicit(spread: Spread, operands: Values) -> Values:
    """Runs a call on all devices. Operands that are sharded otherwise than the streams are moved.

    Gradients are sharded as what they are gradients of; those of elements of a batch have the axes
    of the batch besides.
    """
    mesh = jax.typeof(operands[spread.call.operands[0]]).sharding.mesh
    if AxisType.Auto in mesh.axis_types:
        _warn_of_auto(mesh)
    layout = _layout(spread, operands)
    values = spread.operands
    batch = [] if spread.mapped is None else [layout.batch or None]
    specs = {
        f"d_{name}": PartitionSpec(
            *batch, *jax.typeof(operands[name]).sharding.spec[value.is_mapped :]
        )
        for name, value in values.items()
    }
    moved = {
        name: reshard(operands[name], NamedSharding(mesh, layout.spec(value)))
        for name, value in values.items()
    }
    results = _on_all(spread, layout, mesh)(moved)
    return {
        name: reshard(result, NamedSharding(mesh, specs[name])) if name in specs else result
        for name, result in results.items()
    }


@functools.cache
def _warn_of_auto(mesh: AbstractMesh) -> None:
    logging.getLogger("jax_mhc").warning(
        "the mesh %s has auto axes beside explicit ones: XLA gathers what is split over auto axes "
        "for the kernels; make them explicit, or run the op in jax.shard_map over them",
        mesh,
    )


@functools.cache
def _on_all(spread: Spread, layout: MeshLayout, mesh: AbstractMesh) -> Callable[[Values], Values]:
    """The call on arrays that are sharded by this layout."""
    specs = {name: layout.spec(value) for name, value in spread.results.items()}
    of_device = spread._replace(hidden_axes=layout.hidden)

    def of_one(operands: Values) -> Values:
        # Every element of a batch has a gradient of its own.
        kept = {
            name: varying_axes(operand).union(layout.batch) for name, operand in operands.items()
        }
        results = on_device(run_here, of_device, operands)
        return sum_up(results, missing_axes(of_device, kept, operands))

    run = of_one
    if layout.axes():
        run = jax.shard_map(
            of_one,
            mesh=mesh,
            in_specs=({name: layout.spec(value) for name, value in spread.operands.items()},),
            out_specs=specs,
            # Not those over which nothing is sharded: an enclosing jax.vmap may have them.
            axis_names=set(layout.axes()),
        )

    def of_all(operands: Values) -> Values:
        if 0 in operands[spread.call.operands[0]].shape:
            # XLA of jaxlib 0.11 crashes where an array without values leaves a jax.shard_map.
            types = jax.eval_shape(functools.partial(run_here, spread), operands)
            results = {name: jnp.zeros(type.shape, type.dtype) for name, type in types.items()}
        else:
            results = run(operands)
        return {
            name: reshard(result, NamedSharding(mesh, specs[name]))
            for name, result in results.items()
        }

    return jax.jit(of_all)


def _layout(spread: Spread, operands: Values) -> MeshLayout:
    """The layout of the streams; what they leave open is as other operands have it."""
    found: dict[str, Axes] = {}
    for name, value in spread.operands.items():
        if not value.value.has_tokens:
            continue
        operand = operands[name]
        of_dims = entries(jax.typeof(operand).sharding.spec, operand.ndim)
        for factor, axes in zip(value.factors(operand.ndim), of_dims, strict=True):
            check_streams(spread.call, name, axes if factor == "n" else ())
            if axes and factor != "-" and found.setdefault(factor, axes) != axes:
                _fail_to_agree(spread.call, name, found[factor], axes)
    first = spread.call.operands[0]
    factors = spread.operands[first].factors(operands[first].ndim)
    tokens = tuple(found.get(factor, ()) for factor in factors if factor.startswith("t"))
    layout = MeshLayout(found.get("b", ()), tokens, found.get("C", ()))
    if len(set(layout.axes())) < len(layout.axes()):
        batch = () if spread.mapped is None else (layout.batch,)
        _fail_to_agree(spread.call, "y", (*batch, *layout.tokens), layout.hidden)
    return layout


def _fail_to_agree(call: Call, name: str, known: object, other: object) -> NoReturn:
    raise Refusal(ValueError, call.op, name).expected(
        f"the same dimensions split over the same mesh axes as those of the streams, {known}",
        other,
        "Bring it there with jax.sharding.reshard.",
    )
