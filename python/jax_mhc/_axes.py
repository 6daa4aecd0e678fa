"""Mesh axes in the types of arrays: over which they are split, and over which they vary."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec, reshard
from jax.typing import DTypeLike

Axes = tuple[str, ...]


def entries(spec: PartitionSpec, rank: int) -> list[Axes]:
    """The axes over which each dimension is split."""
    padded = [*spec, *[None] * (rank - len(spec))]
    return [() if e is None else e if isinstance(e, tuple) else (e,) for e in padded]


def axes_of(array: jax.Array, kind: AxisType) -> Axes:
    """The axes of this kind of the mesh that an array lies on."""
    mesh = jax.typeof(array).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, other in kinds if other == kind)


def spec_axes(spec: PartitionSpec) -> frozenset[str]:
    """The axes over which any dimension is split."""
    return frozenset(axis for axes in entries(spec, len(spec)) for axis in axes)


def varying_axes(array: jax.Array | jax.core.ShapedArray) -> frozenset[str]:
    """The manual axes of a `jax.shard_map` over which an array, or one of this type, varies."""
    aval = array if isinstance(array, jax.core.ShapedArray) else jax.typeof(array)
    # JAX 0.9 calls it vma.
    return aval.vma if hasattr(aval, "vma") else aval.mat.varying


def typed(
    shape: tuple[int, ...], dtype: DTypeLike, varying: frozenset[str], like: jax.core.ShapedArray
) -> jax.core.ShapedArray:
    """The type of an array on the mesh of `like` that is split over no explicit axis."""
    mesh = like.sharding.mesh
    if mesh.empty:
        return jax.core.ShapedArray(shape, dtype)
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * len(shape)))
    types: dict[str, Any]
    if hasattr(like, "vma"):
        types = {"vma": varying}
    else:
        types = {"manual_axis_type": like.mat.update(varying=varying)}
    return jax.core.ShapedArray(shape, dtype, sharding=sharding, **types)


def vary(array: jax.Array, axes: frozenset[str], mesh: AbstractMesh) -> jax.Array:
    """An array that varies over these axes of the mesh too, if it does not."""
    missing = axes - varying_axes(array)
    # In the mesh's order, which is the same in every process.
    names = tuple(name for name in mesh.axis_names if name in missing)
    return jax.lax.pcast(array, names, to="varying")


def split_as_tokens(array: jax.Array, x: jax.Array) -> jax.Array:
    """Values of tokens, without channels, split over explicit axes as the tokens of streams x."""
    if not axes_of(x, AxisType.Explicit):
        return array
    sharding = jax.typeof(x).sharding
    spec = PartitionSpec(*(axes or None for axes in entries(sharding.spec, x.ndim)[:-2]))
    return reshard(array, NamedSharding(sharding.mesh, spec))


def varying_like(array: jax.Array, *others: jax.Array) -> jax.Array:
    """An array that varies over all manual axes over which any of the others does."""
    axes = frozenset[str]().union(*map(varying_axes, others))
    return vary(array, axes, jax.typeof(others[0]).sharding.mesh)
