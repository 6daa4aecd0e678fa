"""Calls on manual axes: what one device does, in a program of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jax_mhc._axes import Axes, varying_axes
from jax_mhc._call.table import Call, Value, Values
from jax_mhc._mesh.split import run_split
from jax_mhc._mesh.spread import Spread, map_batch

# Runs a call whose channels are not sharded over manual axes.
Leaf: TypeAlias = Callable[[Spread, Values], Values]


def run_manual(leaf: Leaf, spread: Spread, operands: Values) -> Values:
    """The results of a call on this device, with gradients summed over devices.

    Parameters come with all channels.
    """
    axes = spread.hidden_axes
    own = {
        name: _own_channels(axes, operands[name], *described)
        for name, described in spread.operands().items()
    }
    here = on_device(leaf, spread, own)
    results = {
        name: _all_channels(axes, here[name], *described)
        for name, described in spread.results().items()
    }
    kept = {name: varying_axes(array) for name, array in operands.items()}
    return sum_up(results, missing_axes(spread, kept, own))


def on_device(leaf: Leaf, spread: Spread, operands: Values) -> Values:
    """The results of a call on a device's own shards; nothing is summed over devices."""
    if not spread.hidden_axes:
        return leaf(spread, operands)
    if spread.has_batch:
        return map_batch(partial(on_device, leaf, spread._replace(mapped=None)), spread, operands)

    def inner(call: Call, operands: Values) -> Values:
        return leaf(Spread(call), operands)

    return run_split(inner, spread.call, spread.hidden_axes, operands)


def missing_axes(
    spread: Spread, kept: Mapping[str, frozenset[str]], operands: Values
) -> dict[str, Axes]:
    """The axes over which each result is to be summed: only gradients have any.

    Args:
        spread: the call.
        kept: the axes over which the gradient of each operand may vary.
        operands: the operands of the call.
    """
    everywhere = frozenset[str]().union(*map(varying_axes, operands.values()))
    # In the mesh's order, which is the same in every process.
    streams = operands[spread.call.operands[0]]
    names = jax.typeof(streams).sharding.mesh.axis_names
    missing = {
        result: everywhere - kept.get(result.removeprefix("d_"), everywhere)
        if result.startswith("d_")
        else frozenset[str]()
        for result in spread.call.results
    }
    return {
        result: tuple(name for name in names if name in axes) for result, axes in missing.items()
    }


def sum_up(results: Values, axes: Mapping[str, Axes]) -> Values:
    """The sum of each result over its axes; XLA makes one all-reduce of equal axes."""
    return {
        name: jax.lax.psum(result, axes[name]) if axes[name] else result
        for name, result in results.items()
    }


def _channels_axis(value: Value, is_mapped: bool) -> int | None:
    """The axis of a parameter that has the channels, if any."""
    if value.has_tokens or "C" not in value.dims:
        return None
    return value.dims.index("C") + is_mapped


def _own_channels(axes: Axes, array: jax.Array, value: Value, is_mapped: bool) -> jax.Array:
    """This device's channels of a parameter; other values as they are."""
    at = _channels_axis(value, is_mapped)
    if not axes or at is None:
        return array
    own = array.shape[at] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(axes) * own, own, at)


def _all_channels(axes: Axes, array: jax.Array, value: Value, is_mapped: bool) -> jax.Array:
    """The gradient of all channels of a parameter, zero for those of other devices."""
    at = _channels_axis(value, is_mapped)
    if not axes or at is None:
        return array
    own, shape = array.shape[at], list(array.shape)
    shape[at] *= jax.lax.axis_size(axes)
    zeros = jnp.zeros(shape, array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, array, jax.lax.axis_index(axes) * own, at)
