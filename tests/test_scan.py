"""mhc.scan: any body, whose streams are kept in place for the backward pass."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PLATFORM
from hlo import compiled_text, custom_calls, residuals
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mhc as mhc

KEY = jax.random.key(0)
N, C, BLOCKS, TOKENS = 4, 8, 4, (2, 3)
DTYPE = jnp.float64 if PLATFORM == "cpu" else jnp.float32
TOLERANCE = 1e-9 if DTYPE == jnp.float64 else 2e-4


def shifted(leaf):
    return leaf + 0.3 * jax.random.normal(KEY, leaf.shape, leaf.dtype)


def operands(sublayers=2, dtype=DTYPE):
    """A hidden state, parameters and weights of blocks, a scale, and keys for dropout."""
    init = functools.partial(mhc.init_params, streams=N, hidden=C, dtype=dtype)
    keys = jax.random.split(KEY, (sublayers, BLOCKS))
    params = [jax.tree.map(shifted, jax.vmap(init)(of_block)) for of_block in keys]
    weights = jax.random.normal(KEY, (BLOCKS, sublayers, C, C), dtype) / 3
    u = jax.random.normal(KEY, (*TOKENS, C), dtype)
    return u, params, weights, shifted(jnp.ones(C, dtype)), jax.random.split(KEY, BLOCKS)


def across(of_channels, u):
    return jnp.broadcast_to(of_channels, u.shape)


def body(scale, implementation, carry, slices):
    """A block with dropout, a function compiled apart, a loss, a count, and results."""
    (x, loss, count), (params, weights, key) = carry, slices
    layer = jax.jit(lambda u, w: jnp.tanh(jnp.matmul(u, w, precision="highest")) * across(scale, u))
    for p, w in zip(params, weights, strict=True):
        key, own = jax.random.split(key)
        kept = jax.random.bernoulli(own, 0.8, (C,))
        x, aux = mhc.mhc_residual(
            lambda u, w=w, kept=kept: (jnp.where(across(kept, u), layer(u, w), 0), jnp.sum(u**2)),
            x,
            p,
            implementation=implementation,
            has_aux=True,
        )
        loss = loss + aux
    return (x, loss, count + 1), {"sizes": jnp.sum(jnp.tanh(x.array())), "count": count, "key": key}


def model(run, implementation, u, params, weights, scale, keys, around=lambda body: body):
    x = mhc.expand(u, streams=N, implementation=implementation)
    one = around(functools.partial(body, scale, implementation))
    carry = x, jnp.zeros((), u.dtype), 0
    (x, loss, count), results = run(one, carry, (params, weights, keys))
    # Of each token alone, so that devices that have some tokens have their part of it.
    whole = jnp.sum(jnp.sin(x.array())) + loss + jnp.sum(results["sizes"])
    return whole, (count, results)


def value_and_gradients(run, implementation, *arrays, **options):
    loss = functools.partial(model, run, implementation, **options)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)


def assert_close(got, expected):
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = map(jax.random.key_data, (one, other))
        exact = np.asarray(other)
        np.testing.assert_allclose(one, exact, rtol=TOLERANCE, atol=TOLERANCE * abs(exact).max())


def checkpointed(body):
    policy = mhc.remat_policy(streams=N, hidden=C)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


@pytest.mark.parametrize("around", [lambda body: body, checkpointed, jax.jit])
@pytest.mark.parametrize("sublayers", [1, 2, 3])
def test_values_and_gradients_are_those_of_jax(sublayers, around):
    arrays = operands(sublayers)
    got = value_and_gradients(mhc.scan, None, *arrays, around=around)
    assert_close(got, value_and_gradients(jax.lax.scan, "reference", *arrays))


def test_outside_of_jit():
    arrays = operands()
    got, (count, _) = model(mhc.scan, None, *arrays)
    assert count == BLOCKS
    assert_close(got, model(jax.lax.scan, "reference", *arrays)[0])


def test_plain_jax_has_every_mode():
    u, *others = operands(1)

    def derivative(scan):
        return jax.jvp(lambda u: model(scan, "reference", u, *others)[0], (u,), (u,))

    assert_close(derivative(mhc.scan), derivative(jax.lax.scan))


def test_a_batch():
    u, *others = operands(2)
    batch = jnp.stack([u, -2 * u])
    gradient = jax.jit(jax.grad(lambda u: model(mhc.scan, None, u, *others)[0]))
    assert_close(jax.jit(jax.vmap(gradient))(batch), jnp.stack([gradient(u) for u in batch]))


@pytest.mark.parametrize("unroll", [1, 2, True])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_number_of_iterations(length, unroll):
    u, params, *_ = operands(1)
    p = jax.tree.map(lambda leaf: leaf[0], params[0])

    def run(scan, implementation, p):
        x = mhc.expand(u, streams=N, implementation=implementation)

        def step(x, _):
            return mhc.mhc_residual(jnp.sin, x, p, implementation=implementation), None

        x, none = scan(step, x, length=length, unroll=unroll)
        assert none is None
        return jnp.sum(x.array() ** 2)

    got = jax.jit(jax.grad(functools.partial(run, mhc.scan, None)))(p)
    assert_close(got, jax.jit(jax.grad(functools.partial(run, jax.lax.scan, "reference")))(p))


def test_calls_back_and_names_of_one_s_own():
    """A name of ours around other values, and equations without results."""
    _, params, *_ = operands(1)
    told = []

    def run(scan, params):
        def step(carry, p):
            x, z = carry
            z = checkpoint_name(z, "mhc_streams")
            x = mhc.mhc_residual(lambda u: jnp.sin(u) * z, x, p)
            jax.debug.callback(told.append, z[0, 0, 0])
            z = checkpoint_name(jnp.sin(z), "mhc_streams")
            return (x, z), z

        z = jnp.ones((*TOKENS, C), DTYPE)
        (x, z), all_z = scan(step, (mhc.expand(z, streams=N), z), params)
        return jnp.sum(x.array() ** 2) + jnp.sum(all_z)

    gradients = [
        jax.jit(jax.grad(functools.partial(run, scan))) for scan in (mhc.scan, jax.lax.scan)
    ]
    assert_close(*(gradient(params[0]) for gradient in gradients))
    jax.effects_barrier()
    assert len(told) == 2 * BLOCKS


# ---- what is kept, and where --------------------------------------------------------------------


def test_every_sublayer_runs_the_post_before_it():
    arrays = operands(2, jnp.float32)
    calls = custom_calls(compiled_text(functools.partial(model, mhc.scan, "fused"), *arrays))
    # That in the loop is of the body's own x.array().
    assert calls == {"post_pre_fwd": 2, "post_fwd": 2}


def two_sublayers(u, params, weights):
    def block(x, slices):
        for p, w in zip(*slices, strict=True):
            x = mhc.mhc_residual(lambda u, w=w: jnp.tanh(u @ w), x, p, implementation="fused")
        return x, None

    x, _ = mhc.scan(block, mhc.expand(u, streams=N, implementation="fused"), (params, weights))
    return jnp.sum(jnp.sin(x.array()))


def test_streams_are_kept_once():
    """Those between the sublayers of a block, and those that blocks begin with and the last."""
    arrays = operands(2, jnp.float32)[:3]
    of_streams = np.prod(TOKENS) * N * C
    kept = residuals(functools.partial(two_sublayers, arrays[0]), *arrays[1:])
    assert kept.count(BLOCKS * of_streams) == kept.count((BLOCKS + 1) * of_streams) == 1
    assert BLOCKS * C * C not in kept  # the weights, which are at hand


def test_streams_are_read_from_their_place():
    """No copy of streams is carried: a GPU's kernels write them where they are kept."""
    arrays = operands(2, jnp.float32)[:3]
    text = jax.jit(jax.grad(two_sublayers, argnums=(1, 2))).lower(*arrays).as_text()
    streams = "x".join(map(str, (*TOKENS, N, C))) + "xf32"
    # The types of what each loop carries.
    forward, backward = re.findall(r"stablehlo.while\(.*\) : (.*)", text)
    assert f"tensor<{BLOCKS}x{streams}>" in forward and f"tensor<{BLOCKS + 1}x{streams}>" in forward
    assert f"tensor<{streams}>" not in forward
    assert backward.count(f"tensor<{streams}>") == 1  # the cotangent


# ---- meshes -------------------------------------------------------------------------------------


@pytest.mark.mesh
@pytest.mark.parametrize("mode", ["auto", "explicit", "manual"])
def test_on_a_mesh(mode):
    u, *others = operands(2)
    u = jnp.concatenate([u, -u, u + 1, 2 * u])
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))

    def gradients(run, implementation, u, *others):
        loss = functools.partial(model, run, implementation)
        return jax.grad(loss, argnums=(0, 2), has_aux=True)(u, *others)[0]

    expected = jax.jit(functools.partial(gradients, jax.lax.scan, "reference"))(u, *others)
    of_mesh = functools.partial(gradients, mhc.scan, None)
    if mode == "manual":
        of_mesh = jax.shard_map(
            of_mesh, mesh=mesh, in_specs=(P("d"), P(), P(), P(), P()), out_specs=(P("d"), P())
        )
    with jax.set_mesh(mesh):
        got = jax.jit(of_mesh)(jax.device_put(u, NamedSharding(mesh, P("d"))), *others)
    assert_close(jax.device_get(got), jax.device_get(expected))
