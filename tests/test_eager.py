"""Calls outside of `jax.jit`, and with it disabled: the same values, compiled once."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, Case, assert_trees_close, limit, make_cotangents, make_operands

import jax_mhc as mhc
from jax_mhc import presets

CASE = Case((2, 3), 4, 16)
BATCH = 3
KEY = jax.random.key(0)


def run(op, operands):
    return OPS[op].run(operands, presets.PAPER, "fused")


def in_scan(op, operands):
    """The op twice, in the body of a scan."""
    return jax.lax.scan(lambda carry, _: (carry, run(op, operands)), 0, None, length=2)[1]


def mapped(op, operands):
    batch = jax.tree.map(lambda leaf: jnp.stack(BATCH * [leaf]), operands)
    return jax.vmap(functools.partial(run, op))(batch)


@pytest.mark.parametrize("where", [run, in_scan, mapped])
@pytest.mark.parametrize("op", OPS)
def test_disable_jit(op, where):
    """Stepping through a model: forward and gradient."""
    operands, cotangents = make_operands(op, CASE), make_cotangents(op, CASE)

    def value_and_gradient(operands):
        value, pullback = jax.vjp(functools.partial(where, op), operands)
        lead = jax.tree.leaves(value)[0].ndim - jax.tree.leaves(cotangents)[0].ndim
        size = jax.tree.leaves(value)[0].shape[:lead]
        copies = [jnp.broadcast_to(ct, (*size, *ct.shape)) for ct in jax.tree.leaves(cotangents)]
        return value, pullback(jax.tree.unflatten(jax.tree.structure(value), copies))

    expected = jax.jit(value_and_gradient)(operands)
    with jax.disable_jit():
        actual = value_and_gradient(operands)
    assert_trees_close(actual, jax.tree.map(np.asarray, expected), limit(CASE))


def test_disable_jit_in_a_stack():
    params = [make_operands("pre", CASE, draw=i)["params"] for i in range(2)]
    stacked = jax.tree.map(lambda leaf: jnp.stack(3 * [leaf]), params)
    x = make_operands("pre", CASE)["x"]

    def loss(x, stacked):
        x = mhc.stack([lambda u, s: s * jnp.tanh(u)] * 2, x, stacked, xs=jnp.ones(3, x.dtype))
        return jnp.sum(jnp.sin(x))

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    expected = jax.jit(gradient)(x, stacked)
    with jax.disable_jit():
        actual = gradient(x, stacked)
    assert_trees_close(actual, jax.tree.map(np.asarray, expected), limit(CASE, layers=6))


# ---- compilation --------------------------------------------------------------------------------


@pytest.fixture
def compilations():
    """Number of programs that were compiled so far."""
    count = [0]

    def listen(name, *_, **__):
        count[0] += name.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count[0]
    jax.monitoring.unregister_event_duration_listener(listen)


PARAMS = mhc.init_params(KEY, streams=4, hidden=16)
MANY = jax.vmap(lambda key: mhc.init_params(key, streams=4, hidden=16))(jax.random.split(KEY, 8))
X = jax.random.normal(KEY, (8, 5, 4, 16), jnp.float32)


def loss(x, params, **options):
    return jnp.sum(mhc.mhc_residual(jnp.tanh, x, params, **options))


def gradient_of_stack(layer=lambda u, s: jnp.tanh(u) * s):
    """With layers that are new functions in every call."""
    return jax.grad(
        lambda params: jnp.sum(
            mhc.stack([lambda u, s: layer(u, s)] * 2, X, [params] * 2, xs=jnp.ones(8, jnp.float32))
        )
    )(MANY)


EAGER = {
    "forward": lambda: loss(X, PARAMS),
    "gradient": lambda: jax.grad(loss)(X, PARAMS),
    "vmap over streams": lambda: jax.vmap(lambda x: loss(x, PARAMS))(X),
    "vmap over parameters": lambda: jax.vmap(loss)(X, MANY),
    "its gradient": lambda: jax.grad(lambda p: jnp.sum(jax.vmap(loss)(X, p)))(MANY),
    "vmap of the gradient": lambda: jax.vmap(jax.grad(loss, argnums=1))(X, MANY),
    "vmap of vmap over parameters": lambda: jax.vmap(
        lambda x: jax.vmap(lambda p: loss(x, p))(MANY)
    )(X),
    "gradient of a stack with xs": gradient_of_stack,
    "reference": lambda: loss(X, PARAMS, implementation="reference"),
    "gradient of the reference": lambda: jax.grad(loss)(X, PARAMS, implementation="reference"),
    "sinkhorn in plain JAX": lambda: jax.grad(
        lambda z: jnp.sum(jnp.sin(mhc.sinkhorn(z, implementation="reference")))
    )(X[..., :4]),
}


@pytest.mark.parametrize("call", EAGER)
def test_eager_calls_compile_once(call, compilations):
    for _ in range(2):
        jax.block_until_ready(EAGER[call]())
    before = compilations()
    jax.block_until_ready(EAGER[call]())
    assert compilations() == before


def test_other_layers_are_other_programs():
    """Of the same types, with other operations, constants or literals."""
    table = jnp.arange(16, dtype=jnp.float32)
    layers = [
        lambda u, s: jnp.tanh(u) * s,
        lambda u, s: jnp.sin(u) * s,
        lambda u, s: jnp.tanh(2 * u) * s,
        lambda u, s: jnp.tanh(3 * u) * s,
        lambda u, s: jnp.tanh(u + jax.lax.expand_dims(table, (0, 1))) * s,
        lambda u, s: jnp.tanh(u - jax.lax.expand_dims(table, (0, 1))) * s,
        lambda u, s: jax.nn.relu(u) * s,
    ]
    sums = [
        float(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient_of_stack(layer))))
        for layer in layers
    ]
    assert len({round(value, 2) for value in sums}) == len(layers)


# ---- batches of parameters ----------------------------------------------------------------------


@pytest.mark.parametrize("tokens, is_small", [(4, True), (16384, False)])
def test_small_elements_of_a_batch_run_in_plain_jax(tokens, is_small):
    """A call of each would cost more than its work; "fused" runs the kernels all the same."""
    params = jax.tree.map(lambda leaf: jnp.repeat(leaf, 4, 0), MANY)
    x = jax.ShapeDtypeStruct((32, tokens, 4, 16), jnp.float32)

    def program(implementation):
        run = jax.vmap(functools.partial(loss, implementation=implementation))
        return jax.jit(jax.grad(lambda p, x: jnp.sum(run(x, p)))).lower(params, x).as_text()

    assert ("jax_mhc_pre_bwd" in program(None)) == (not is_small)
    assert "jax_mhc_pre_bwd" in program("fused")


# ---- what is kept -------------------------------------------------------------------------------


def test_nothing_is_kept_of_eager_calls():
    """Of calls with layers that are new every time, beyond what the first ones compile."""
    for _ in range(3):
        jax.block_until_ready(gradient_of_stack())
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(10):
        jax.block_until_ready(gradient_of_stack())
    gc.collect()
    assert len(gc.get_objects()) - before < 2000


@pytest.mark.parametrize("call", ["gradient", "its gradient", "gradient of a stack with xs"])
def test_no_tracer_leaks(call):
    with jax.checking_leaks():
        jax.jit(EAGER[call])()
