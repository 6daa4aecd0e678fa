"""Streams that carry the post of their last sublayer."""

import functools
import itertools
import operator
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PLATFORM
from hlo import compiled_text, custom_calls
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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
    assert calls == {"pre_fwd": 1, "post_pre_fwd": DEPTH - 1, "post_fwd": 1}


def test_an_array_comes_back_exactly():
    x = operands(dtype=jnp.float32)[0].astype(jnp.bfloat16)
    streams = mhc.as_streams(x)
    assert (streams.shape, streams.ndim, streams.dtype, streams.streams) == (x.shape, 4, x.dtype, N)
    np.testing.assert_array_equal(streams.array(), x)
    assert mhc.as_streams(streams) is streams
    np.testing.assert_array_equal(mhc.reduce(streams), mhc.reduce(x))
    gradient = jax.grad(lambda x: jnp.sum(mhc.as_streams(x).array() ** 2))(x)
    np.testing.assert_array_equal(gradient, 2 * x)


# ---- transformations ----------------------------------------------------------------------------


def block(x, ws, params):
    """A scan of sublayers over streams, from an array to an array."""
    return scan(mhc.as_streams, x, ws, params, mhc.presets.PAPER, [None])


def expected_block(x, ws, params):
    return loop(lambda x: x, x, ws, params, mhc.presets.PAPER, ["reference"])


def assert_close(got, expected):
    tolerance = 1e-9 if DTYPE == jnp.float64 else 2e-4
    for out, exact in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        atol = tolerance * np.abs(exact).max()
        np.testing.assert_allclose(out, exact, rtol=tolerance, atol=atol)


def test_a_batch_of_streams():
    x, ws, params = operands()
    batch = jnp.stack([x, 2 * x, -x])
    mapped = jax.vmap(lambda x: mhc.as_streams(x))(batch)
    assert mapped.shape == batch.shape
    w, p = jax.tree.map(lambda leaf: leaf[0], (ws, params))
    step = lambda x: mhc.mhc_residual(functools.partial(layer, w), x, p)  # noqa: E731
    assert_close(jax.vmap(step)(mapped).array(), step(batch))
    gradients = jax.vmap(jax.grad(lambda x: jnp.sum(block(x, ws, params) ** 2)))(batch)
    expected = [jax.grad(lambda x: jnp.sum(expected_block(x, ws, params) ** 2))(x) for x in batch]
    assert_close(gradients, jnp.stack(expected))


POLICIES = {
    "nothing": None,
    "products": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("mhc_layer_output"),
    "all but mHC": mhc.remat_policy("mhc", streams=N, hidden=C),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_recomputed_sublayers(policy):
    x, ws, params = operands()

    @functools.partial(jax.checkpoint, policy=policy)
    def sublayer(x, w, p):
        return mhc.mhc_residual(functools.partial(layer, w), x, p)

    def run(x, ws, params):
        x, _ = jax.lax.scan(lambda x, s: (sublayer(x, *s), None), mhc.as_streams(x), (ws, params))
        return jnp.sum(x.array() ** 2)

    got = jax.jit(jax.grad(run, argnums=(0, 1, 2)))(x, ws, params)
    expected = jax.grad(lambda *o: jnp.sum(expected_block(*o) ** 2), argnums=(0, 1, 2))
    assert_close(got, expected(x, ws, params))


def test_loops_and_branches_keep_the_structure():
    x, ws, params = operands()
    w, p = jax.tree.map(lambda leaf: leaf[0], (ws, params))
    step = functools.partial(mhc.mhc_residual, functools.partial(layer, w), params=p)
    streams = mhc.as_streams(x)
    repeated = jax.lax.fori_loop(0, 2, lambda _, x: step(x), streams)
    assert_close(repeated.array(), step(step(x)))
    until = jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, step(s[1])), (0, streams))
    assert_close(until[1].array(), step(step(x)))
    chosen = jax.lax.cond(jnp.bool_(True), step, lambda x: x, streams)
    assert_close(chosen.array(), step(x))
    copied = jax.tree.map(lambda leaf: leaf, streams)
    assert jax.tree.structure(step(streams)) == jax.tree.structure(copied)


def test_a_carry_stays_what_it_is():
    """The words of JAX's own errors, which name the types and the two kinds of Streams."""
    x = operands(dtype=jnp.float32)[0]
    plain = as_plain(x)
    kinds = "made for implementation='reference' but .* made for the fused ops"
    for start, step, said in [
        (x, mhc.as_streams, "carry x is a .*Array'> but .* is a .*Streams'>"),
        (plain, lambda x: x.array(), "carry x is a .*Streams'> but .* is a .*Array'>"),
        (plain, lambda x: mhc.as_streams(x.array()), kinds),
    ]:
        with pytest.raises(TypeError, match=said):
            jax.lax.scan(lambda x, _, step=step: (step(x), None), start, None, length=2)


def test_donated_streams():
    x, ws, params = operands(dtype=jnp.float32)
    w, p = jax.tree.map(lambda leaf: leaf[0], (ws, params))
    run = functools.partial(mhc.mhc_residual, functools.partial(layer, w), params=p)
    step = jax.jit(run, donate_argnums=0)
    streams = mhc.as_streams(x + 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that some buffers are not usable
        new = step(step(streams))
    assert_close(new.array(), run(run(x)))
    kept = [path for path, part in jax.tree.leaves_with_path(streams) if not part.is_deleted()]
    assert jax.tree_util.keystr(*kept) == ".h_pre"  # which no sublayer reads
    with pytest.raises(ValueError, match="a deleted one"):
        streams.array()


@pytest.mark.parametrize("start", [mhc.as_streams, as_plain])
@pytest.mark.parametrize("constraint, static", [("none", False), ("birkhoff", True)])
def test_norms_and_static_coefficients(start, constraint, static):
    config = mhc.MHCConfig(constraint=constraint)
    init = functools.partial(mhc.init_params, KEY, streams=N, hidden=C, dtype=DTYPE)
    params = jax.tree.map(shifted, init(config=config, static=static))
    x, scale = operands()[0], shifted(jnp.ones(C, DTYPE))

    def loss(start, x, params, scale):
        x = start(x)
        for _ in range(2):
            x = mhc.mhc_residual(jnp.sin, x, params, config=config, norm_scale=scale)
        x = x.array() if isinstance(x, mhc.Streams) else x
        return jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape))

    run = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    assert_close(run(start, x, params, scale), run(lambda x: x, x, params, scale))


def test_tokens_move():
    x, ws, params = operands()
    w, p = jax.tree.map(lambda leaf: leaf[0], (ws, params))
    streams = mhc.mhc_residual(functools.partial(layer, w), mhc.as_streams(x), p)
    whole = streams.array()
    assert_close(streams[0].array(), whole[0])
    assert_close(streams[:, 1:3].array(), whole[:, 1:3])
    assert_close(streams[None].array(), whole[None])
    assert_close(streams.reshape(10).array(), whole.reshape(10, N, C))
    assert_close(streams.reshape(5, -1).array(), whole.reshape(5, 2, N, C))
    assert streams.reshape((1, 10)).shape == (1, 10, N, C)
    rolled = streams.map_tokens(lambda part: jnp.roll(part, 1, axis=0))
    assert_close(rolled.array(), jnp.roll(whole, 1, axis=0))


def test_forward_mode_of_plain_jax():
    x, ws, params = operands()

    def run(x):
        return scan(as_plain, x, ws, params, mhc.presets.PAPER, ["reference"])

    expected = jax.jvp(lambda x: expected_block(x, ws, params), (x,), (jnp.ones_like(x),))
    assert_close(jax.jvp(run, (x,), (jnp.ones_like(x),)), expected)


def test_streams_of_an_exported_program():
    x, ws, params = operands(dtype=jnp.float32)
    w, p = jax.tree.map(lambda leaf: leaf[0], (ws, params))

    def step(x):
        return mhc.mhc_residual(functools.partial(layer, w), x, p, implementation="reference")

    streams = as_plain(x)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = jax.tree.map(
        lambda part: jax.ShapeDtypeStruct((batch, *part.shape[1:]), part.dtype), streams
    )
    exported = jax.export.export(jax.jit(step))(shapes)
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(streams).array(), jax.jit(step)(streams).array())
    for kept in (streams, mhc.as_streams(x)):
        exported = jax.export.export(jax.jit(lambda x: x))(kept)
        same = jax.export.deserialize(exported.serialize()).call(kept)
        assert jax.tree.structure(same) == jax.tree.structure(kept)


# ---- what streams are not -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "use, argument, expected, got",
    [
        (lambda x: x + 1, "x + y", "an array", "Streams"),
        (lambda x: 1 + x, "y + x", "an array", "Streams"),
        (lambda x: x * x, "x * y", "an array", "Streams"),
        (operator.abs, "abs(x)", "an array", "Streams"),
        (lambda x: 1 in x, "y in x", "an array", "Streams"),
        (jnp.sum, "operand", "an array", "Streams"),
        (jax.nn.gelu, "operand", "an array", "Streams"),
        (jax.jit(jnp.sum), "operand", "an array", "Streams"),
        (np.asarray, "operand", "an array", "Streams"),
        (lambda x: x[..., 0], "index", "one of the 2 leading dimensions", ""),
        (lambda x: x[0, 0, 0], "index", "one of the 2 leading dimensions", ""),
        (lambda x: x[np.ones(TOKENS, bool), 0], "index", "one of the 2 leading dimensions", ""),
        (lambda x: x.reshape(7), "tokens", "the tokens [2, 5]", "(7,)"),
        (lambda x: x.map_tokens(lambda part: part[..., :1]), "function", "moves tokens", ""),
        (lambda x: mhc.Streams(x), "Streams(...)", "as_streams", "a call of the class"),
    ],
)
def test_streams_are_no_array(use, argument, expected, got):
    streams = mhc.as_streams(operands(dtype=jnp.float32)[0])
    with pytest.raises((TypeError, ValueError)) as caught:
        use(streams)
    message = str(caught.value)
    assert message.startswith("jax_mhc.Streams") and f": {argument}: expected " in message, message
    assert expected in message and got in message, message


# ---- exits and modules --------------------------------------------------------------------------


def test_the_exits_take_streams():
    x, ws, params = operands(dtype=jnp.float32)
    w, p = jax.tree.map(lambda leaf: leaf[0], (ws, params))
    streams = mhc.mhc_residual(functools.partial(layer, w), mhc.as_streams(x), p)
    head = mhc.init_head(KEY, streams=N, hidden=C)
    np.testing.assert_array_equal(mhc.head(streams, head), mhc.head(streams.array(), head))
    np.testing.assert_array_equal(mhc.reduce(streams), mhc.reduce(streams.array()))


def test_rest_of_a_layer_beside_streams():
    x, ws, params = operands(dtype=jnp.float32)
    w, p = jax.tree.map(lambda leaf: leaf[0], (ws, params))
    new, aux = mhc.mhc_residual(
        lambda u: (layer(w, u), jnp.sum(u)), mhc.as_streams(x), p, has_aux=True
    )
    assert isinstance(new, mhc.Streams) and aux.shape == ()


def nnx_modules():
    from flax import nnx

    from jax_mhc.flax import nnx as mhc_nnx

    rngs = nnx.Rngs(0)
    modules = [mhc_nnx.MHC(nnx.Linear(C, C, rngs=rngs), C, streams=N, rngs=rngs) for _ in range(3)]
    return modules, mhc_nnx.Head(C, streams=N, rngs=rngs)


def equinox_modules():
    import equinox

    from jax_mhc import equinox as mhc_equinox

    def linear(key):
        return equinox.filter_vmap(
            equinox.filter_vmap(equinox.nn.Linear(C, C, key=key, dtype=jnp.float32))
        )

    keys = jax.random.split(KEY, 4)
    modules = [mhc_equinox.MHC(linear(key), C, streams=N, key=key) for key in keys[1:]]
    return modules, mhc_equinox.Head(C, streams=N, key=keys[0])


def linen_modules():
    from flax import linen

    from jax_mhc.flax import linen as mhc_linen

    def bound(module, x):
        return lambda *args: module.apply(module.init(KEY, x), *args)

    x = jnp.zeros((*TOKENS, N, C), jnp.float32)
    modules = [mhc_linen.MHC(linen.Dense(C), C, streams=N) for _ in range(3)]
    return [bound(module, x) for module in modules], bound(mhc_linen.Head(C, streams=N), x)


@pytest.mark.parametrize("make", [nnx_modules, linen_modules, equinox_modules])
def test_a_loop_over_modules_is_post_pre(make):
    modules, head = make()
    x = operands(dtype=jnp.float32)[0]

    def run(x):
        for module in modules:
            x = module(x)
        return head(x)

    def of_streams(x):
        return run(mhc.as_streams(x))

    np.testing.assert_allclose(jax.jit(of_streams)(x), jax.jit(run)(x), rtol=1e-5, atol=1e-5)
    calls = custom_calls(compiled_text(of_streams, x))
    assert calls == {"pre_fwd": 1, "post_pre_fwd": 2, "post_fwd": 1, "head_fwd": 1}


# ---- stacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("has_xs", [False, True])
def test_stacks_take_and_return_streams(has_xs, implementation):
    x, ws, params = operands(depth=4)

    def stack(x, ws, params):
        if has_xs:
            # Blocks of two sublayers.
            ws, params = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), (ws, params))
            slices = [jax.tree.map(lambda a, j=j: a[:, j], params) for j in range(2)]
            layers = [lambda u, s, j=j: layer(s[j], u) for j in range(2)]
            return mhc.stack(layers, x, slices, xs=ws, implementation=implementation)
        each = [jax.tree.map(operator.itemgetter(i), (ws, params)) for i in range(4)]
        layers = [functools.partial(layer, w) for w, _ in each]
        return mhc.stack(layers, x, [p for _, p in each], implementation=implementation)

    def twice(start, x, ws, params):
        """Two stacks, between which somebody reads the coefficients of the last sublayer."""
        x = stack(start(x), ws, params)
        of_gates = 0.0
        if isinstance(x, mhc.Streams):
            of_gates = jnp.sum(jnp.sin(jax.tree.leaves(x)[2]))
        x = stack(x, ws, params)
        x = x.array() if isinstance(x, mhc.Streams) else x
        return jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) + of_gates

    def in_plain_jax(x, ws, params):
        """The same by a loop over arrays."""
        for round_ in range(2):
            for i in range(4):
                w, p = jax.tree.map(operator.itemgetter(i), (ws, params))
                u, ctx = mhc.reference.pre(x, p)
                x = mhc.reference.post(layer(w, u), ctx)
            if round_ == 0:
                of_gates = jnp.sum(jnp.sin(ctx.h_pre))
        return jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) + of_gates

    differentiated = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    expected = differentiated(in_plain_jax)(x, ws, params)
    for start in (mhc.as_streams, as_plain):
        run = functools.partial(twice, start)
        assert_close(jax.jit(differentiated(run))(x, ws, params), expected)


def test_stacks_one_after_the_other_are_joined():
    x, ws, params = operands(depth=2, dtype=jnp.float32)

    def run(x, ws, params):
        each = [jax.tree.map(operator.itemgetter(i), (ws, params)) for i in range(2)]
        x = mhc.as_streams(x)
        for _ in range(2):
            x = mhc.stack([functools.partial(layer, w) for w, _ in each], x, [p for _, p in each])
        return x.array()

    calls = custom_calls(compiled_text(run, x, ws, params))
    assert calls == {"pre_fwd": 1, "post_pre_fwd": 3, "post_fwd": 1}


# ---- meshes -------------------------------------------------------------------------------------


def sharded_loop(x, params, config, **options):
    """Sublayers whose layers know nothing of the mesh, from a hidden state to one."""
    u = jnp.mean(x, axis=-2)
    streams = mhc.expand(u, streams=N, **{k: v for k, v in options.items() if "hidden" in k})
    for i in range(DEPTH):
        p = jax.tree.map(operator.itemgetter(i), params)
        streams = mhc.mhc_residual(jnp.tanh, streams, p, config=config, **options)
    return mhc.reduce(streams)


@pytest.mark.mesh
@pytest.mark.parametrize("mode", ["auto", "explicit", "manual"])
@pytest.mark.parametrize("spec", [P("data"), P("data", None, None, "model")])
def test_streams_on_a_mesh(spec, mode):
    config = mhc.presets.PAPER
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    x, _, params = operands()

    def loss(run, x, params):
        out = run(x, params)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    def run(x, params):
        if mode != "manual":
            return sharded_loop(x, params, config)
        hidden = {"hidden_axis_name": "model"} if len(spec) > 1 else {}
        of_u = P(*spec[:1], None, *spec[3:])
        return jax.shard_map(
            functools.partial(sharded_loop, config=config, **hidden),
            mesh=mesh, in_specs=(spec, P()), out_specs=of_u,
        )(x, params)  # fmt: skip

    expected = jax.value_and_grad(
        lambda *o: loss(lambda x, p: sharded_loop(x, p, config), *o), argnums=(0, 1)
    )(x, params)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(x, NamedSharding(mesh, spec))
        replicated = jax.device_put(params, NamedSharding(mesh, P()))
        of_cosines = functools.partial(loss, run)
        got = jax.jit(jax.value_and_grad(of_cosines, argnums=(0, 1)))(on_mesh, replicated)
    assert_close(got, expected)


@pytest.mark.mesh
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tokens_keep_their_sharding(kind):
    num = jax.device_count()
    mesh = jax.make_mesh((num,), ("data",), axis_types=(kind,))
    x, _, params = operands()
    x = jnp.tile(x[:1], (num, 1, 1, 1))
    p = jax.tree.map(lambda leaf: leaf[0], params)

    def run(x):
        streams = mhc.mhc_residual(jnp.tanh, mhc.as_streams(x), p)
        if kind == AxisType.Auto:
            streams = streams.map_tokens(
                lambda part: jax.lax.with_sharding_constraint(part, P("data"))
            )
        return streams, streams[:, 1:3], streams.reshape(num, 5, 1)

    with jax.set_mesh(mesh):
        # Auto axes hear of the sharding from the constraint alone.
        spec = P() if kind == AxisType.Auto else P("data")
        results = jax.jit(run)(jax.device_put(x, NamedSharding(mesh, spec)))
        for streams in results:
            for part in jax.tree.leaves(streams):
                assert part.sharding.shard_shape(part.shape) == (1, *part.shape[1:])
        whole = results[0].array()
        assert_close(results[1].array(), whole[:, 1:3])
        assert_close(results[2].array(), whole.reshape(num, 5, 1, N, C))
