"""Copies of an array along a new axis, whose gradient is rounded once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jax_mhc._check import accumulation_dtype


# Inlined where it is traced; outside of jit the wider array is never in memory.
@partial(jax.jit, static_argnames=("num", "axis"), inline=True)
def copies(array: jax.Array, num: int, axis: int) -> jax.Array:
    """`num` copies of an array along a new axis.

    Their gradient is a sum over this axis. JAX would compute it in the dtype of the array; here it
    is float32 (float64 for float64), rounded once, in every mode.
    """
    wide = jnp.expand_dims(array.astype(accumulation_dtype(array.dtype)), axis)
    shape = list(wide.shape)
    shape[axis] = num
    return jnp.broadcast_to(wide, shape).astype(array.dtype)
