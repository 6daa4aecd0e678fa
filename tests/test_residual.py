"""Entry, exit, a whole sublayer; and the plain residual model that training starts from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import WIDEST, implemented
from test_params import CONFIGS, KEY

import jax_mhc
from jax_mhc import MHCParams, expand, init_head, init_params, mhc_residual, reduce
from jax_mhc._copies import copies

HIDDEN, DEPTH = 8, 4
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def layer(w, u):
    # By default a GPU rounds the factors of a product in float32 to 10 bits.
    return jnp.tanh(jnp.matmul(u, w, precision="highest"))


def weights(dtype=jnp.float32, depth=DEPTH):
    return jax.random.normal(KEY, (depth, HIDDEN, HIDDEN), dtype) / 3


def model(params, ws, u, streams, config, implementation):
    x = expand(u, streams=streams)
    for p, w in zip(params, ws, strict=True):
        x = mhc_residual(
            lambda u, w=w: layer(w, u), x, p, config=config, implementation=implementation
        )
    return x


@pytest.mark.parametrize(
    "name, streams, dtype, implementation",
    [
        (name, streams, dtype, implementation)
        for name, streams, dtype in [
            *[(name, 4, "float32") for name in CONFIGS],
            *[("deepseek_v4", streams, "float32") for streams in (1, 16)],
            *[("paper", streams, "bfloat16") for streams in (1, 3)],
            *[("paper", streams, "float64") for streams in (1, 2)],
            ("paper", 4, "float16"),
        ]
        for dtype, implementation in implemented(dtype)
    ],
)
def test_starts_as_the_plain_residual_model(name, streams, dtype, implementation):
    config = CONFIGS[name]
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    ws = weights(jnp.dtype(dtype))
    options = {"streams": streams, "hidden": HIDDEN, "config": config, "dtype": wide}
    keys = jax.random.split(KEY, DEPTH)
    params = [init_params(key, **options) for key in keys]
    u = jax.random.normal(KEY, (5, HIDDEN), jnp.dtype(dtype))

    plain = u.astype(wide)
    for w in ws:
        plain = plain + layer(w, plain.astype(u.dtype)).astype(wide)
    x = jax.jit(lambda u: model(params, ws, u, streams, config, implementation))(u)
    head = init_head(KEY, **options)
    learned = jax_mhc.head(x, head, config=config, implementation=implementation)

    lost = config.sinkhorn_eps if config.sinkhorn_eps_mode == "add" else 0
    size = float(jnp.max(jnp.abs(plain)))
    # A few roundings a layer: of the streams, of the layer's input, of sums of at most 17 terms.
    tolerance = DEPTH * size * (8 * float(jnp.finfo(dtype).eps) + 2 * lost)
    for out in (reduce(x), learned):
        np.testing.assert_allclose(out.astype(wide), plain, rtol=0, atol=tolerance)


def spread(params, implementation):
    """The largest difference between streams after a few steps of gradient descent."""
    ws = weights()
    u = jax.random.normal(KEY, (5, HIDDEN), jnp.float32)
    config = jax_mhc.presets.PAPER

    @jax.jit
    def step(params):
        def loss(params):
            x = model(params, ws, u, 4, config, implementation)
            return jnp.mean((reduce(x) - jnp.roll(u, 1, 0)) ** 2)

        return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params))

    for _ in range(5):
        params = step(params)
    x = model(params, ws, u, 4, config, implementation).array()
    return float(jnp.max(jnp.abs(x - x[:, :1])))


def test_streams_come_apart(implementation):
    params = [init_params(k, streams=4, hidden=HIDDEN) for k in jax.random.split(KEY, DEPTH)]
    assert spread(params, implementation) > 1e-2
    # Random weights are there because with equal ones the streams stay copies of one.
    alike = [
        MHCParams(p.phi, p.alpha, p.bias.at[:4].set(jnp.log(1 / 3).astype(p.bias.dtype)))
        for p in params
    ]
    assert spread(alike, implementation) < 1e-5


def test_starts_as_the_plain_residual_model_in_a_scan(implementation):
    keys = jax.random.split(KEY, DEPTH)
    params = jax.vmap(lambda key: init_params(key, streams=4, hidden=HIDDEN))(keys)
    u = jax.random.normal(KEY, (5, HIDDEN), jnp.float32)

    @jax.jit
    def run(u):
        def body(x, layer_params):
            p, w = layer_params
            out = mhc_residual(lambda u: layer(w, u), x, p, implementation=implementation)
            return out, None

        return reduce(jax.lax.scan(body, expand(u, streams=4), (params, weights()))[0])

    plain = u
    for w in weights():
        plain = plain + layer(w, plain)
    np.testing.assert_allclose(run(u), plain, rtol=0, atol=1e-5)


# ---- expand and reduce --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6)])
def test_expand_and_reduce(shape, dtype):
    u = jax.random.normal(KEY, shape, jnp.dtype(dtype))
    streams = expand(u, streams=3)
    x = streams.array()
    assert streams.shape == x.shape == (*shape[:-1], 3, 6) and streams.dtype == x.dtype == u.dtype
    for i in range(3):
        np.testing.assert_array_equal(x[..., i, :], u)
    x = x * jnp.broadcast_to(jnp.arange(1, 4).astype(dtype)[:, None], x.shape)
    wide = np.asarray(x, np.float64)
    tolerance = {"rtol": 2 * float(jnp.finfo(dtype).eps)}
    for method, exact in [("mean", wide.mean(-2)), ("sum", wide.sum(-2))]:
        out = reduce(x, method=method)
        assert out.shape == u.shape and out.dtype == u.dtype
        np.testing.assert_allclose(np.asarray(out, np.float64), exact, **tolerance)
    np.testing.assert_array_equal(reduce(x), reduce(x, method="mean"))


def test_reduce_rounds_once():
    # In bfloat16 each of these additions to 256 would be rounded away.
    x = jnp.array([[256], [1], [1], [1], [1]], jnp.bfloat16)
    assert reduce(x, method="sum") == 260


def test_gradient_of_expand_rounds_once():
    """A sum over the streams, in every mode; in bfloat16 each of these ones would be lost."""
    cotangent = jnp.array([[256], [1], [1], [1], [1]], jnp.bfloat16)
    u = jnp.zeros((1,), jnp.bfloat16)

    def run(u):
        return copies(u, 5, axis=-2)

    def gradient(run, u, cotangent):
        return jax.vjp(run, u)[1](cotangent)[0]

    assert gradient(lambda u: expand(u, streams=5).array(), u, cotangent) == 260
    assert gradient(run, u, cotangent) == 260
    assert jax.linear_transpose(run, u)(cotangent)[0] == 260
    assert gradient(lambda u: jax.jvp(run, (u,), (u,))[1], u, cotangent) == 260
    of_many = jax.vmap(functools.partial(gradient, run))
    assert (of_many(jnp.stack([u, u]), jnp.stack([cotangent, cotangent])) == 260).all()


def test_expand_and_reduce_have_every_derivative():
    u = jax.random.normal(KEY, (6,), jnp.float32)

    def f(u):
        x = expand(u, streams=3, implementation="reference")
        return jnp.sum(reduce(x.array() ** 3)) + jnp.sum(reduce(x)) ** 2

    np.testing.assert_allclose(jax.hessian(f)(u), np.diag(6 * u) + 2, rtol=1e-6, atol=1e-6)


# ---- a sublayer ---------------------------------------------------------------------------------


def sublayer(dtype="float32"):
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    params = init_params(KEY, streams=4, hidden=HIDDEN, dtype=wide)
    x = jax.random.normal(KEY, (5, 4, HIDDEN), jnp.dtype(dtype))
    return params, x, weights(x.dtype)[0]


@pytest.mark.parametrize("dtype, implementation", implemented(*DTYPES))
def test_sublayer_is_pre_layer_post(dtype, implementation):
    params, x, w = sublayer(dtype)
    u, ctx = jax_mhc.pre(x, params, implementation=implementation)
    expected = jax_mhc.post(layer(w, u), ctx, implementation=implementation)
    out = mhc_residual(lambda u: layer(w, u), x, params, implementation=implementation)
    np.testing.assert_array_equal(out, expected)
    assert out.dtype == x.dtype


def test_sublayer_with_auxiliary_result(implementation):
    params, x, w = sublayer()
    plain = mhc_residual(lambda u: layer(w, u), x, params, implementation=implementation)
    out, (aux, nothing) = mhc_residual(
        lambda u: (layer(w, u), (u.sum(), None)),
        x,
        params,
        implementation=implementation,
        has_aux=True,
    )
    np.testing.assert_array_equal(out, plain)
    u = jax_mhc.pre(x, params, implementation=implementation)[0]
    assert nothing is None
    np.testing.assert_array_equal(aux, u.sum())


def test_numpy_arrays(implementation):
    params, x, w = sublayer()
    expected = mhc_residual(lambda u: layer(w, u), x, params, implementation=implementation)
    as_numpy = jax.tree.map(np.asarray, (params, x))
    out = mhc_residual(
        lambda u: np.asarray(layer(w, u)), as_numpy[1], as_numpy[0], implementation=implementation
    )
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, expected)


def test_weakly_typed_streams(implementation):
    params, _, _ = sublayer(WIDEST.name)
    with jax.enable_x64(WIDEST == np.float64):
        x = jnp.broadcast_to(jnp.asarray(1.0), (4, HIDDEN))
    assert x.weak_type and x.dtype == WIDEST
    out = mhc_residual(jnp.sin, x, params, implementation=implementation)
    assert out.dtype == x.dtype and not out.weak_type


@pytest.mark.parametrize("dtype, implementation", implemented(*DTYPES))
def test_strict_promotion(dtype, implementation):
    params, x, w = sublayer(dtype)
    head = init_head(KEY, streams=4, hidden=HIDDEN, dtype=params.bias.dtype)

    def run(params, head, x):
        u, ctx = jax_mhc.pre(x, params, implementation=implementation)
        u, ctx = jax_mhc.post_pre(layer(w, u), ctx, params, implementation=implementation)
        x = jax_mhc.post(layer(w, u), ctx, implementation=implementation)
        return jnp.sum(jax_mhc.head(x, head, implementation=implementation) + reduce(x))

    with jax.numpy_dtype_promotion("strict"):
        value, gradient = jax.value_and_grad(run)(params, head, x)
    assert np.isfinite(np.float64(value))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
