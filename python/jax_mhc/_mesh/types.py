"""New arrays that are sharded as others are, for carries of loops, whose types may not change."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from jax_mhc._axes import (
    axes_of,
    entries,
    split_as_tokens,
    vary,
    varying_axes,
    varying_like,
)
from jax_mhc._mesh.auto import empty_auto


def sharded_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """An array, sharded as another of the same shape is."""
    if axes_of(other, AxisType.Explicit):
        array = reshard(array, jax.typeof(other).sharding)
    return varying_like(array, other)


def of_tokens(array: jax.Array, x: jax.Array, hidden_axes: tuple[str, ...]) -> jax.Array:
    """Values of tokens, without channels, on the devices that have the tokens of streams x."""
    array = split_as_tokens(array, x)
    return vary(array, varying_axes(x) - frozenset(hidden_axes), jax.typeof(x).sharding.mesh)


def empty_stack(num: int, like: jax.core.ShapedArray) -> jax.Array:
    """Memory for `num` arrays of the type of `like`, which may hold anything: `[num, ...]`."""
    mesh, varying = like.sharding.mesh, varying_axes(like)
    if mesh.empty and not (context := jax.sharding.get_abstract_mesh()).empty:
        # Values that a loop makes of arguments on no mesh are on that of the program.
        spec = PartitionSpec(*[None] * len(like.shape))
        mesh, like = context, like.update(sharding=NamedSharding(context, spec))
    if jax.device_count() > 1 and (mesh.empty or AxisType.Auto in mesh.axis_types):
        if AxisType.Explicit in mesh.axis_types:
            empty = reshard(jnp.zeros((num, *like.shape), like.dtype), PartitionSpec())
        else:
            empty = empty_auto((num, *like.shape), like.dtype, mesh)
        return vary(empty, varying, mesh)
    of_dims = entries(like.sharding.spec, len(like.shape))
    sharded = [axis for axes in of_dims for axis in axes]

    def on_one() -> jax.Array:
        own = [
            size // math.prod(mesh.shape[axis] for axis in axes)
            for size, axes in zip(like.shape, of_dims, strict=True)
        ]
        return vary(jax.lax.empty((num, *own), like.dtype), varying.union(sharded), mesh)

    if not sharded:
        empty = on_one()
        return reshard(empty, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else empty
    spec = PartitionSpec(None, *like.sharding.spec)
    on_all = jax.shard_map(on_one, mesh=mesh, in_specs=(), out_specs=spec, axis_names=set(sharded))
    return on_all()


def empty_stack_of(num: int, x: jax.Array) -> jax.Array:
    """Memory for `num` arrays like x, as `empty_stack`; for each element of a batch its own."""

    @custom_vmap
    def empty(x: jax.Array) -> jax.Array:
        return empty_stack(num, jax.typeof(x))

    @empty.def_vmap
    def _(axis_size: int, _: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        return jnp.moveaxis(empty_stack(num, jax.typeof(x)), 0, 1), True

    return empty(jax.lax.stop_gradient(x))
