"""Policies for jax.checkpoint, and how long stretches are that need the least memory."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import compiled_text, custom_calls, residuals
from jax import checkpoint_policies

import jax_mhc as mhc
from jax_mhc._stack.checks import stretch
from jax_mhc._stack.remat import best_length

N, C, T, BLOCKS = 4, 20, 7, 3


def operands(dtype=jnp.float32):
    """Streams, weights of two sublayers a block, and their params."""
    keys = jax.random.split(jax.random.key(0), 3)
    init = functools.partial(mhc.init_params, streams=N, hidden=C)
    params = [jax.vmap(init)(jax.random.split(k, BLOCKS)) for k in jax.random.split(keys[0])]
    weights = jax.random.normal(keys[1], (BLOCKS, 2, C, C), dtype) / math.sqrt(C)
    return jax.random.normal(keys[2], (T, N, C), dtype), weights, params


def model(policy, x, weights, params, implementation="fused", start=lambda x: x):
    """Blocks of mhc_residual in a scan; a block is one jax.checkpoint where there is a policy."""

    def block(x, slices):
        weights, params = slices
        for w, p in zip(weights, params, strict=True):
            x = mhc.mhc_residual(lambda u, w=w: jnp.sin(u @ w), x, p, implementation=implementation)
        return x, None

    if policy is not None:
        block = jax.checkpoint(block, policy=policy, prevent_cse=False)
    x, _ = jax.lax.scan(block, start(x), (weights, params))
    return jnp.sum(jnp.sin(x.array() if isinstance(x, mhc.Streams) else x))


def gradient(policy, implementation="fused"):
    run = functools.partial(model, policy, implementation=implementation)
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))


@pytest.mark.parametrize(
    "recompute, implementation", [("streams", "fused"), ("mhc", "fused"), ("mhc", "reference")]
)
def test_gradients_are_the_same_and_no_layer_runs_again(recompute, implementation):
    o = operands()
    policy = mhc.remat_policy(recompute, streams=N, hidden=C)
    plain, again = (gradient(p, implementation) for p in (None, policy))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
                 again(*o), plain(*o))  # fmt: skip
    if implementation == "fused":
        texts = [compiled_text(f, *o) for f in (plain, again)]
        assert texts[0].count(" dot(") == texts[1].count(" dot(")
        # post of the first sublayer for the streams between the two; all of it for both inputs.
        before, after = (collections.Counter(custom_calls(text)) for text in texts)
        wanted = {"post_fwd": 1} if recompute == "streams" else {"post_fwd": 1, "pre_fwd": 2}
        assert after - before == wanted


@pytest.mark.parametrize("start", [lambda x: x, mhc.as_streams], ids=["array", "Streams"])
@pytest.mark.parametrize("recompute, streams, states", [("streams", 1, 6), ("mhc", 1, 4)])
def test_what_a_block_keeps(recompute, streams, states, start):
    """Of each sublayer u, y and a cosine; the streams before each sublayer or block."""
    policy = mhc.remat_policy(recompute, streams=N, hidden=C)
    run = functools.partial(model, policy, start=start)
    kept = collections.Counter(residuals(run, *operands()))
    assert (kept[BLOCKS * T * N * C], kept[BLOCKS * T * C]) == (streams, states)


def test_a_policy_of_its_own_for_the_layers():
    """With none of the layers' values kept, only y is: they run again, the kernels as before."""
    policy = mhc.remat_policy(
        "mhc", streams=N, hidden=C, layers=checkpoint_policies.nothing_saveable
    )
    kept = collections.Counter(residuals(functools.partial(model, policy), *operands()))
    assert (kept[BLOCKS * T * N * C], kept[BLOCKS * T * C]) == (1, 2)


def test_float32_copies_of_half_precision_are_not_kept():
    def layer(u):
        wide = u.astype(jnp.float32)
        return (wide * wide).astype(u.dtype)

    def num_kept(policy):
        x, _, (params, _) = operands(jnp.bfloat16)
        params = jax.tree.map(lambda leaf: leaf[0], params)
        block = jax.checkpoint(
            lambda x: mhc.mhc_residual(layer, x, params, implementation="fused"), policy=policy
        )
        kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(block, x)[1], x))
        return [sum(a.shape == (T, C) and a.dtype == dtype for a in kept) for dtype in dtypes]

    dtypes = jnp.bfloat16, jnp.float32
    # u and y; or y and a wide u.
    assert num_kept(mhc.remat_policy(streams=N, hidden=C)) == [2, 0]
    assert num_kept(checkpoint_policies.everything_saveable) == [1, 1]


@pytest.mark.parametrize(
    "streams, num_sublayers, best", [(4, 24, 4), (4, 96, 8), (4, 48, 6), (1, 12, 2), (4, 1, 1)]
)
def test_stretches_of_least_memory(streams, num_sublayers, best):
    """By brute force: what is kept of all stretches, and what one needs, in units of C."""
    lengths = [n for n in range(1, num_sublayers + 1) if num_sublayers % n == 0]

    def memory(length):
        return streams * num_sublayers / length + (streams + 2) * length

    assert best_length(streams, num_sublayers, lengths) == best
    assert memory(best) == pytest.approx(min(map(memory, lengths)), rel=0.01)


def test_stretches_fit_the_scan():
    assert stretch("auto", 4, 2, 12) == (4, 2)
    assert stretch("auto", 4, 2, 48) == (8, 4)
    assert stretch("auto", 4, 2, 7) == (2, 1)  # a prime number of blocks
    assert stretch("auto", 4, 8, 2) == (4, 1)
    assert stretch(1, 4, 2, 12) == (1, 1)
    assert stretch("auto", 4, 0, 12) == (1, 1)
