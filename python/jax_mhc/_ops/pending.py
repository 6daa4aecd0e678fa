"""The post of a sublayer that has yet to run, which loops over blocks carry."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_mhc._check import accumulation_dtype
from jax_mhc._mesh.types import of_tokens


class Pending(NamedTuple):
    """Operands of the post of a sublayer beside the streams.

    Attributes:
        y: the layer's output `[..., C]`.
        h_post: the weight of y in each stream `[..., n]`.
        h_res: the weights of the streams `[..., n, n]`.
    """

    y: jax.Array
    h_post: jax.Array
    h_res: jax.Array


def no_sublayer(x: jax.Array, hidden_axes: tuple[str, ...]) -> Pending:
    """Operands of a post that gives back x, and the cotangent of x, exactly."""
    *tokens, n, _ = x.shape
    wide = accumulation_dtype(x.dtype)
    h_res = jnp.broadcast_to(jnp.eye(n, dtype=wide), (*tokens, n, n))
    h_post, h_res = (of_tokens(h, x, hidden_axes) for h in (jnp.zeros((*tokens, n), wide), h_res))
    return Pending(jnp.zeros_like(x[..., 0, :]), h_post, h_res)
