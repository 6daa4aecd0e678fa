"""Streams that carry the post of their last sublayer."""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PLATFORM
from hlo import compiled_text, custom_calls

import jax_mhc as mhc

KEY = jax.random.key(0)
N, C, DEPTH, TOKENS = 4, 8, 3, (2, 5)
DTYPE = jnp.float64 if PLATFORM == "cpu" else jnp.float32
CONFIGS = {
    "birkhoff": mhc.MHCConfig(),
    "identity": mhc.MHCConfig(constraint="identity"),
    "permutations": mhc.MHCConfig(constraint="permutations"),
}


def layer(w, u):
    return jnp.tanh(jnp.matmul(u, w, precision="highest"))


def shifted(leaf):
    return leaf + 0.3 * jax.random.normal(KEY, leaf.shape, leaf.dtype)


def operands(config=mhc.presets.PAPER, depth=DEPTH, dtype=DTYPE):
    """x, stacked weights and parameters with some values in them."""
    keys = jax.random.split(KEY, depth)
    init = functools.partial(mhc.init_params, streams=N, hidden=C, config=config, dtype=dtype)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(init, keys))
    x = jax.random.normal(KEY, (*TOKENS, N, C), dtype)
    return x, jax.random.normal(KEY, (depth, C, C), dtype) / 3, jax.tree.map(shifted, params)


def loop(start, x, ws, params, config, implementations):
    """Sublayers in a Python loop; the streams at the end as an array."""
    x = start(x)
    for i, implementation in zip(range(len(ws)), itertools.cycle(implementations), strict=False):
        w, p = jax.tree.map(operator.itemgetter(i), (ws, params))
        run = functools.partial(mhc.mhc_residual, functools.partial(layer, w), config=config)
        x = run(x, p, implementation=implementation)
    return x.array() if isinstance(x, mhc.Streams) else x


def scan(start, x, ws, params, config, implementations):
    def body(x, slices):
        w, p = slices
        (implementation,) = implementations
        return mhc.mhc_residual(
            functools.partial(layer, w), x, p, config=config, implementation=implementation
        ), None

    x, _ = jax.lax.scan(body, start(x), (ws, params))
    return x.array() if isinstance(x, mhc.Streams) else x


def value_and_gradients(form, start, implementations, config, arrays):
    def loss(*arrays):
        out = form(start, *arrays, config, implementations)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)


def as_plain(x):
    return mhc.as_streams(x, implementation="reference")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("start", [mhc.as_streams, as_plain])
@pytest.mark.parametrize(
    "form, implementations",
    [
        (loop, [None]),
        (loop, ["reference"]),
        (loop, [None, "reference"]),
        (loop, ["reference", None]),
        (scan, [None]),
        (scan, ["reference"]),
    ],
)
def test_values_and_gradients_are_those_of_arrays(form, implementations, start, config):
    config = CONFIGS[config]
    arrays = operands(config)
    run = functools.partial(value_and_gradients, config=config, arrays=arrays)
    got = run(form, start, implementations)
    expected = run(loop, lambda x: x, ["reference"])
    tolerance = 1e-9 if DTYPE == jnp.float64 else 2e-4
    for out, exact in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        atol = tolerance * np.abs(exact).max()
        np.testing.assert_allclose(out, exact, rtol=tolerance, atol=atol)


def test_every_sublayer_but_the_first_runs_the_post_before_it():
    x, ws, params = operands(dtype=jnp.float32)

    def run(x, ws, params):
        return loop(mhc.as_streams, x, ws, params, mhc.presets.PAPER, [None])

    calls = custom_calls(compiled_text(run, x, ws, params))
    assert calls == {"post_pre_fwd": DEPTH, "post_fwd": 1}


def test_an_array_comes_back_exactly():
    x = operands(dtype=jnp.float32)[0].astype(jnp.bfloat16)
    streams = mhc.as_streams(x)
    assert (streams.shape, streams.ndim, streams.dtype, streams.streams) == (x.shape, 4, x.dtype, N)
    np.testing.assert_array_equal(streams.array(), x)
    assert mhc.as_streams(streams) is streams
    np.testing.assert_array_equal(mhc.reduce(streams), mhc.reduce(x))
    gradient = jax.grad(lambda x: jnp.sum(mhc.as_streams(x).array() ** 2))(x)
    np.testing.assert_array_equal(gradient, 2 * x)
