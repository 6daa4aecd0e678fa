"""Initial values: a model that starts as the plain residual model, with streams that can differ."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_mhc import _check
from jax_mhc._errors import Refusal, flag, num_streams, shown, width
from jax_mhc._types import HeadParams, MHCConfig, MHCParams
from jax_mhc.presets import PAPER

# The paper's initial value of the gates.
_ALPHA = 0.01

# Weight that a stream keeps for itself in H_res at initialisation.
_H_RES_DIAGONAL = 0.9


def _checked(
    op: str, key: object, streams: int, hidden: int, config: MHCConfig, dtype: DTypeLike
) -> tuple[int, int, np.dtype]:
    _check.key(op, "key", key)
    streams = num_streams(op, "streams", streams)
    hidden = width(op, hidden)
    dtype = _dtype(op, dtype)
    _check.config(op, config, dtype)
    # JAX adds its settings to `config` at run time, unseen by type checkers.
    if dtype.name == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise Refusal(TypeError, op, "dtype").expected(
            "float32 while 64-bit types are off",
            dtype.name,
            "Turn them on with jax.config.update('jax_enable_x64', True).",
        )
    if config.pre_eps * streams >= 1:
        raise Refusal(ValueError, op, "config.pre_eps").expected(
            f"less than 1 / streams = {1 / streams:g}",
            config.pre_eps,
            "The weights in h_pre must be able to sum to 1; choose a smaller one.",
        )
    return streams, hidden, dtype


def _dtype(op: str, value: DTypeLike | None) -> np.dtype:
    try:
        # None is NumPy's float64.
        dtype = jnp.dtype("" if value is None else value)
        name = dtype.name
    except Exception:  # even a SyntaxError
        name = shown(value)
    if name not in ("float32", "float64"):
        raise Refusal(TypeError, op, "dtype").expected(
            "float32, or float64 for float64 streams",
            name,
            "Parameters are small and stay float32 beside streams of half precision.",
        )
    return dtype


def _saturated(dtype: np.dtype) -> float:
    """A finite logit whose sigmoid is 1 to rounding."""
    return -math.log(float(jnp.finfo(dtype).eps) / 4)


def _weighted_mean(key: jax.Array, streams: int, config: MHCConfig, dtype: np.dtype) -> jax.Array:
    """A bias for which sigmoid(bias) + pre_eps are drawn from `key` and sum to 1."""
    weights = jax.nn.softmax(jax.random.normal(key, (streams,), dtype))
    gates = (1 - streams * config.pre_eps) * weights
    limit = _saturated(dtype)
    return jnp.clip(jnp.log(gates) - jnp.log1p(-gates), -limit, limit)


def _b_post(op: str, config: MHCConfig, dtype: np.dtype) -> float:
    """A bias for which post_scale * sigmoid(bias) + post_eps = 1."""
    if config.post_eps >= 1:
        raise Refusal(ValueError, op, "config.post_eps").expected(
            "less than 1, so that h_post can be 1",
            config.post_eps,
            "Set the bias by hand, or choose a smaller one.",
        )
    opened = 1 - config.post_eps
    if config.post_scale < opened:
        raise Refusal(ValueError, op, "config.post_scale").expected(
            f"at least {opened:g}, so that h_post can be 1",
            config.post_scale,
            "Set the bias by hand, or use the paper's value, 2.",
        )
    closed, limit = config.post_scale - opened, _saturated(dtype)
    return min(math.log(opened) - math.log(closed), limit) if closed else limit


def _b_res(n: int, constraint: str) -> np.ndarray:
    """Logits of an H_res near the identity."""
    if constraint == "none":
        return np.eye(n).ravel()
    if constraint == "permutations":
        # All but the identity, which comes first, are alike; (n - 1)! leave a stream where it is.
        num = math.factorial(n)
        weights = np.full(num, (1 - _H_RES_DIAGONAL) / max(num - math.factorial(n - 1), 1))
        weights[0] = 1 - (num - 1) * weights[0]
        return np.log(weights)
    h_res = np.full((n, n), (1 - _H_RES_DIAGONAL) / max(n - 1, 1))
    np.fill_diagonal(h_res, _H_RES_DIAGONAL if n > 1 else 1.0)
    # Sinkhorn leaves the logarithm of a doubly stochastic matrix as it is, in either order and with
    # any number of iterations, 0 included.
    return np.log(h_res).ravel()


def init_params(
    key: jax.Array,
    *,
    streams: int,
    hidden: int,
    config: MHCConfig = PAPER,
    static: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> MHCParams:
    """Initial parameters of one hyper-connection.

    With these a model computes, to rounding, what the plain residual model x + F(x) computes, when
    it is entered with `expand` and left with `reduce` or a head from `init_head`: phi = 0 and

    - h_pre sums to 1, so the layer reads the common value of the equal streams;
    - h_post = 1 and the rows of H_res sum to 1, so every stream becomes x + F(x).

    Among the values with these properties, these are chosen so that the streams can come apart:

    - The weights in h_pre are drawn from `key` (a softmax of standard normals). With equal weights
      nothing would tell one stream from another: each would receive the same gradient in
      every step, and n equal streams would stay n equal streams for ever.
    - H_res starts near the identity (0.9 on the diagonal, the rest spread evenly; for constraint
      "permutations" all but the identity have the same weight). A uniform H_res would average the
      streams in every layer, and a difference between them would be gone a layer later. The exact
      identity is out of reach for finite logits, and logits close to it would hardly receive a
      gradient.
    - With form "hyper_connections" the layer reads a single stream, h_post = 1 and H_res = I, as in
      that paper. Which stream is chosen by `key`; in the paper, by the number l of the layer:
      `params.bias.at[:n].set(jax.nn.one_hot(l % n, n))`.
    - alpha = 0.01, as in the paper; a gate of 0 together with phi = 0 would never move.

    Limits: the sum of the rows of H_res is exact up to `config.sinkhorn_eps` (each sum falls
    short by about that much in mode "add"). A value of 1 that a sigmoid has to reach by itself
    (h_pre with one stream, h_post with post_scale = 1) is a saturated, finite bias: it equals 1 to
    rounding, and its gradient is close to zero.

    Args:
        key: a JAX random key. Give each hyper-connection its own.
        streams: n, from 1 to 16.
        hidden: C.
        config: the config that the ops will be called with.
        static: coefficients from the bias alone (phi = None, alpha = None). Form "channels" has no
            others.
        dtype: float32, or float64 for float64 streams.

    Returns:
        MHCParams: phi `[nC, K]`, alpha `[3]` (`[2]` for constraint "identity"), bias `[K]` with K
        as `config.num_coefficients` gives it; `MHCParams` tells of other forms.

    Raises:
        ValueError: streams or hidden outside their range, more streams than the constraint is
            for; pre_eps, post_scale or post_eps with which the properties above cannot be had;
            settings that dtype cannot hold; form "channels" without static.
        TypeError: a key that is none; another dtype, or float64 while 64-bit types are off.
    """
    op = "init_params"
    n, hidden, dtype = _checked(op, key, streams, hidden, config, dtype)
    static = flag(op, "static", static)
    if config.form == "channels" and not static:
        raise Refusal(ValueError, op, "static").expected(
            "True for form 'channels'",
            static,
            "Weights of channels are the same for all tokens; per token there is form 'mhc'.",
        )
    config.num_coefficients(n, hidden=hidden, op=op)  # more streams than the constraint is for
    if config.form == "hyper_connections":
        read = jax.nn.one_hot(jax.random.randint(key, (), 0, n), n, dtype=dtype)
        parts = [read, jnp.ones(n, dtype)]
    else:
        channels = hidden if config.form == "channels" else 1
        of_stream = _weighted_mean(key, n, config, dtype)
        b_post = jnp.full((n,), _b_post(op, config, dtype), dtype)
        parts = [jnp.repeat(b, channels) for b in (of_stream, b_post)]
    if config.constraint != "identity":
        parts.append(jnp.asarray(_b_res(n, config.constraint), dtype))
    bias = jnp.concatenate(parts)
    if static:
        return MHCParams(phi=None, alpha=None, bias=bias)
    return MHCParams(
        phi=jnp.zeros(config._phi_shape(n, hidden, op), dtype),
        alpha=jnp.full((config.num_gates(),), _ALPHA, dtype),
        bias=bias,
    )


def init_head(
    key: jax.Array,
    *,
    streams: int,
    hidden: int,
    config: MHCConfig = PAPER,
    dtype: DTypeLike = jnp.float32,
) -> HeadParams:
    """Initial parameters of the head: a weighted mean of the streams.

    phi = 0 and alpha = 0.01; the weights sigmoid(bias) + pre_eps sum to 1, so that equal streams
    leave as their common value. They are drawn from `key`, for the reason that `init_params`
    gives: the head must not treat all streams alike.

    Args:
        key: a JAX random key.
        streams: n, from 1 to 16.
        hidden: C.
        config: the config that `head` will be called with.
        dtype: float32, or float64 for float64 streams.

    Returns:
        HeadParams: phi `[nC, n]`, alpha `[1]`, bias `[n]`.

    Raises:
        ValueError: streams or hidden outside their range, or pre_eps of at least 1 / streams.
        TypeError: a key that is none; another dtype, or float64 while 64-bit types are off.
    """
    n, hidden, dtype = _checked("init_head", key, streams, hidden, config, dtype)
    return HeadParams(
        phi=jnp.zeros((n * hidden, n), dtype),
        alpha=jnp.full((1,), _ALPHA, dtype),
        bias=_weighted_mean(key, n, config, dtype),
    )
