"""Figures of matrices h_res, and of streams."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_mhc import _check, _errors
from jax_mhc._axes import axes_of
from jax_mhc._check import accumulation_dtype
from jax_mhc._errors import Refusal
from jax_mhc._ops.streams import Streams

if TYPE_CHECKING:
    from jaxtyping import Float

# Of composite gains that are in order. In 48 sublayers of mHC they came to 2.4 in a training, where
# without a constraint they passed 75 in its first twentieth (docs/results.md).
BAND = (0.25, 4.0)


class Gain(NamedTuple):
    """Growth of the largest of equal signals."""

    forward: jax.Array
    backward: jax.Array


class Mixing(NamedTuple):
    """Measures of how matrices mix streams, each `[...]`.

    row_error: largest distance of a row's sum from 1.
    column_error: the same of columns.
    identity_distance: Frobenius norm of h_res - I; 0 is no mixing.
    entropy: mean over rows of -Σ_j p log p, in nats, where p are the absolute values of a row over
        their sum; 0 is a permutation and log(n) the mean of all streams.
    """

    row_error: jax.Array
    column_error: jax.Array
    identity_distance: jax.Array
    entropy: jax.Array


def sample_tokens(h_res: Float[jax.Array, "*tokens n n"], count: int) -> Float[jax.Array, "S n n"]:
    """The matrices of some tokens, evenly spaced over all: of few, what the other figures cost.

    Which tokens is known when the program is compiled, and only theirs are read. On auto and
    explicit axes of a mesh the sample is on every device: that takes one all-reduce of its size,
    or two where the tokens are split in two dimensions. Inside `jax.shard_map` it is of the
    device's own tokens. It has no gradient.

    Args:
        h_res: `[..., n, n]` float32 or float64; all leading dimensions are tokens.
        count: how many, at least 1; of fewer tokens all are taken.

    Returns:
        `[S, n, n]` with S the smaller of count and the number of tokens; the first token is one of
        them and, where S is at least 2, the last.

    Raises:
        ValueError, TypeError: h_res of another shape or dtype; count that is no positive int.
    """
    op = "diagnostics.sample_tokens"
    h_res = jax.lax.stop_gradient(_check.matrices(op, "h_res", h_res))
    count = _errors.integer(op, "count", count, 1, None, "Some 64 tokens tell enough of a batch.")
    if h_res.ndim == 2:
        h_res = h_res[None]
    tokens = h_res.shape[:-2]
    num = math.prod(tokens)
    count = min(count, num)
    places = [at * (num - 1) // max(count - 1, 1) for at in range(count)]
    # One index for each dimension: flattened tokens would be a copy where they are split.
    index = np.unravel_index(np.array(places, np.int64), tokens)
    sharding = None
    if axes_of(h_res, AxisType.Explicit):
        sharding = NamedSharding(jax.typeof(h_res).sharding.mesh, PartitionSpec())
    return h_res.at[index].get(mode="promise_in_bounds", out_sharding=sharding)


def amax_gain(h_res: Float[jax.Array, "*tokens n n"]) -> Gain:
    """Amax Gain Magnitude of mappings.

        forward = max_i |Σ_j h_res[i, j]|,   backward = max_j |Σ_i h_res[i, j]|

    Both are 1 for a doubly stochastic matrix, and for a product of these. Source: arXiv 2512.24880,
    which reports up to 3000 for the composite mappings of unconstrained hyper-connections.

    Args:
        h_res: `[..., n, n]` float32 or float64, of sublayers or of `composite`.

    Returns:
        Gains of each matrix, `[...]`; reduce them over tokens with max or mean.

    Raises:
        ValueError, TypeError: h_res of another shape or dtype.
    """
    h_res = _check.matrices("diagnostics.amax_gain", "h_res", h_res)
    return Gain(*(jnp.max(jnp.abs(jnp.sum(h_res, axis)), -1) for axis in (-1, -2)))


def composite(h_res: Float[jax.Array, "L *tokens n n"]) -> Float[jax.Array, "L *tokens n n"]:
    """The composite mappings of the first 1, 2, ..., L sublayers.

        P_l = H_l H_(l-1) ... H_1

    Products of many unconstrained mappings overflow (some 160 of standard normal ones in float32);
    their gain is infinite or NaN then.

    Args:
        h_res: `[L, ..., n, n]` float32 or float64, the first sublayer first.

    Returns:
        P `[L, ..., n, n]`; products in full precision of the dtype on GPUs, too.

    Raises:
        ValueError, TypeError: h_res of another shape or dtype.
    """
    h_res = _check.matrices("diagnostics.composite", "h_res", h_res)
    if h_res.ndim < 3:
        raise Refusal(ValueError, "diagnostics.composite", "h_res").expected(
            "shape [L, ..., n, n]",
            list(h_res.shape),
            "Stack the matrices of all sublayers: jnp.stack([...]).",
        )

    def step(product: jax.Array, of_one: jax.Array) -> tuple[jax.Array, jax.Array]:
        product = jnp.matmul(of_one, product, precision="highest")
        return product, product

    if h_res.shape[0] == 0:
        return h_res
    _, rest = jax.lax.scan(step, h_res[0], h_res[1:])
    return jnp.concatenate([h_res[:1], rest])


def mixing(h_res: Float[jax.Array, "*tokens n n"]) -> Mixing:
    """Returns the distances of matrices from doubly stochastic, no mixing and the mean of all.

    Args:
        h_res: `[..., n, n]` float32 or float64.

    Returns:
        Figures of each matrix; see `Mixing`.

    Raises:
        ValueError, TypeError: h_res of another shape or dtype.
    """
    h_res = _check.matrices("diagnostics.mixing", "h_res", h_res)
    sizes = jnp.abs(h_res)
    tiny = jnp.finfo(h_res.dtype).tiny
    shares = sizes / jnp.maximum(jnp.sum(sizes, -1, keepdims=True), tiny)
    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, tiny)), -1)
    identity = jnp.eye(h_res.shape[-1], dtype=h_res.dtype)
    difference = h_res - jax.lax.expand_dims(identity, range(h_res.ndim - 2))
    return Mixing(
        row_error=jnp.max(jnp.abs(jnp.sum(h_res, -1) - 1), -1),
        column_error=jnp.max(jnp.abs(jnp.sum(h_res, -2) - 1), -1),
        identity_distance=jnp.sqrt(jnp.sum(difference * difference, (-2, -1))),
        entropy=jnp.mean(entropy, -1),
    )


def logit_range(h_res: Float[jax.Array, "*tokens n n"]) -> Float[jax.Array, "*tokens"]:
    """Range of the logits of a matrix before Sinkhorn, as far as Sinkhorn does not undo it.

        max - min of  z[i, j] - mean_i z - mean_j z + mean_ij z,   z = log h_res

    Sinkhorn scales rows and columns of exp(logits), which this takes out again: the logits
    themselves give the same figure, so that h_res is enough. Weights that differ so much are
    saturated: the gradient of a logit has its small weight as a factor, and Sinkhorn converges
    slowly.

    Args:
        h_res: `[..., n, n]` float32 or float64, of constraint "birkhoff" with sinkhorn_eps = 0, the
            default, of which the figure is exact to rounding. Weights below the least normal
            number, 1e-38, count as that one.

    Returns:
        `[...]`, in nats; 0 is the mean of all streams.

    Raises:
        ValueError, TypeError: h_res of another shape or dtype.
    """
    h_res = _check.matrices("diagnostics.logit_range", "h_res", h_res)
    z = jnp.log(jnp.maximum(h_res, jnp.finfo(h_res.dtype).tiny))
    z -= jnp.mean(z, -1, keepdims=True)
    z -= jnp.mean(z, -2, keepdims=True)
    return jnp.max(z, (-2, -1)) - jnp.min(z, (-2, -1))


def summary(
    h_res: Float[jax.Array, "L *tokens n n"], *, prefix: str = "mhc/"
) -> dict[str, jax.Array]:
    """The figures of all sublayers as one number each, by name: what to log at a step.

        writer.add_scalar(name, value, step)   of each, for TensorBoard
        wandb.log(summary, step)               for Weights & Biases

    Args:
        h_res: `[L, ..., n, n]` float32 or float64, the first sublayer first, with at least one
            token: of `stack_with_samples`, or of `sample_tokens`.
        prefix: of the names.

    Returns:
        Arrays of no dimension:

        - `composite_gain_forward`, `composite_gain_backward`: the largest of all tokens' products
            of all sublayers; with `_mean` behind it the mean of tokens;
        - `row_error`, `column_error`, `logit_range`: the largest of all sublayers and tokens;
        - `identity_distance`, `entropy`: the means.

    Raises:
        ValueError, TypeError: h_res of another shape or dtype; a prefix that is no string.
    """
    op = "diagnostics.summary"
    _errors.text(op, "prefix", prefix)
    h_res = _check.matrices(op, "h_res", h_res)
    if h_res.ndim < 3 or 0 in h_res.shape:
        raise Refusal(ValueError, op, "h_res").expected(
            "shape [L, ..., n, n] with sublayers and tokens",
            list(h_res.shape),
            "Stack the matrices of all sublayers: jnp.stack([...]).",
        )
    gain, figures = amax_gain(composite(h_res)[-1]), mixing(h_res)
    found = {
        "composite_gain_forward": jnp.max(gain.forward),
        "composite_gain_forward_mean": jnp.mean(gain.forward),
        "composite_gain_backward": jnp.max(gain.backward),
        "composite_gain_backward_mean": jnp.mean(gain.backward),
        "row_error": jnp.max(figures.row_error),
        "column_error": jnp.max(figures.column_error),
        "logit_range": jnp.max(logit_range(h_res)),
        "identity_distance": jnp.mean(figures.identity_distance),
        "entropy": jnp.mean(figures.entropy),
    }
    return {f"{prefix}{name}": value for name, value in found.items()}


def stream_similarity(
    x: Float[jax.Array, "*tokens n C"] | Streams,
) -> Float[jax.Array, "*tokens"]:
    """Mean cosine similarity of different streams: 1 where all are alike, as `expand` makes them.

    Args:
        x: streams `[..., n, C]` with n of at least 2, or `Streams`.

    Returns:
        `[...]`, float32 (float64 for float64 streams). A stream of zeros is similar to none.

    Raises:
        ValueError, TypeError: x of another shape or dtype.
    """
    op = "diagnostics.stream_similarity"
    x = x.array() if isinstance(x, Streams) else _check.streams(op, "x", x)
    n = x.shape[-2]
    if n < 2:
        raise Refusal(ValueError, op, "x").expected(
            "shape [..., n, C] with n at least 2",
            list(x.shape),
            "One stream has no other to be similar to.",
        )
    x = x.astype(accumulation_dtype(x.dtype))
    size = jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))
    # With lengths of 1, the squared length of the sum is n and the similarities of all pairs.
    total = jnp.sum(x / jnp.where(size == 0, 1, size), -2)
    own = jnp.sum(size[..., 0] != 0, -1, dtype=x.dtype)
    return (jnp.sum(total * total, -1) - own) / (n * (n - 1))
