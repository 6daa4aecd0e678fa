"""Forms of coefficients that plain JAX alone has: hyper-connections as published, and channels."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import relative_error
from flax import nnx
from jax.test_util import check_grads

import jax_mhc
from jax_mhc import MHCConfig, MHCParams, presets
from jax_mhc.flax.nnx import MHC

N, C, TOKENS = 3, 5, (2, 3)
PUBLISHED = presets.HYPER_CONNECTIONS
CONFIGS = {
    "published": PUBLISHED,
    "published, outside": dataclasses.replace(PUBLISHED, norm_eps=0.3, norm_eps_mode="outside"),
    "channels": MHCConfig(form="channels"),
    "channels, every setting": MHCConfig(
        form="channels", constraint="permutations", pre_eps=0.1, post_scale=1.5, post_eps=0.2
    ),
    "channels, identity": MHCConfig(form="channels", constraint="identity"),
}
# Of values: a few roundings of the dtype.
ERRORS = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2.0**-8}


def problem(config, dtype):
    """Streams, a layer's output, and parameters whose logits are of size 1."""
    rng = np.random.default_rng(0)
    wide = np.float64 if dtype == "float64" else np.float32

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=shape), wide)

    x, y = normal(*TOKENS, N, C).astype(dtype), normal(*TOKENS, C).astype(dtype)
    num = config.num_coefficients(N, hidden=C)
    if config.form == "channels":
        return x, y, MHCParams(None, None, normal(num))
    phi = normal(C, N + 2, scale=C**-0.5)
    return x, y, MHCParams(phi, 1 + normal(3, scale=0.1), normal(num))


def exact(x, y, params, config):
    of = oracle.hyper_connections if config.form == "hyper_connections" else oracle.channels
    u, h_pre, h_post, h_res = of(x, params, config)
    if config.form == "hyper_connections":
        h_post = h_post[..., None]
    wide_x, wide_y = (np.asarray(a, np.float64) for a in (x, y))
    mixed = np.einsum("...ij,...jc->...ic", np.broadcast_to(h_res, (*TOKENS, N, N)), wide_x)
    return u, mixed + h_post * wide_y[..., None, :]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("name", CONFIGS)
def test_values(name, dtype):
    config = CONFIGS[name]
    x, y, params = problem(config, dtype)

    @jax.jit
    def run(x, y, params):
        u, ctx = jax_mhc.pre(x, params, config=config)
        return u, jax_mhc.post(y, ctx)

    for value, other in zip(run(x, y, params), exact(x, y, params, config), strict=True):
        assert value.dtype == dtype and relative_error(value, other) <= ERRORS[dtype]


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name):
    config = CONFIGS[name]
    x, y, params = problem(config, "float64")

    def run(x, y, params):
        u, ctx = jax_mhc.pre(x, params, config=config, implementation="reference")
        return u, jax_mhc.post(y, ctx, implementation="reference")

    check_grads(jax.jit(run), (x, y, params), order=1, modes=["fwd", "rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["published", "channels"])
def test_every_way_through_sublayers_is_the_same(name):
    """Arrays, Streams, their loops, stacks, modules; and a kernel before and behind."""
    config = CONFIGS[name]
    x, _, params = problem(config, "float64")
    kernels = jax_mhc.init_params(jax.random.key(1), streams=N, hidden=C, dtype="float64")
    twice = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf] * 2))

    def plain(x, params, kernels):
        for p, c in ((params, config), (params, config), (kernels, presets.PAPER)):
            u, ctx = jax_mhc.reference.pre(x, p, config=c)
            x = jax_mhc.reference.post(jnp.tanh(u), ctx)
        return x

    def residuals(x, params, kernels):
        for p, c in ((params, config), (params, config), (kernels, presets.PAPER)):
            x = jax_mhc.mhc_residual(jnp.tanh, x, p, config=c)
        return x

    def streams(x, params, kernels):
        return residuals(jax_mhc.as_streams(x), params, kernels).array()

    def pieces(x, params, kernels):
        u, ctx = jax_mhc.pre(x, params, config=config)
        u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, params, config=config)
        u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, kernels)
        return jax_mhc.post(jnp.tanh(u), ctx)

    def scanned(x, params, kernels):
        def step(x, p):
            return jax_mhc.mhc_residual(jnp.tanh, x, p, config=config), None

        x, _ = jax_mhc.scan(step, jax_mhc.as_streams(x), twice(params))
        return jax_mhc.mhc_residual(jnp.tanh, x, kernels).array()

    def stacked(x, params, kernels):
        layers = [lambda u, s: jnp.tanh(u)]
        xs = jnp.zeros(2)
        x = jax_mhc.stack(layers, x, [twice(params)], xs=xs, config=config)
        return jax_mhc.mhc_residual(jnp.tanh, x, kernels)

    def evaluate(run):
        def loss(*args):
            out = run(*args)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            x, params, kernels
        )

    wanted = jax.tree.leaves(evaluate(plain))
    for run in (residuals, streams, pieces, scanned, stacked):
        for value, other in zip(jax.tree.leaves(evaluate(run)), wanted, strict=True):
            assert relative_error(value, other) <= 1e-11, run


@pytest.mark.parametrize("static", [False, True])
def test_published_initial_values(static):
    """The layer reads one stream, writes to all of them alike, and no stream mixes."""
    params = jax_mhc.init_params(
        jax.random.key(0), streams=N, hidden=C, config=PUBLISHED, static=static
    )
    assert static or (params.phi.shape == (C, N + 2) and not params.phi.any())
    _, ctx = jax_mhc.pre(jnp.ones((N, C), jnp.float32), params, config=PUBLISHED)
    assert sorted(ctx.h_pre.tolist()) == [0] * (N - 1) + [1]
    np.testing.assert_array_equal(ctx.h_post, np.ones(N))
    np.testing.assert_array_equal(ctx.h_res, np.eye(N))
    reads = [
        jax_mhc.init_params(jax.random.key(i), streams=N, hidden=C, config=PUBLISHED).bias[:N]
        for i in range(20)
    ]
    assert (np.sum(reads, axis=0) > 0).all()


@pytest.mark.parametrize("name", ["published", "channels"])
def test_training_starts_at_the_plain_model(name):
    """In a module, too, of which every stream is a copy; and a step tells the streams apart."""
    config = CONFIGS[name]
    module = MHC(jnp.tanh, C, streams=N, config=config, static=name == "channels", rngs=nnx.Rngs(0))
    u = jax.random.normal(jax.random.key(1), (*TOKENS, C), jnp.float32)
    x_new = module(jax_mhc.expand(u, streams=N)).array()
    np.testing.assert_allclose(x_new, np.stack([u + jnp.tanh(u)] * N, -2), rtol=1e-6, atol=1e-6)

    def loss(module):
        x = module(module(jax_mhc.expand(u, streams=N)))
        return jnp.mean(jnp.square(jax_mhc.reduce(x) - 1))

    gradient = nnx.grad(loss)(module)["bias"][...]
    num = N * C if name == "channels" else N
    of_post = np.asarray(gradient[num : 2 * num]).reshape(N, -1)
    assert len(np.unique(of_post, axis=0)) > 1


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_published_agrees_with_a_public_implementation(dtype):
    """tests/vectors/make_hyper_connections.py says which; its norm has no eps."""
    vectors = np.load(Path(__file__).parent / "vectors" / "hyper_connections.npz")
    arrays = {name: jnp.asarray(vectors[name], dtype) for name in vectors.files}
    names = [name for name in arrays if f"d_{name}" in arrays]
    config = dataclasses.replace(PUBLISHED, norm_eps=0.0)

    def run(given):
        of_alpha, of_beta = given["dynamic_alpha_fn"], given["dynamic_beta_fn"][:, None]
        theta = jnp.concatenate([of_alpha[:, :1], of_beta, of_alpha[:, 1:]], 1)
        alpha, beta = given["dynamic_alpha_scale"], given["dynamic_beta_scale"]
        static = given["static_alpha"]
        params = MHCParams(
            phi=(1 + given["norm.gamma"])[:, None] * theta,
            alpha=jnp.stack([alpha, beta, alpha]),
            bias=jnp.concatenate([static[:, 0], given["static_beta"], static[:, 1:].T.ravel()]),
        )
        return jax_mhc.mhc_residual(jnp.sin, given["x"], params, config=config)

    @jax.jit
    def evaluate(given, ct):
        x_new, pullback = jax.vjp(run, given)
        return x_new, *pullback(ct)

    x_new, gradients = evaluate({name: arrays[name] for name in names}, arrays["ct"])
    errors = {"float64": (1e-14, 1e-14), "float32": (1e-6, 1e-5)}[dtype]
    assert relative_error(x_new, vectors["x_new"]) <= errors[0]
    for name, value in gradients.items():
        assert relative_error(value, vectors[f"d_{name}"]) <= errors[1], name
