"""Calls on manual axes: what one device does, in a program of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_mhc._axes import Axes, varying_axes
from jax_mhc._call.table import Call, dims, is_parameter
from jax_mhc._mesh.split import run_split
from jax_mhc._mesh.spread import Spread, Value, map_batch, pack, unpack

# Runs a call whose channels are not split over manual axes, `(spread, *operands) -> results`.
Leaf = Callable[..., Sequence[Any]]


def run_manual(leaf: Leaf, spread: Spread, *operands: Any) -> list[Any]:
    """Runs a call on this device, and sums gradients up. Parameters come with all channels."""
    values = spread.operands()
    whole = pack(values, operands, operands[0].shape[-2])
    own = [
        _own_channels(spread.hidden_axes, value, array)
        for value, array in zip(values, whole, strict=True)
    ]
    results = [
        _all_channels(spread.hidden_axes, value, array)
        for value, array in zip(spread.results(), on_device(leaf, spread, *own), strict=True)
    ]
    kept = [varying_axes(array) for array in whole]
    return unpack(spread.results(), sum_up(results, missing_axes(spread, kept, own)))


def on_device(leaf: Leaf, spread: Spread, *operands: Any) -> Sequence[Any]:
    """What a device computes of what it has, phi being [n, C, K]; nothing is summed up."""
    if not spread.hidden_axes:
        return leaf(spread, *operands)
    if spread.mapped is not None:
        return map_batch(partial(on_device, leaf, spread._replace(mapped=None)), spread, operands)

    def inner(call: Call, *operands: Any) -> Sequence[Any]:
        return leaf(Spread(call), *operands)

    return run_split(inner, spread.call, spread.hidden_axes, *operands)


def missing_axes(
    spread: Spread, kept: Sequence[frozenset[str]], operands: Sequence[Any]
) -> list[Axes]:
    """Of each result, the axes over which it is to be summed up: only gradients have any.

    Args:
        spread: the call.
        kept: the axes over which the gradient of each operand may vary.
        operands: those of the call.
    """
    everywhere = frozenset[str]().union(*map(varying_axes, operands))
    of_gradients = dict(zip((f"d_{name}" for name in spread.call.operands), kept, strict=True))
    missing = (everywhere - of_gradients.get(name, everywhere) for name in spread.call.results)
    # In the mesh's order, which is the same in every process.
    names = jax.typeof(operands[0]).sharding.mesh.axis_names
    return [tuple(name for name in names if name in axes) for axes in missing]


def sum_up(results: Sequence[Any], axes: Sequence[Axes]) -> list[Any]:
    """Sums each result up over its axes; XLA makes one all-reduce of those with the same axes."""
    return [
        jax.lax.psum(result, some) if some else result
        for result, some in zip(results, axes, strict=True)
    ]


def _channels_axis(value: Value) -> int | None:
    """Which axis of a parameter has the channels, if any."""
    if not is_parameter(value.name) or "C" not in dims(value.name):
        return None
    return dims(value.name).index("C") + value.mapped


def _own_channels(axes: Axes, value: Value, array: Any) -> Any:
    """This device's channels of a parameter; all of other values."""
    at = _channels_axis(value)
    if not axes or at is None or not array.shape[at]:
        return array
    own = array.shape[at] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(axes) * own, own, at)


def _all_channels(axes: Axes, value: Value, array: Any) -> Any:
    """The gradient of all channels of a parameter, zero for those of other devices."""
    at = _channels_axis(value)
    if not axes or at is None or not array.shape[at]:
        return array
    own, shape = array.shape[at], list(array.shape)
    shape[at] *= jax.lax.axis_size(axes)
    zeros = jnp.zeros(shape, array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, array, jax.lax.axis_index(axes) * own, at)
