"""What the modules for Flax and Equinox share: their streams, and the call of their layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_mhc import _check, _errors
from jax_mhc._dispatch import Implementation
from jax_mhc._ops.post import post
from jax_mhc._ops.pre import pre
from jax_mhc._types import MHCParams


def streams(op: str, x: Any, num_streams: int, hidden: int) -> jax.Array:
    """Streams `[..., n, C]` of the n and C that a module was made for."""
    x = _check.array(op, "x", x)
    if x.shape[-2:] != (num_streams, hidden):
        _errors.fail(
            ValueError, op, "x", f"streams [..., {num_streams}, {hidden}]", list(x.shape),
            f"Make streams from a hidden state [..., {hidden}] with "
            f"jax_mhc.expand(u, streams={num_streams}), once, in front of the first layer.",
        )  # fmt: skip
    return _check.streams(op, "x", x)


def residual(
    op: str,
    layer: Callable[[jax.Array], Any],
    x: jax.Array,
    params: MHCParams,
    *,
    implementation: Implementation,
    **options: Any,
) -> tuple[Any, jax.Array]:
    """`mhc_residual`, and h_res; of a layer that returns `(y, *rest)`, `(streams, *rest)`."""
    u, ctx = pre(x, params, implementation=implementation, **options)
    out = layer(u)
    # An empty tuple is no array, which the check says.
    returns_rest = isinstance(out, tuple) and len(out) > 0
    y, rest = (out[0], out[1:]) if returns_rest else (out, ())
    y = _check.layer_output(op, "the layer's result", y, x)
    x_new = post(checkpoint_name(y, "mhc_layer_output"), ctx, implementation=implementation)
    return ((x_new, *rest) if returns_rest else x_new), ctx.h_res
