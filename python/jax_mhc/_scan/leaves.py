"""Leaves of pytrees of arrays: with a gradient or without, and keys for random numbers as bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

# The leaves of a pytree of arrays. Some may be None: those that a list of others has.
Leaves: TypeAlias = list[Any]
# An array, or its type.
Typed: TypeAlias = jax.Array | jax.core.ShapedArray


def type_of(atom: Any) -> jax.core.ShapedArray:
    """The type of a variable, or literal, that holds an array."""
    assert isinstance(atom.aval, jax.core.ShapedArray)
    return atom.aval


def raw(value: jax.Array) -> jax.Array:
    """The bits of a key for random numbers; other arrays as they are."""
    return jax.random.key_data(value) if is_key(value) else value


def is_key(value: Typed) -> bool:
    """Whether an array holds keys for random numbers."""
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def raw_type(aval: jax.core.ShapedArray) -> jax.core.ShapedArray:
    """The type of `raw` of a value of this type."""
    if not is_key(aval):
        return aval
    bits = jax.eval_shape(jax.random.key_data, aval)
    return jax.core.ShapedArray(bits.shape, bits.dtype)


def form_of(value: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The function that undoes `raw` for values like this one."""
    if not is_key(value):
        return lambda bits: bits
    implementation = jax.random.key_impl(value)
    return lambda bits: jax.random.wrap_key_data(bits, impl=implementation)


def is_inexact(value: Typed) -> bool:
    """Whether an array can have a gradient."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def partition(
    values: Leaves, condition: Callable[[jax.Array], bool] = is_inexact
) -> tuple[Leaves, Leaves]:
    """The values that have gradients and the others, each with None in place of the rest."""
    chosen = list(map(condition, values))
    return (
        [value if c else None for value, c in zip(values, chosen, strict=True)],
        [None if c else value for value, c in zip(values, chosen, strict=True)],
    )


def merge(values: Leaves, others: Leaves) -> Leaves:
    """One list again of the two that `partition` made."""
    return [b if a is None else a for a, b in zip(values, others, strict=True)]
