"""Settings, parameters, initial values, and parameters of other implementations."""

import dataclasses
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mhc import (
    HeadParams,
    MHCConfig,
    MHCParams,
    convert,
    init_head,
    init_params,
    pre,
    presets,
)

KEY = jax.random.key(0)

CONFIGS = {
    "paper": presets.PAPER,
    "deepseek_v4": presets.DEEPSEEK_V4,
    "hy4": presets.HY4,
    "megatron": presets.MEGATRON,
    "unconstrained": MHCConfig(constraint="none"),
    "identity": MHCConfig(constraint="identity"),
    "permutations": MHCConfig(constraint="permutations"),
    "no_iterations": MHCConfig(sinkhorn_iters=0),
    "rows_first": MHCConfig(order="row_column", sinkhorn_iters=1),
    "post_scale_1": MHCConfig(post_scale=1.0),
    "post_scale_5": MHCConfig(post_scale=5.0),
    "pre_eps": MHCConfig(pre_eps=0.03),
    "post_eps": MHCConfig(post_eps=0.3, post_scale=0.7),
}


# ---- config -------------------------------------------------------------------------------------


def test_defaults_are_the_paper():
    assert dataclasses.asdict(presets.PAPER) == {
        "constraint": "birkhoff",
        "sinkhorn_iters": 20,
        "sinkhorn_eps": 0.0,
        "sinkhorn_eps_mode": "add",
        "order": "column_row",
        "norm_eps": 1e-6,
        "norm_eps_mode": "inside",
        "pre_eps": 0.0,
        "post_scale": 2.0,
        "post_eps": 0.0,
        "form": "mhc",
        "schedule": "immediate",
    }


@pytest.mark.parametrize(
    "preset, changed",
    [
        (presets.DEEPSEEK_V4, {"pre_eps": 1e-6, "sinkhorn_eps": 1e-6}),
        (
            presets.HY4,
            {"constraint": "identity", "norm_eps": 1e-5, "pre_eps": 1e-6, "post_eps": 1e-6},
        ),
        (
            presets.DEEPSEEK_V41,
            {"pre_eps": 1e-6, "sinkhorn_eps": 1e-6, "schedule": "delayed"},
        ),
        (
            presets.MEGATRON,
            {
                "norm_eps_mode": "outside",
                "sinkhorn_eps": 1e-6,
                "sinkhorn_eps_mode": "clamp",
                "order": "row_column",
            },
        ),
    ],
)
def test_presets(preset, changed):
    assert preset == dataclasses.replace(presets.PAPER, **changed)


def test_equal_configs_hash_alike():
    config = MHCConfig(sinkhorn_iters=np.int32(3), post_scale=np.float32(2), pre_eps=0)
    assert config == MHCConfig(sinkhorn_iters=3)
    assert hash(config) == hash(MHCConfig(sinkhorn_iters=3))
    assert type(config.sinkhorn_iters) is int and type(config.pre_eps) is float
    other = MHCConfig(order=np.str_("row_column"))
    assert other == MHCConfig(order="row_column") and type(other.order) is str


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.PAPER.order = "row_column"


def test_config_is_a_static_argument():
    traced = []

    @jax.jit
    def double(x):
        return 2 * x

    def f(x, config):
        traced.append(config)
        return double(x)

    f = jax.jit(f, static_argnums=1)
    f(1.0, MHCConfig()), f(1.0, MHCConfig(sinkhorn_iters=20)), f(1.0, presets.MEGATRON)
    assert traced == [presets.PAPER, presets.MEGATRON]


# ---- pytrees ------------------------------------------------------------------------------------


def test_params_are_pytrees():
    params = init_params(KEY, streams=2, hidden=3)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(6, 8), (3,), (8,)]
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert paths == [".phi", ".alpha", ".bias"]
    static = init_params(KEY, streams=2, hidden=3, static=True)
    assert static.phi is None and static.alpha is None
    assert [leaf.shape for leaf in jax.tree.leaves(static)] == [(8,)]
    assert len(jax.tree.leaves(init_head(KEY, streams=2, hidden=3))) == 3


def test_params_and_context_in_serialised_programs():
    params = init_params(KEY, streams=2, hidden=3)
    x = jnp.ones((5, 2, 3), jnp.float32)
    run = jax.jit(lambda x, params: pre(x, params, implementation="reference")[1])
    stored = jax.export.export(run)(x, params).serialize()
    restored = jax.export.deserialize(stored).call(x, params)
    assert type(restored).__name__ == "Context"
    np.testing.assert_array_equal(restored.h_res, run(x, params).h_res)


# ---- initial values -----------------------------------------------------------------------------


def test_numbers_of_coefficients():
    num = {c: MHCConfig(constraint=c).num_coefficients(4) for c in ("birkhoff", "none", "identity")}
    assert num == {"birkhoff": 24, "none": 24, "identity": 8}
    permutations = MHCConfig(constraint="permutations")
    assert [permutations.num_coefficients(n) for n in range(1, 5)] == [3, 6, 12, 32]


@pytest.mark.parametrize("streams", [2, 3, 4])
def test_columns_of_permutations_are_in_lexicographic_order(streams):
    """Permutation p takes stream p[i] to place i."""
    config = MHCConfig(constraint="permutations")
    params = init_params(KEY, streams=streams, hidden=1, config=config, static=True)
    x = jnp.zeros((1, streams, 1), jnp.float32)
    for column, images in enumerate(itertools.permutations(range(streams))):
        bias = params.bias.at[2 * streams + column].set(1e3)
        ctx = pre(x, dataclasses.replace(params, bias=bias), config=config)[1]
        np.testing.assert_array_equal(ctx.h_res[0], np.eye(streams)[list(images)])


@pytest.mark.parametrize("streams, dtype", [(1, "float32"), (4, "float32"), (16, "float64")])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_initial_coefficients(name, static, streams, dtype):
    config = CONFIGS[name]
    streams = min(streams, 4) if name == "permutations" else streams
    params = init_params(KEY, streams=streams, hidden=5, config=config, static=static, dtype=dtype)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    x = jax.random.normal(KEY, (3, streams, 5), dtype)
    ctx = pre(x, params, config=config, implementation="reference")[1]
    rounding = 8 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(jnp.sum(ctx.h_pre, -1), 1, atol=rounding)
    np.testing.assert_allclose(ctx.h_post, 1, atol=rounding)
    # In mode "add" every division is by (sum + eps).
    lost = config.sinkhorn_eps if config.sinkhorn_eps_mode == "add" else 0
    np.testing.assert_allclose(jnp.sum(ctx.h_res, -1), 1, atol=rounding + 2 * lost)
    exact = streams == 1 or config.constraint in ("none", "identity")
    diagonal = jnp.diagonal(ctx.h_res, axis1=-2, axis2=-1)
    np.testing.assert_allclose(diagonal, 1 if exact else 0.9, atol=rounding + streams * lost)


def test_initial_gates_can_move():
    params = init_params(KEY, streams=4, hidden=5)
    np.testing.assert_array_equal(params.alpha, np.float32([0.01] * 3))
    np.testing.assert_array_equal(params.phi, np.zeros((20, 24), np.float32))
    x = jax.random.normal(KEY, (3, 4, 5), jnp.float32)

    def loss(params):
        u, ctx = pre(x, params, implementation="reference")
        factors = jnp.broadcast_to(jnp.arange(1, 5).astype(u.dtype), ctx.h_post.shape)
        return jnp.sum(u**2) + jnp.sum(ctx.h_post * factors)

    gradient = jax.grad(loss)(params)
    assert jnp.all(jnp.any(gradient.phi[:, :8] != 0, axis=0))


@pytest.mark.parametrize("init", [init_params, init_head])
def test_weights_of_streams_come_from_the_key(init):
    first, again, other = (
        jax.nn.sigmoid(init(key, streams=4, hidden=5).bias[:4])
        for key in (KEY, KEY, jax.random.key(1))
    )
    np.testing.assert_array_equal(first, again)
    assert np.all(np.abs(first - other) > 1e-3)
    assert min(abs(a - b) for a, b in itertools.combinations(first, 2)) > 1e-3


def test_init_under_jit_and_vmap():
    """Parameters of all layers at once, for scan."""
    keys = jax.random.split(KEY, 3)
    stacked = jax.jit(jax.vmap(lambda key: init_params(key, streams=2, hidden=3)))(keys)
    one = init_params(keys[1], streams=2, hidden=3)
    assert stacked.phi.shape == (3, 6, 8)
    np.testing.assert_allclose(stacked.bias[1], one.bias, rtol=1e-6)


def test_initial_head():
    head = init_head(KEY, streams=4, hidden=5, config=presets.DEEPSEEK_V4)
    assert (head.phi.shape, head.alpha.shape, head.bias.shape) == ((20, 4), (1,), (4,))
    np.testing.assert_array_equal(head.phi, np.zeros((20, 4), np.float32))
    np.testing.assert_array_equal(head.alpha, np.float32([0.01]))
    np.testing.assert_allclose(jnp.sum(jax.nn.sigmoid(head.bias) + 1e-6), 1, rtol=1e-6)


# ---- conversion ---------------------------------------------------------------------------------


def deepseek_arrays(streams=3, hidden=5, dtype=np.float32):
    rng = np.random.default_rng(0)
    num = streams**2 + 2 * streams
    shapes = [(num, streams * hidden), (num,), (3,)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_deepseek_round_trip_is_exact(streams, dtype, as_array):
    arrays = deepseek_arrays(streams, dtype=dtype)
    params = convert.from_deepseek_v4(*map(as_array, arrays))
    assert params.phi.shape == arrays[0].T.shape
    for back, array in zip(convert.to_deepseek_v4(params), arrays, strict=True):
        assert back.dtype == dtype
        np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("streams", [2, 4])
def test_deepseek_round_trip_where_phi_does_not_tell_the_streams(streams):
    """phi of 4 or of 12 streams without h_res has the same shape: the number of gates tells."""
    arrays = deepseek_arrays(streams, hidden=6)
    params = convert.from_deepseek_v4(*arrays)
    for given in (None, streams):
        for back, array in zip(convert.to_deepseek_v4(params, streams=given), arrays, strict=True):
            np.testing.assert_array_equal(back, array)
    unmixed = MHCParams(params.phi, params.alpha[:2], params.bias)
    for back, array in zip(
        convert.to_hy4(unmixed), (params.phi.T, params.bias, params.alpha[:2]), strict=True
    ):
        np.testing.assert_array_equal(back, array)
    with pytest.raises(ValueError, match="params.alpha: expected shape"):
        convert.to_deepseek_v4(unmixed)


def test_deepseek_comb_is_the_transpose_of_h_res():
    n = 3
    fn, base, scale = deepseek_arrays(n)
    params = convert.from_deepseek_v4(fn, base, scale)
    np.testing.assert_array_equal(params.alpha, scale)
    np.testing.assert_array_equal(params.bias[: 2 * n], base[: 2 * n])
    np.testing.assert_array_equal(params.phi[:, : 2 * n], fn[: 2 * n].T)
    for i, j in itertools.product(range(n), repeat=2):
        ours, theirs = 2 * n + i * n + j, 2 * n + j * n + i
        assert params.bias[ours] == base[theirs]
        np.testing.assert_array_equal(params.phi[:, ours], fn[theirs])


def test_megatron_transposes_the_weight_alone():
    weight, bias, alpha = deepseek_arrays()
    params = convert.from_megatron(weight, alpha, bias)
    np.testing.assert_array_equal(params.phi, weight.T)
    np.testing.assert_array_equal(params.alpha, alpha)
    np.testing.assert_array_equal(params.bias, bias)


def test_deepseek_head():
    rng = np.random.default_rng(0)
    fn, base, scale = (rng.normal(size=shape).astype(np.float32) for shape in [(3, 15), 3, 1])
    params = convert.head_from_deepseek_v4(fn, base, scale)
    assert isinstance(params, HeadParams)
    np.testing.assert_array_equal(params.phi, fn.T)
    np.testing.assert_array_equal(params.bias, base)
    np.testing.assert_array_equal(params.alpha, scale)


def test_half_precision_is_widened_exactly():
    fn, base, scale = (jnp.asarray(a, jnp.bfloat16) for a in deepseek_arrays())
    params = convert.from_deepseek_v4(fn, base, scale)
    assert isinstance(params, MHCParams)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params.alpha, scale.astype(jnp.float32))
