"""Helpers of the modules for Flax and Equinox: their streams, and the call of their layer."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jax_mhc import _check, _errors
from jax_mhc._call.dispatch import Implementation
from jax_mhc._ops.streams import Streams
from jax_mhc._ops.sublayer import Options, Sublayer
from jax_mhc._types import Layer, MHCConfig, MHCParams

# What tells the keys of connections from those of layers: "mhc" in ASCII.
_FOLDED = 0x6D6863


def key(base: jax.Array, *counts: jax.Array | int) -> jax.Array:
    """A key for a connection, of one that a layer draws from or is made with."""
    for number in (_FOLDED, *counts):
        base = jax.random.fold_in(base, number)
    return base


def streams(op: str, x: object, num_streams: int, hidden: int) -> jax.Array | Streams:
    """Streams `[..., n, C]` of the n and C that a module was made for."""
    _errors.num_streams(op, "streams", num_streams)
    _errors.width(op, hidden)
    if not isinstance(x, Streams):
        x = _check.array(op, "x", x)
    if x.shape[-2:] != (num_streams, hidden):
        raise _errors.Refusal(ValueError, op, "x").expected(
            f"streams [..., {num_streams}, {hidden}]",
            list(x.shape),
            f"Make streams from a hidden state [..., {hidden}] with "
            f"jax_mhc.expand(u, streams={num_streams}), once, in front of the first layer.",
        )
    return x if isinstance(x, Streams) else _check.streams(op, "x", x)


def settings(
    op: str,
    *,
    layer: object,
    static: object,
    norm: object,
    norm_scale_eps: object,
    implementation: object,
) -> None:
    """Checks what the initial values do not."""
    remedy = "Pass the layer that the residual connection goes around."
    _errors.function(op, "layer", layer, "a module or function, layer(u, ...)", remedy)
    _errors.flag(op, "static", static)
    _errors.flag(op, "norm", norm)
    _check.norm_scale_eps(op, norm_scale_eps, np.dtype(np.float32))
    _check.implementation(op, implementation)


def residual(
    op: str,
    layer: Layer,
    x: jax.Array | Streams,
    params: MHCParams,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    *,
    config: MHCConfig,
    norm_scale: jax.Array | None,
    norm_scale_eps: float,
    implementation: Implementation,
) -> tuple[Any, jax.Array]:
    """`mhc_residual`, and h_res; of a layer that returns `(y, *rest)`, `(streams, *rest)`."""

    def run(u: jax.Array) -> tuple[jax.Array, tuple[object, ...] | None]:
        out = _check.call(op, "layer", "u and the arguments of the call", layer, u, *args, **kwargs)
        # An empty tuple is no array, which the check says.
        returns_rest = isinstance(out, tuple) and len(out) > 0
        y, rest = (out[0], out[1:]) if returns_rest else (out, None)
        return _check.layer_output(op, "the layer's result", y, x), rest

    options: Options = {
        "config": config,
        "norm_scale_eps": norm_scale_eps,
        "hidden_axis_name": None,
        "implementation": implementation,
    }
    x_new, ctx, rest = Sublayer(run, params, norm_scale, options).run(x)
    return (x_new if rest is None else (x_new, *rest)), ctx.h_res
