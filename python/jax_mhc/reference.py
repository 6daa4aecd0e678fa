"""The ops in plain jax.numpy: the oracle of the tests and the fallback where there are no kernels.

Written for speed under XLA too: one projection for all coefficients, the division by the RMS after
it, sums over streams that XLA fuses into one loop over the hidden axis, Sinkhorn with the tokens
as the last axis. Sums and coefficients are float32 (float64 for float64 streams); streams are
rounded once, at the end.
Every differentiation mode works, forward mode and higher orders included.

The functions take what the public functions of the same name take, without `implementation`. The
public functions check their arguments; these do not.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_mhc._axes import split_as_tokens
from jax_mhc._check import accumulation_dtype, given_weights
from jax_mhc._log_derivatives import log_normalized, log_shifted, matrix_of
from jax_mhc._types import Context, HeadParams, MHCConfig, MHCParams
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["collapse", "head", "post", "post_pre", "pre", "sinkhorn"]


def _inverse_rms(x: jax.Array, config: MHCConfig, axis: tuple[int, ...] = (-2, -1)) -> jax.Array:
    """1 / rms(x) over the n·C values of a token [15], or over the C of a stream."""
    mean_square = jnp.mean(jnp.square(x), axis)
    if config.norm_eps_mode == "inside":
        return lax.rsqrt(mean_square + config.norm_eps)
    # sqrt has no derivative at 0; a token of zeros must not turn the gradient into NaN.
    positive = mean_square > 0
    rms = jnp.where(positive, jnp.sqrt(jnp.where(positive, mean_square, 1.0)), 0.0)
    return 1.0 / (rms + config.norm_eps)


def projection(x: jax.Array, phi: jax.Array, config: MHCConfig) -> tuple[jax.Array, jax.Array]:
    """Projection m = r · (vec(x) phi) `[..., K]` and r `[...]` [14, 15] of x `[..., n, C]`."""
    # Not -1 for the last size: it cannot be inferred where there are no tokens.
    flat = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    projected = jnp.matmul(flat, phi, precision=lax.Precision.HIGHEST)
    r = _inverse_rms(x, config)
    return r[..., None] * projected, r


@jax.custom_jvp
def mix(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Σ_j weights[..., i, j] x[..., j, :]: [..., m, n] x [..., n, C] -> [..., m, C].

    Written out over the few streams, which XLA fuses with what surrounds it. The derivative with
    respect to the weights sums over the hidden axis, where a matrix product is several times faster
    than the scalar loops that it would get from XLA.
    """
    terms = (weights[..., :, j, None] * x[..., None, j, :] for j in range(x.shape[-2]))
    return functools.reduce(jnp.add, terms)


@mix.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (weights, x), (d_weights, d_x) = primals, tangents
    through_weights = jnp.matmul(d_weights, x, precision=lax.Precision.HIGHEST)
    return mix(weights, x), through_weights + mix(weights, d_x)


def weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Σ_i weights[..., i] x[..., i, :]."""
    return mix(weights[..., None, :], x)[..., 0, :]


def scaled_norm(u: jax.Array, scale: jax.Array, mean_square: jax.Array) -> jax.Array:
    """The RMSNorm of u `[..., C]`: w · u / sqrt(mean_square), which has an eps added."""
    return for_tokens(scale, u) * (u * lax.rsqrt(mean_square))


def _rounded_off(minuend: jax.Array, subtrahend: jax.Array, difference: jax.Array) -> jax.Array:
    """Returns what rounding took from a difference, exactly (Knuth), up to 64.

    Where it is larger, neighbouring numbers differ by more than 64. Where the difference is
    infinite, it is a number too.
    """
    less = difference - minuend
    lost = (minuend - (difference - less)) - (subtrahend + less)
    return jnp.fmin(jnp.fmax(lost, -64.0), 64.0)


# Jitted, so that its loop, and that of its gradient, are compiled once outside of jax.jit, too.
@functools.partial(jax.jit, static_argnames="config")
def sinkhorn(
    logits: Float[jax.Array, "*tokens n n"], *, config: MHCConfig = PAPER
) -> Float[jax.Array, "*tokens n n"]:
    """Projects `[..., n, n]` onto the doubly stochastic matrices [9]; see `jax_mhc.sinkhorn`."""
    if config.sinkhorn_iters == 0:
        return jnp.exp(logits)
    # Tokens last, so that the sums over n values vectorise over tokens: [n, n, ...].
    logits = jnp.moveaxis(logits, (-2, -1), (0, 1))
    first, second = (0, 1) if config.order == "column_row" else (1, 0)
    eps, add = config.sinkhorn_eps, config.sinkhorn_eps_mode == "add"

    # Differentiated with respect to log M, as the kernels do it; see _log_derivatives.py.
    def normalize(state: tuple[jax.Array, jax.Array], axis: int) -> tuple[jax.Array, jax.Array]:
        matrix, log = state
        total = jnp.sum(matrix, axis, keepdims=True)
        matrix = matrix / (total + eps if add else jnp.maximum(total, eps))
        normalized = log_normalized(log, matrix, axis)
        # Where eps took the place of the sum, it has no derivative.
        return matrix, normalized if add or eps == 0 else jnp.where(total < eps, log, normalized)

    # The softmax over the first axis.
    z = lax.stop_gradient(logits)
    largest = jnp.max(z, first, keepdims=True)
    below = z - largest
    matrix = jnp.exp(below)
    scale = 1 / jnp.sum(matrix, first, keepdims=True)
    matrix = matrix * scale
    log = log_normalized(logits, matrix, first)
    if eps == 0:
        # A whole group of the second axis may have vanished. Start again from the logits: here a
        # group's largest element is scaled to about 1 before anything is rounded away. After this
        # every sum is at least 1 / n², and plain divisions are safe.
        shift = jnp.max(below, second, keepdims=True)
        matrix = jnp.exp(below - shift + _rounded_off(z, largest, below)) * scale
    elif add:
        log = log_shifted(log, matrix, eps)
        matrix = matrix + eps
    matrix, log = lax.fori_loop(
        1,
        config.sinkhorn_iters,
        lambda _, state: normalize(normalize(state, first), second),
        normalize((matrix, log), second),
    )
    return jnp.moveaxis(matrix_of(matrix, log), (0, 1), (-2, -1))


def _mixed_permutations(logits: jax.Array, streams: int) -> jax.Array:
    """Σ_p softmax(logits)_p P_p over the permutations of the streams: [..., n!] -> [..., n, n]."""
    n, weights = streams, jax.nn.softmax(logits)
    matrices = np.eye(n)[list(itertools.permutations(range(n)))]  # [n!, n, n]
    rows = jnp.asarray(matrices.reshape(-1, n * n), weights.dtype)
    h_res = jnp.matmul(weights, rows, precision=lax.Precision.HIGHEST)
    return h_res.reshape(*weights.shape[:-1], n, n)


def for_tokens(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector with the rank of values of tokens `[..., K]`: JAX can be told to refuse less."""
    return lax.expand_dims(vector, range(like.ndim - 1))


def gates(alpha: jax.Array, streams: int, num: int) -> jax.Array:
    """The gate of each of K coefficients, that of its group: [A] -> [K]."""
    sizes = (streams, streams, num - 2 * streams)[: alpha.size]
    groups = zip(alpha, sizes, strict=True)
    return jnp.concatenate([jnp.broadcast_to(gate, size) for gate, size in groups])


def gated(m: jax.Array, alpha: jax.Array, bias: jax.Array, streams: int) -> jax.Array:
    """The logits z = alpha_group · m + bias [16]: [..., K] -> [..., K]."""
    return for_tokens(gates(alpha, streams, m.shape[-1]), m) * m + for_tokens(bias, m)


def coefficients(
    z: jax.Array, streams: int, config: MHCConfig, project: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h_pre, h_post, h_res from z `[..., K]` [17 to 19]; `project` is Sinkhorn."""
    n = streams
    h_pre = jax.nn.sigmoid(z[..., :n]) + config.pre_eps
    h_post = config.post_scale * jax.nn.sigmoid(z[..., n : 2 * n]) + config.post_eps
    return h_pre, h_post, _mixing(z[..., 2 * n :], n, config, project)


def _mixing(
    z_res: jax.Array,
    streams: int,
    config: MHCConfig,
    project: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """h_res from its logits `[..., K - 2n]` [19]; `project` is Sinkhorn."""
    n, matrices = streams, (*z_res.shape[:-1], streams, streams)
    match config.constraint:
        case "identity":
            return jnp.broadcast_to(jnp.eye(n, dtype=z_res.dtype), matrices)
        case "permutations":
            return _mixed_permutations(z_res, n)
        case "none":
            return z_res.reshape(matrices)
        case "birkhoff":
            return project(z_res.reshape(matrices))
        case _ as unknown:
            assert_never(unknown)


_Coefficients: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def _mhc(x: jax.Array, params: MHCParams, config: MHCConfig) -> _Coefficients:
    """h_pre, h_post and h_res of the tokens of x [14 to 19]."""
    n, project = x.shape[-2], functools.partial(sinkhorn, config=config)
    if params.phi is None or params.alpha is None:
        # Static coefficients are projected once, not once a token.
        h_pre, h_post, h_res = coefficients(params.bias, n, config, project)
        return _of_tokens(h_pre, x), _of_tokens(h_post, x), _of_tokens(h_res, x)
    m = checkpoint_name(projection(x, params.phi, config)[0], "mhc_coefficients")
    return coefficients(gated(m, params.alpha, params.bias, n), n, config, project)


def _hyper_connections(x: jax.Array, params: MHCParams, config: MHCConfig) -> _Coefficients:
    """The same of hyper-connections as published: alpha_group · tanh(m) + bias.

    m[j] = X[j] phi / rms(X[j]) has a column for h_pre[j], one for h_post[j], and one for each new
    stream k: h_res[k, j].
    """
    n = x.shape[-2]
    if params.phi is None or params.alpha is None:
        of_all = _of_tokens(params.bias, x)
    else:
        m = jnp.matmul(x, params.phi, precision=lax.Precision.HIGHEST)
        m = checkpoint_name(_inverse_rms(x, config, (-1,))[..., None] * m, "mhc_coefficients")
        # Column by column, and so new stream by new stream.
        by_column = jnp.swapaxes(m, -1, -2).reshape(*m.shape[:-2], n * (n + 2))
        of_all = gated(jnp.tanh(by_column), params.alpha, params.bias, n)
    h_pre, h_post, h_res = jnp.split(of_all, (n, 2 * n), axis=-1)
    return h_pre, h_post, h_res.reshape(*h_res.shape[:-1], n, n)


def _channels(x: jax.Array, params: MHCParams, config: MHCConfig) -> _Coefficients:
    """h_pre and h_post of the channels, the same for all tokens: `[1, ..., 1, n, C]`; and h_res."""
    *tokens, n, hidden = x.shape
    z_pre, z_post, z_res = jnp.split(params.bias, (n * hidden, 2 * n * hidden))
    of_all = (*(1 for _ in tokens), n, hidden)
    h_pre = jax.nn.sigmoid(z_pre.reshape(of_all)) + config.pre_eps
    h_post = config.post_scale * jax.nn.sigmoid(z_post.reshape(of_all)) + config.post_eps
    h_res = _mixing(z_res, n, config, functools.partial(sinkhorn, config=config))
    return h_pre, h_post, _of_tokens(h_res, x)


def _of_tokens(of_all: jax.Array, x: jax.Array) -> jax.Array:
    """What is the same for all tokens, for each token of x."""
    return split_as_tokens(jnp.broadcast_to(of_all, (*x.shape[:-2], *of_all.shape)), x)


# JAX would keep, for the derivatives of a product, weights of channels once for each token.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _sum_channels(h_pre: jax.Array, x: jax.Array) -> jax.Array:
    """Σ_i h_pre[i, c] x[..., i, c]."""
    return jnp.sum(h_pre * x, axis=-2)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _add_channels(mixed: jax.Array, h_post: jax.Array, y: jax.Array) -> jax.Array:
    """Mixed streams, and h_post[i, c] y[..., c] in each."""
    return mixed + h_post * y[..., None, :]


def pre(
    x: Float[jax.Array, "*tokens n C"],
    params: MHCParams,
    *,
    config: MHCConfig = PAPER,
    norm_scale: Float[jax.Array, " C"] | None = None,
    norm_scale_eps: float = 1e-6,
    h_pre: Float[jax.Array, "*tokens n"] | None = None,
) -> tuple[Float[jax.Array, "*tokens C"], Context]:
    """The layer's input and the context for `post`; see `jax_mhc.pre`."""
    if config.schedule == "delayed":
        h_pre = given_weights("reference.pre", h_pre, x)
    given = h_pre
    wide = x.astype(accumulation_dtype(x.dtype))
    of_form = {"mhc": _mhc, "hyper_connections": _hyper_connections, "channels": _channels}
    h = checkpoint_name(of_form[config.form](wide, params, config), "mhc_coefficients")
    h_pre, h_post, h_res = h
    weights = h_pre if given is None else given
    u = _sum_channels(weights, wide) if weights.ndim == x.ndim else weighted_sum(weights, wide)
    if norm_scale is not None:
        mean_square = jnp.mean(jnp.square(u), axis=-1, keepdims=True)
        u = scaled_norm(u, norm_scale, mean_square + norm_scale_eps)
    u = checkpoint_name(u.astype(x.dtype), "mhc_layer_input")
    return u, Context(x=x, h_pre=h_pre, h_post=h_post, h_res=h_res)


def post(
    y: Float[jax.Array, "*tokens C"], ctx: Context, *, bias: Float[jax.Array, " C"] | None = None
) -> Float[jax.Array, "*tokens n C"]:
    """The new streams; see `jax_mhc.post`."""
    wide = ctx.x.astype(ctx.h_res.dtype)
    mixed = mix(ctx.h_res, wide)
    y = y.astype(wide.dtype)
    if bias is not None:
        y = y + for_tokens(bias, y)
    if ctx.h_post.ndim == wide.ndim:
        x_new = _add_channels(mixed, ctx.h_post, y)
    else:
        x_new = mixed + mix(ctx.h_post[..., :, None], y[..., None, :])
    return checkpoint_name(x_new.astype(ctx.x.dtype), "mhc_streams")


def post_pre(
    y: Float[jax.Array, "*tokens C"],
    ctx: Context,
    params: MHCParams,
    *,
    config: MHCConfig = PAPER,
    norm_scale: Float[jax.Array, " C"] | None = None,
    norm_scale_eps: float = 1e-6,
    h_pre: Float[jax.Array, "*tokens n"] | None = None,
) -> tuple[Float[jax.Array, "*tokens C"], Context]:
    """`post` of one sublayer, then `pre` of the next; see `jax_mhc.post_pre`."""
    if h_pre is None and config.schedule == "delayed":
        h_pre = ctx.h_pre
    return pre(
        post(y, ctx),
        params,
        config=config,
        norm_scale=norm_scale,
        norm_scale_eps=norm_scale_eps,
        h_pre=h_pre,
    )


def collapse(
    x: Float[jax.Array, "*tokens n C"], h_pre: Float[jax.Array, "*tokens n"]
) -> Float[jax.Array, "*tokens C"]:
    """The sum of the streams with given weights; see `jax_mhc.collapse`."""
    wide = x.astype(accumulation_dtype(x.dtype))
    return checkpoint_name(weighted_sum(h_pre, wide).astype(x.dtype), "mhc_layer_input")


def head(
    x: Float[jax.Array, "*tokens n C"], params: HeadParams, *, config: MHCConfig = PAPER
) -> Float[jax.Array, "*tokens C"]:
    """The learned exit from the streams; see `jax_mhc.head`."""
    wide = x.astype(accumulation_dtype(x.dtype))
    m = checkpoint_name(projection(wide, params.phi, config)[0], "mhc_coefficients")
    alpha, bias = for_tokens(params.alpha, m), for_tokens(params.bias, m)
    weights = jax.nn.sigmoid(alpha * m + bias) + config.pre_eps
    return checkpoint_name(weighted_sum(weights, wide).astype(x.dtype), "mhc_layer_input")
