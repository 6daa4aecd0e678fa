"""Calls on manual axes: what one device does, in a program of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jax_mhc._axes import Axes, varying_axes
from jax_mhc._call import Call, Values
from jax_mhc._mesh.split import run_split
from jax_mhc._mesh.spread import Spread, SpreadValue, map_batch

# A function that runs a call whose channels are not sharded over manual axes.
Leaf: TypeAlias = Callable[[Spread, Values], Values]


def run_manual(leaf: Leaf, spread: Spread, operands: Values) -> Values:
    """Runs a call on this device, and sums gradients up. Parameters come with all channels."""
    axes = spread.hidden_axes
    own = {
        name: _own_channels(axes, value, operands[name]) for name, value in spread.operands.items()
    }
    parts = on_device(leaf, spread, own)
    results = {
        name: _all_channels(axes, value, parts[name]) for name, value in spread.results.items()
    }
    kept = {name: varying_axes(array) for name, array in operands.items()}
    return sum_up(results, missing_axes(spread, kept, own))


def on_device(leaf: Leaf, spread: Spread, operands: Values) -> Values:
    """The results of one device's part of the operands; nothing is summed up."""
    if not spread.hidden_axes:
        return leaf(spread, operands)
    if spread.mapped is not None:
        return map_batch(partial(on_device, leaf, spread._replace(mapped=None)), spread, operands)

    def inner(call: Call, operands: Values) -> Values:
        return leaf(Spread(call), operands)

    return run_split(inner, spread.call, spread.hidden_axes, operands)


def missing_axes(
    spread: Spread, kept: Mapping[str, frozenset[str]], operands: Values
) -> dict[str, Axes]:
    """Of each result, the axes over which it is a partial sum: only gradients have any.

    Args:
        spread: the call.
        kept: the axes over which the gradient of each operand may vary.
        operands: the operands of the call.
    """
    everywhere = frozenset[str]().union(*map(varying_axes, operands.values()))
    # In the mesh's order, which is the same in every process.
    names = jax.typeof(operands[spread.call.operands[0]]).sharding.mesh.axis_names

    def missing(result: str, has_channels: bool) -> Axes:
        # Of what is no operand, such as the weights of collapse.
        others = everywhere if has_channels else everywhere.difference(spread.hidden_axes)
        axes = everywhere - kept.get(result.removeprefix("d_"), others)
        return tuple(name for name in names if name in axes) if result.startswith("d_") else ()

    return {name: missing(name, "C" in v.value.dims) for name, v in spread.results.items()}


def sum_up(results: Values, axes: Mapping[str, Axes]) -> Values:
    """Sums each result up over its axes; XLA makes one all-reduce of those with the same axes."""
    return {
        name: jax.lax.psum(result, axes[name]) if axes[name] else result
        for name, result in results.items()
    }


def _channels_axis(value: SpreadValue) -> int | None:
    """The axis of a parameter that has the channels, if any."""
    if value.value.has_tokens or "C" not in value.value.dims:
        return None
    return value.value.dims.index("C") + value.is_mapped


def _own_channels(axes: Axes, value: SpreadValue, array: jax.Array) -> jax.Array:
    """Channels of a parameter that this device has; all of other values."""
    at = _channels_axis(value)
    if not axes or at is None:
        return array
    return own_part(array, axes, at)


def own_part(array: jax.Array, axes: Axes, at: int) -> jax.Array:
    """The part of a dimension that this device has where it is split over manual axes."""
    own = array.shape[at] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(axes) * own, own, at)


def _all_channels(axes: Axes, value: SpreadValue, array: jax.Array) -> jax.Array:
    """The gradient of all channels of a parameter, zero for those of other devices."""
    at = _channels_axis(value)
    if not axes or at is None:
        return array
    own, shape = array.shape[at], list(array.shape)
    shape[at] *= jax.lax.axis_size(axes)
    zeros = jnp.zeros(shape, array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, array, jax.lax.axis_index(axes) * own, at)
