"""Diagnostics against NumPy in float64, and against what the mathematics says."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_mhc as mhc
from jax_mhc import diagnostics


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def projected(*shape, iters=20, scale=1.0):
    return mhc.sinkhorn(
        jnp.asarray(normal(*shape, scale=scale), jnp.float32),
        config=mhc.MHCConfig(sinkhorn_iters=iters),
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
def test_gain_and_mixing_are_those_of_numpy(n):
    h = normal(5, 3, n, n)
    gain, mixing = jax.jit(lambda h: (diagnostics.amax_gain(h), diagnostics.mixing(h)))(
        h.astype(np.float32)
    )
    rows, columns = h.sum(-1), h.sum(-2)
    shares = abs(h) / abs(h).sum(-1, keepdims=True)
    wanted = {
        "forward": abs(rows).max(-1),
        "backward": abs(columns).max(-1),
        "row_error": abs(rows - 1).max(-1),
        "column_error": abs(columns - 1).max(-1),
        "identity_distance": np.linalg.norm(h - np.eye(n), axis=(-2, -1)),
        "entropy": -(shares * np.log(shares)).sum(-1).mean(-1),
    }
    found = {**gain._asdict(), **mixing._asdict()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == (5, 3) and found[name].dtype == jnp.float32, name
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_what_is_known_of_special_matrices():
    identity, mean = jnp.eye(4), jnp.full((4, 4), 0.25)
    of_identity, of_mean = diagnostics.mixing(identity), diagnostics.mixing(mean)
    assert all(value == 0 for value in of_identity)
    assert of_mean.row_error == of_mean.column_error == 0
    np.testing.assert_allclose(of_mean.entropy, np.log(4), rtol=1e-6)
    np.testing.assert_allclose(of_mean.identity_distance, np.sqrt(3), rtol=1e-6)
    assert diagnostics.amax_gain(identity) == diagnostics.amax_gain(mean) == (1, 1)
    # Forward and backward are not to be taken for each other: all of stream 1 into stream 0.
    assert diagnostics.amax_gain(jnp.array([[1.0, 1.0], [0.0, 0.0]])) == (2, 1)
    nothing = diagnostics.mixing(jnp.zeros((2, 2)))
    assert nothing.entropy == 0 and nothing.row_error == 1


def test_composite_multiplies_later_sublayers_from_the_left():
    h = normal(6, 2, 4, 4).astype(np.float32)
    products = diagnostics.composite(h)
    wanted = np.broadcast_to(np.eye(4), (2, 4, 4))
    for at in range(6):
        wanted = h[at].astype(np.float64) @ wanted
        np.testing.assert_allclose(products[at], wanted, rtol=1e-4, atol=1e-4)
    assert diagnostics.composite(h[:1]).shape == (1, 2, 4, 4)
    assert diagnostics.composite(h[:0]).shape == (0, 2, 4, 4)
    assert diagnostics.composite(h[:, :0]).shape == (6, 0, 4, 4)


def test_gain_grows_without_the_manifold_and_not_on_it():
    """The figure of the paper's section on stability, at 64 sublayers."""
    deep = (64, 100, 4, 4)
    free = diagnostics.amax_gain(diagnostics.composite(normal(*deep).astype(np.float32))[-1])
    assert 1e14 < float(jnp.median(free.forward)) < 1e18
    for iters, limit in ((1, 4.0), (20, 1.01)):
        products = diagnostics.composite(projected(*deep, iters=iters))
        gain = diagnostics.amax_gain(products[-1])
        np.testing.assert_allclose(gain.forward, 1, rtol=1e-5)  # rows come last
        assert float(jnp.max(gain.backward)) < limit


def test_values_of_a_layer_are_accepted_as_they_are():
    params = mhc.init_params(jax.random.key(0), streams=4, hidden=32)
    x = mhc.expand(jnp.asarray(normal(7, 32), jnp.bfloat16), streams=4)

    @jax.jit
    def figures(x):
        ctx = mhc.pre(x, params)[1]
        return diagnostics.amax_gain(ctx.h_res), diagnostics.stream_similarity(x)

    gain, similarity = figures(x)
    np.testing.assert_allclose(gain.forward, 1, rtol=1e-5)
    np.testing.assert_allclose(similarity, 1, rtol=1e-5)


def test_stream_similarity():
    x = normal(5, 3, 8).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    pairs = np.einsum("tic,tjc->tij", unit, unit)
    wanted = (pairs.sum((-2, -1)) - 3) / 6
    np.testing.assert_allclose(diagnostics.stream_similarity(x), wanted, rtol=1e-5, atol=1e-6)
    orthogonal = jnp.eye(4)
    assert diagnostics.stream_similarity(orthogonal) == 0
    opposite = jnp.array([[1.0, 2.0], [-1.0, -2.0]])
    np.testing.assert_allclose(diagnostics.stream_similarity(opposite), -1, rtol=1e-6)
    assert diagnostics.stream_similarity(orthogonal.at[0].set(0)) == 0


@pytest.mark.parametrize(
    "count, wanted", [(1, [0]), (2, [0, 29]), (7, [0, 4, 9, 14, 19, 24, 29]), (99, range(30))]
)
def test_sampled_tokens_are_evenly_spaced(count, wanted):
    h = jnp.arange(30 * 4, dtype=jnp.float32).reshape(2, 3, 5, 2, 2)
    sample = jax.jit(lambda h: diagnostics.sample_tokens(h, count))
    np.testing.assert_array_equal(sample(h), h.reshape(30, 2, 2)[np.array(wanted)])
    np.testing.assert_array_equal(jax.vmap(sample)(h)[1], sample(h[1]))
    np.testing.assert_array_equal(jax.grad(lambda h: jnp.sum(sample(h)))(h), 0)
    assert sample(h[:, :0]).shape == (0, 2, 2)
    np.testing.assert_array_equal(sample(h[0, 0, 0]), h[:1, 0, 0])


def test_a_sample_reads_no_more_than_its_tokens():
    h = jax.ShapeDtypeStruct((8, 128, 4, 4), jnp.float32)
    compiled = jax.jit(lambda h: diagnostics.sample_tokens(h, 5)).lower(h).compile()
    of_all = [
        kind
        for shape, kind in re.findall(r"= f32\[([\d,]+)\]\S* (\w+)\(", compiled.as_text())
        if math.prod(map(int, shape.split(","))) == h.size
    ]
    assert of_all and set(of_all) == {"parameter"}
    assert compiled.memory_analysis().temp_size_in_bytes < h.size


def test_a_token_with_nan_keeps_to_itself():
    h = jnp.asarray(normal(3, 5, 4, 4), jnp.float32)
    before = diagnostics.amax_gain(diagnostics.composite(h))
    after = diagnostics.amax_gain(diagnostics.composite(h.at[1, 2, 0, 0].set(jnp.nan)))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.delete(one, 2, 1), np.delete(other, 2, 1))
        assert np.all(np.isnan(other[1:, 2]))
    x = jnp.asarray(normal(5, 3, 8), jnp.float32)
    similarity = diagnostics.stream_similarity(x.at[2, 1, 0].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(similarity), np.arange(5) == 2)


@pytest.mark.mesh
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_they_stay_where_the_tokens_are(kind):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(kind,), devices=jax.devices()[:2])
    h, x = normal(3, 8, 4, 4).astype(np.float32), normal(8, 4, 16).astype(np.float32)

    def figures(h, x):
        products = diagnostics.composite(h)
        of_products = diagnostics.amax_gain(products), diagnostics.mixing(products)
        return of_products, diagnostics.stream_similarity(x)

    wanted = figures(h, x)
    with jax.set_mesh(mesh):
        split = jax.device_put(h, P(None, "a")), jax.device_put(x, P("a"))
        compiled = jax.jit(figures).lower(*split).compile()
        found = compiled(*split)
    assert not collectives(compiled.as_text())
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
