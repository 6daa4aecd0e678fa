"""mHC in plain JAX, in the form that measured fastest under jit on an H200: what kernels must beat.

One projection for all coefficients, on tensor cores (phi rounded to the streams' dtype), and the
division by the RMS after it; sums over the streams written out, which XLA fuses; Sinkhorn in a
fori_loop (unrolled, its gradient takes XLA minutes to compile). The functions take what those of
`jax_mhc.reference` take, for x `[T, n, C]` and the paper's settings. `jax_mhc.reference` itself
keeps phi in float32, which costs it speed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_mhc import HeadParams, MHCParams
from jax_mhc._types import Context
from jax_mhc.presets import PAPER


def sinkhorn(logits: jax.Array) -> jax.Array:
    def normalize(matrix: jax.Array, axis: int) -> jax.Array:
        return matrix / jnp.sum(matrix, axis, keepdims=True)

    return lax.fori_loop(
        1,
        PAPER.sinkhorn_iters,
        lambda _, matrix: normalize(normalize(matrix, -2), -1),
        normalize(jax.nn.softmax(logits, -2), -1),
    )


def _project(x: jax.Array, phi: jax.Array) -> jax.Array:
    flat = x.reshape(x.shape[0], -1)
    mean_square = jnp.mean(jnp.square(flat.astype(jnp.float32)), -1, keepdims=True)
    projected = jnp.dot(flat, phi.astype(x.dtype), preferred_element_type=jnp.float32)
    return projected * lax.rsqrt(mean_square + PAPER.norm_eps)


def _streams(x: jax.Array) -> list[jax.Array]:
    return [x[:, i].astype(jnp.float32) for i in range(x.shape[1])]


def _weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
    terms = [weights[:, i, None] * stream for i, stream in enumerate(_streams(x))]
    return sum(terms[1:], terms[0]).astype(x.dtype)


def _normalized(u: jax.Array, scale: jax.Array) -> jax.Array:
    wide = u.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), -1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + 1e-6) * scale).astype(u.dtype)


def pre(
    x: jax.Array,
    params: MHCParams,
    norm_scale: jax.Array | None = None,
    h_pre: jax.Array | None = None,
) -> tuple[jax.Array, Context]:
    given = h_pre
    assert params.phi is not None and params.alpha is not None
    n, m = x.shape[1], _project(x, params.phi)
    z_pre, z_post, z_res = (
        gate * columns + bias
        for gate, columns, bias in zip(
            params.alpha,
            jnp.split(m, (n, 2 * n), axis=1),
            jnp.split(params.bias, (n, 2 * n)),
            strict=True,
        )
    )
    h_pre = jax.nn.sigmoid(z_pre)
    h_post = PAPER.post_scale * jax.nn.sigmoid(z_post)
    h_res = sinkhorn(z_res.reshape(-1, n, n))
    u = _weighted_sum(h_pre if given is None else given, x)
    if norm_scale is not None:
        u = _normalized(u, norm_scale)
    return u, Context(x, h_pre, h_post, h_res)


def post(y: jax.Array, ctx: Context) -> jax.Array:
    old, wide_y = _streams(ctx.x), y.astype(jnp.float32)
    new = []
    for i in range(len(old)):
        total = ctx.h_post[:, i, None] * wide_y
        for j, stream in enumerate(old):
            total += ctx.h_res[:, i, j, None] * stream
        new.append(total.astype(ctx.x.dtype))
    return jnp.stack(new, 1)


def post_pre(
    y: jax.Array,
    ctx: Context,
    params: MHCParams,
    norm_scale: jax.Array | None = None,
    h_pre: jax.Array | None = None,
) -> tuple[jax.Array, Context]:
    return pre(post(y, ctx), params, norm_scale, h_pre)


def head(x: jax.Array, params: HeadParams) -> jax.Array:
    weights = jax.nn.sigmoid(params.alpha * _project(x, params.phi) + params.bias)
    return _weighted_sum(weights, x)
