"""What every fused op is made of: a function with a backward pass of its own, on calls by name.

    custom_vjp(forward, backward), both of which run

        custom_vmap(run(call))

- **call** (`_call/primitive.py`): a primitive, lowered to one custom call on one device, or to
  plain JAX for platforms without kernels.
- **run** (`_mesh`): the call on all devices. Leading dimensions are handed over as they are.
- **custom_vmap**: a mapped axis becomes one more leading dimension of the same call. That cannot
  be where each element of the batch has its own parameters or its own parameter gradient; there
  every device runs its elements one after another, or small ones together in plain JAX.

Values of a call go by name. Those of an absent group (no norm, static coefficients) are not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jax_mhc._call import Settings, Values, first_order, reverse_mode_only
from jax_mhc._mesh import Spread, map_batch, run
from jax_mhc._ops.params import packed_phi, unpacked_phi

# Results of an op by name, and what its backward pass keeps.
Forward: TypeAlias = Callable[[Settings, Values], tuple[Values, Values]]

# Gradients of an op's operands by their names, from what is kept and the cotangents of its results.
# A cotangent may be a `SymbolicZero`.
Backward: TypeAlias = Callable[[Settings, Values, dict[str, Any]], Values]

# The name for policies of `jax.checkpoint` that each result of a forward call has.
_NAMES = {"x_new": "mhc_streams", "u": "mhc_layer_input"}


def fused_op(forward: Forward, backward: Backward) -> Callable[[str, Settings, Values], Values]:
    """The op `(name, settings, operands) -> results`, differentiable once in reverse mode.

    The first of the operands has to be the streams, or what is in their place.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def op(settings: Settings, operands: Values) -> Values:
        return forward(settings, operands)[0]

    def keep(settings: Settings, operands: dict[str, Any]) -> tuple[Values, Values]:
        return forward(settings, {name: operand.value for name, operand in operands.items()})

    def gradients(settings: Settings, kept: Values, cotangents: dict[str, Any]) -> tuple[Values]:
        return (backward(settings, kept, cotangents),)

    op.defvjp(keep, gradients, symbolic_zeros=True)

    def checked(name: str, settings: Settings, operands: Values) -> Values:
        first, *_ = operands
        others = {key: value for key, value in operands.items() if key != first}
        streams, others = reverse_mode_only(name, operands[first], others)
        return op(settings, {first: streams} | others)

    return checked


def fused_call(
    name: str,
    settings: Settings,
    operands: Values,
    *,
    kept_alone: Sequence[str] = ("m", "r", "rho"),
    **attributes: bool | float,
) -> Values:
    """The results of the call `name` of docs/calls.md on all devices. It has no derivative.

    Args:
        name: the name of the call.
        settings: the settings of its op.
        operands: its operands, without absent groups; phi is `[n·C, K]`, as its gradient is.
        kept_alone: the results that nothing reads but what keeps them for the backward pass.
        attributes: the call's own attributes.
    """
    call = settings.call(name, operands, **attributes)
    phi = operands.get("phi")
    if phi is not None:
        operands = operands | {"phi": packed_phi(phi, operands["x"].shape[-2])}
    operands = {key: first_order(call.op, operand) for key, operand in operands.items()}
    results = _batched(Spread(call, hidden_axes=settings.hidden_axes))(operands)
    if phi is not None and "d_phi" in results:
        results = results | {"d_phi": unpacked_phi(results["d_phi"], phi)}
    if not call.is_forward:
        return results
    # Where a scan stacks a result, XLA for GPUs lets the call write it to its place (dynamic-slice
    # fusion). If somebody else in the loop reads that result, the versions of JAX 0.11 leave a
    # second call for him (openxla/xla#45799).
    return {
        key: result if key in kept_alone else jax.lax.optimization_barrier(result)
        for key, result in results.items()
    }


def named(results: Values) -> Values:
    """The results of a forward call with names for policies of `jax.checkpoint`."""
    return {
        key: checkpoint_name(result, _NAMES.get(key, "mhc_coefficients"))
        for key, result in results.items()
    }


def instantiate(cotangent: Any) -> jax.Array:
    """The array that a symbolic zero stands for, or the cotangent itself."""
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


@functools.cache
def _batched(spread: Spread) -> Callable[[Values], Values]:
    """The call with a rule for `jax.vmap`."""
    described = spread.operands()

    @custom_vmap
    def call(operands: Values) -> Values:
        return run(spread, operands)

    @call.def_vmap
    def _(
        axis_size: int, in_batched: list[dict[str, bool]], operands: Values
    ) -> tuple[Values, dict[str, bool]]:
        (batched,) = in_batched
        mapped = tuple(name for name in spread.call.operands if batched[name])
        everywhere = dict.fromkeys(spread.call.results, True)
        if spread.has_batch:
            return _batch_of_batches(spread, mapped)(operands), everywhere
        has_gradients = any(not value.has_tokens for value, _ in spread.results().values())
        if has_gradients or any(not described[name][0].has_tokens for name in mapped):
            return _batched(spread._replace(mapped=mapped))(operands), everywhere
        copied = {
            name: operand
            if batched[name] or not described[name][0].has_tokens
            else jnp.broadcast_to(operand, (axis_size, *operand.shape))
            for name, operand in operands.items()
        }
        return call(copied), everywhere

    return call


@functools.cache
def _batch_of_batches(spread: Spread, mapped: tuple[str, ...]) -> Callable[[Values], Values]:
    """The batches of a mapped batch, one after the other; outside of `jax.jit` compiled once."""
    run_one, outer = _batched(spread), spread._replace(mapped=mapped)
    return jax.jit(lambda operands: map_batch(run_one, outer, operands), inline=True)
