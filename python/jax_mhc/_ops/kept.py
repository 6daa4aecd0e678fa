"""What a backward pass keeps, without arrays that have no values.

What is not there (a norm, the projection of static coefficients) is an array without values for the
kernels. XLA of jaxlib 0.11 crashes where one leaves or enters a `jax.shard_map`, as what
the backward pass keeps does when the map is differentiated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Empty:
    """In place of such an array."""

    shape: tuple[int, ...]
    dtype: Any


def keep(tree: Any) -> Any:
    """A pytree of arrays as it may be kept."""
    # Not all that are empty: where there are no tokens, types tell how these are split.
    return jax.tree.map(lambda a: _Empty(a.shape, jnp.dtype(a.dtype)) if _is_absent(a) else a, tree)


def _is_absent(array: Any) -> bool:
    return array.ndim > 0 and array.shape[-1] == 0


def named(tree: Any, name: str) -> Any:
    """A pytree of arrays with a name for policies of `jax.checkpoint`, which may keep them."""
    return jax.tree.map(lambda a: a if _is_absent(a) else checkpoint_name(a, name), tree)


def restore(tree: Any) -> Any:
    """The arrays again."""
    return jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype) if isinstance(a, _Empty) else a,
        tree,
        is_leaf=lambda a: isinstance(a, _Empty),
    )
