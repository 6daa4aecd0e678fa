"""The rule of a call for `jax.vmap`.

A mapped axis becomes one more leading dimension of the same call. That cannot be where each element
of the batch has its own parameters or its own parameter gradient; there every device runs its
elements one after another, or small ones together in plain JAX (`_call/primitive.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jax_mhc._call import Values
from jax_mhc._mesh.auto import run_auto
from jax_mhc._mesh.explicit import is_explicit, run_explicit
from jax_mhc._mesh.manual import run_manual
from jax_mhc._mesh.spread import Spread, map_batch

Run: TypeAlias = Callable[[Values], Values]


def run(spread: Spread, operands: Values) -> Values:
    """Runs a call on all devices. Gradients have the types of what they are gradients of."""
    if is_explicit(operands[spread.call.operands[0]]):
        return run_explicit(spread, operands)
    return run_manual(run_auto, spread, operands)


@functools.cache
def batched(spread: Spread) -> Run:
    """The call on all devices, with a rule for `jax.vmap`."""

    @custom_vmap
    def call(operands: Values) -> Values:
        return run(spread, operands)

    @call.def_vmap
    def _(
        axis_size: int, in_batched: list[dict[str, bool]], operands: Values
    ) -> tuple[Values, dict[str, bool]]:
        (is_batched,) = in_batched
        everywhere = dict.fromkeys(spread.call.results, True)
        mapped = tuple(name for name in spread.call.operands if is_batched[name])
        if spread.mapped is not None:
            return _batch_of_batches(spread, mapped)(operands), everywhere
        parameters = {value.name for value in spread.call.operand_values if not value.has_tokens}
        backward = not all(value.has_tokens for value in spread.call.result_values)
        if backward or not parameters.isdisjoint(mapped):
            return batched(spread._replace(mapped=mapped))(operands), everywhere
        copies = {
            name: jnp.broadcast_to(operand, (axis_size, *operand.shape))
            for name, operand in operands.items()
            if not is_batched[name] and name not in parameters
        }
        return call(operands | copies), everywhere

    return call


@functools.cache
def _batch_of_batches(spread: Spread, mapped: tuple[str, ...]) -> Run:
    """The batches of a mapped batch, one after the other; outside of `jax.jit` compiled once."""
    outer, call = spread._replace(mapped=mapped), batched(spread)
    return jax.jit(lambda operands: map_batch(call, outer, operands), inline=True)
