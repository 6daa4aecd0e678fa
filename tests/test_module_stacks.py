"""Loops and stacks of blocks that are modules of Flax NNX, Flax Linen and Equinox."""

import functools
import operator

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hlo import custom_calls

import jax_mhc as mhc
import jax_mhc.equinox as mhc_eqx
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

C, N, NUM = 8, 4, 3
TOKENS = 2, 5
NAMES = {"attention": {"scale": 0.7}, "mlp": {}}


def hidden(tokens=TOKENS):
    return jax.random.normal(jax.random.key(0), (*tokens, C), jnp.float32)


def initial_w(key):
    return jax.random.normal(key, (C, C), jnp.float32) / 3


def mix(w, u, scale=1.0):
    return jnp.sin(jnp.matmul(scale * u, w, precision="highest"))


def away_from_initial(tree):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [p + 0.3 * jax.random.normal(k, p.shape, p.dtype) if eqx.is_inexact_array(p) else p
             for p, k in zip(leaves, keys, strict=True)]  # fmt: skip
    return jax.tree.unflatten(treedef, noisy)


# ---- blocks whose second layer tells something of its input, as experts do -----------------------


class NNXMix(nnx.Module):
    def __init__(self, rngs, *, tells=False, rate=0.0):
        self.w = nnx.Param(initial_w(rngs.params()))
        self.dropout = nnx.Dropout(rate, rngs=rngs) if rate else None
        self.tells = tells

    def __call__(self, u, scale=1.0):
        y = mix(self.w[...], u, scale)
        y = y if self.dropout is None else self.dropout(y)
        return (y, jnp.mean(u**2)) if self.tells else y


class NNXBlock(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.attention = mhc_nnx.MHC(NNXMix(rngs, rate=rate), C, norm=True, rngs=rngs)
        self.mlp = mhc_nnx.MHC(NNXMix(rngs, tells=True, rate=rate), C, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return self.mlp(self.attention(x, scale))


def nnx_blocks(**options):
    make = nnx.split_rngs(splits=NUM)(nnx.vmap(lambda rngs: NNXBlock(rngs, **options)))
    blocks = nnx.jit(make)(nnx.Rngs(0))
    nnx.update(blocks, away_from_initial(nnx.state(blocks, nnx.Param)))
    return blocks


def nnx_list(blocks):
    graphdef, state = nnx.split(blocks)
    slices = [jax.tree.map(operator.itemgetter(i), state) for i in range(NUM)]
    return nnx.List(nnx.merge(graphdef, state) for state in slices)


class EqxMix(eqx.Module):
    w: jax.Array
    dropout: eqx.nn.Dropout
    tells: bool

    def __call__(self, u, scale=1.0, key=None):
        y = self.dropout(mix(self.w, u, scale), key=key, inference=key is None)
        return (y, jnp.mean(u**2)) if self.tells else y


class EqxBlock(eqx.Module):
    attention: mhc_eqx.MHC
    mlp: mhc_eqx.MHC

    def __init__(self, key):
        w_1, w_2, key_1, key_2 = jax.random.split(key, 4)
        dropout = eqx.nn.Dropout(0.5)
        self.attention = mhc_eqx.MHC(
            EqxMix(initial_w(w_1), dropout, False), C, norm=True, key=key_1
        )
        self.mlp = mhc_eqx.MHC(EqxMix(initial_w(w_2), dropout, True), C, key=key_2)

    def __call__(self, x, scale=1.0, key=None):
        return self.mlp(self.attention(x, scale, key=key), key=key)


def eqx_blocks():
    return away_from_initial(eqx.filter_vmap(EqxBlock)(jax.random.split(jax.random.key(0), NUM)))


def eqx_list(blocks):
    arrays, static = eqx.partition(blocks, eqx.is_array)
    return [eqx.combine(jax.tree.map(lambda a, i=i: a[i], arrays), static) for i in range(NUM)]


LIBRARIES = {"nnx": (mhc_nnx.stack, nnx_list), "equinox": (mhc_eqx.stack, eqx_list)}


@functools.cache
def variables(library):
    """Arrays of all blocks, and the function that makes the blocks of them."""
    if library == "nnx":
        graphdef, state = nnx.split(nnx_blocks())
        return state, lambda state: nnx.merge(graphdef, state)
    arrays, static = eqx.partition(eqx_blocks(), eqx.is_array)
    return arrays, lambda arrays: eqx.combine(arrays, static)


def in_a_loop(library, blocks, x, scale):
    total = 0.0
    for block in LIBRARIES[library][1](blocks):
        x, aux = block(x, scale)
        total += aux
    return x, total


def value_and_grads(library, run):
    def loss(arrays, u, scale):
        x, aux = run(variables(library)[1](arrays), mhc.expand(u, streams=N), scale)
        return jnp.sum(jnp.sin(x.array())) + jnp.sum(aux)

    operands = variables(library)[0], hidden(), jnp.float32(0.7)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*operands).compile()
    value, grads = step(*operands)
    return value, jax.tree.leaves(grads), custom_calls(step.as_text())


@functools.cache
def expected(library):
    return value_and_grads(library, functools.partial(in_a_loop, library))


@pytest.mark.parametrize(
    "of_list, names, recompute",
    [(False, 0, 0), (True, 0, 0), (False, 1, 2), (True, 1, 2), (False, 1, 0)],
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_stack_is_a_loop_over_its_blocks(library, of_list, names, recompute):
    """With all gradients, and the sum of what layers tell; nothing between sublayers but seams."""
    stack, as_list = LIBRARIES[library]

    def run(blocks, x, scale):
        blocks = as_list(blocks) if of_list else blocks
        options = {"recompute": mhc.Recompute(every=recompute)} if recompute else {}
        if names:
            sublayers = {"attention": {"scale": scale}, "mlp": {}}
            return stack(blocks, x, sublayers, has_aux="sum", **options)
        return stack(blocks, x, arguments={"scale": scale}, has_aux="sum")

    got, exact = value_and_grads(library, run), expected(library)
    for one, other in zip(*map(jax.tree.leaves, (got[:2], exact[:2])), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
        assert np.any(one != 0)
    seams = {"post_pre_fwd", "post_fwd", "post_pre_bwd", "post_bwd"}
    # The first sublayer of a Python loop has no post before it, where no checkpoint lies between.
    assert set(exact[2]) == seams | {"pre_fwd", "pre_bwd"}
    # Streams that are recomputed are those of post alone.
    assert set(got[2]) == (set(exact[2]) if of_list and not recompute else seams)
    if not recompute:
        assert got[2]["post_pre_fwd"] == (2 * NUM - 1 if of_list else 2)


@pytest.mark.parametrize("library", LIBRARIES)
def test_aux_of_blocks_and_of_layers(library):
    """Stacked, in a list, or by the names of layers; an array comes back as an array."""
    stack, as_list = LIBRARIES[library]
    blocks = variables(library)[1](variables(library)[0])
    x = mhc.expand(hidden(), streams=N).array()
    after, stacked = stack(blocks, x, has_aux=True)
    assert isinstance(after, jax.Array) and stacked.shape == (NUM,)
    _, listed = stack(as_list(blocks), x, has_aux=True)
    np.testing.assert_allclose(jnp.stack(listed), stacked, rtol=1e-5)
    _, named = stack(blocks, x, ["attention", "mlp"], has_aux=True)
    assert named["attention"] is None
    np.testing.assert_allclose(named["mlp"], stacked, rtol=1e-5)
    _, (*_, last) = stack(as_list(blocks), x, ["attention", "mlp"], has_aux=True)
    np.testing.assert_allclose(last["mlp"], stacked[-1], rtol=1e-5)


# ---- what blocks change -------------------------------------------------------------------------


def nnx_scan(blocks, x):
    run = nnx.scan(lambda block, x: block(x)[0], in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    return run(blocks, x)


@pytest.mark.parametrize(
    "of_list, sublayers, options",
    [
        (False, None, {}),
        (True, None, {}),
        (False, ["attention", "mlp"], {"recompute": mhc.Recompute(every=2)}),
        (True, ["attention", "mlp"], {}),
    ],
)
def test_dropout_of_nnx(of_list, sublayers, options):
    """The masks of `nnx.scan`, and others in the next call."""
    x = mhc.expand(hidden(), streams=N)
    theirs = nnx_blocks(rate=0.5)
    ours = nnx_list(nnx_blocks(rate=0.5)) if of_list else nnx_blocks(rate=0.5)

    @nnx.jit
    def run(blocks, x):
        return mhc_nnx.stack(blocks, x, sublayers, has_aux=True, **options)[0].array()

    first, second = run(ours, x), run(ours, x)
    reference = nnx.jit(nnx_scan)
    for out in (first, second):
        np.testing.assert_allclose(out, reference(theirs, x).array(), rtol=1e-4, atol=1e-5)
    assert np.any(first != second)
    blocks = ours if of_list else nnx_list(ours)
    assert all(block.mlp.layer.dropout.rngs.count[...] == 2 for block in blocks)


class NNXDecoder(nnx.Module):
    """One layer with a cache, which leaves another variable, too."""

    def __init__(self, rngs):
        layer = nnx.MultiHeadAttention(2, C, decode=True, rngs=rngs)
        layer.init_cache((1, 4, C))
        self.attention = mhc_nnx.MHC(layer, C, rngs=rngs)

    def __call__(self, x):
        self.seen = nnx.Intermediate(jnp.float32(x.shape[-1]))
        return self.attention(x)


@pytest.mark.usefixtures("default_dtypes")
def test_a_cache_of_nnx():
    make = nnx.split_rngs(splits=NUM)(nnx.vmap(NNXDecoder))
    ours, theirs = make(nnx.Rngs(0)), make(nnx.Rngs(0))
    named = make(nnx.Rngs(0))
    for _ in range(2):
        x = mhc.expand(hidden((1, 1)), streams=N)
        each = nnx_list(theirs)
        expected = functools.reduce(lambda x, block: block(x), each, x).array()
        np.testing.assert_allclose(mhc_nnx.stack(ours, x).array(), expected, rtol=1e-4, atol=1e-5)
        by_name = mhc_nnx.stack(named, x, ["attention"]).array()
        np.testing.assert_allclose(by_name, expected, rtol=1e-4, atol=1e-5)
        states = [nnx.state(block, nnx.Cache) for block in each]
        nnx.update(theirs, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    for blocks in (ours, named):
        np.testing.assert_array_equal(blocks.attention.layer.cache_index[...], NUM * [2])
    np.testing.assert_array_equal(ours.seen[...], NUM * [C])


@pytest.mark.parametrize("names", [False, True])
def test_dropout_of_equinox(names):
    """Each block has its own of the keys; a list of blocks has the same as stacked ones."""
    blocks, x = eqx_blocks(), mhc.expand(hidden(), streams=N)
    keys = jax.random.split(jax.random.key(1), NUM)

    def run(blocks, keys):
        xs = {"key": keys}
        if names:
            xs = {"attention": xs, "mlp": xs}
            return mhc_eqx.stack(blocks, x, ["attention", "mlp"], xs=xs, has_aux=True)[0].array()
        return mhc_eqx.stack(blocks, x, xs=xs, has_aux=True)[0].array()

    expected = x
    for block, key in zip(eqx_list(blocks), keys, strict=True):
        expected, _ = block(expected, key=key)
    for given in (blocks, eqx_list(blocks)):
        out = run(given, keys)
        np.testing.assert_allclose(out, expected.array(), rtol=1e-4, atol=1e-5)
    assert np.any(out != run(blocks, jnp.broadcast_to(keys[0], keys.shape)))


# ---- Flax Linen ---------------------------------------------------------------------------------


class LinenMix(nn.Module):
    """A layer with dropout, and a variable that every call changes."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, u, scale=1.0):
        count = self.variable("batch_stats", "count", lambda: jnp.int32(0))
        if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            count.value += 1
        self.sow("intermediates", "mean", jnp.mean(u))
        names = nn.with_partitioning(lambda key, _: initial_w(key), ("in", "out"))
        y = mix(self.param("w", names, None), u, scale)
        return nn.Dropout(self.rate, deterministic=False)(y), jnp.mean(u**2)


class LinenBlock(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, scale=1.0):
        x, first = mhc_linen.MHC(LinenMix(self.rate), C, norm=True)(x, scale=scale)
        x, second = mhc_linen.MHC(LinenMix(self.rate), C)(x)
        return x, first + second


BOXES = {nn.PARTITION_NAME: "layers"}


class LinenModel(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, u, scale):
        x, aux = mhc_linen.stack(
            LinenBlock(self.rate, name="blocks"), mhc.expand(u, streams=N), NUM,
            arguments={"scale": scale}, has_aux="sum", metadata_params=BOXES,
        )  # fmt: skip
        return mhc.reduce(x), aux


class LinenScan(nn.Module):
    @nn.compact
    def __call__(self, u, scale):
        blocks = nn.scan(
            LinenBlock, variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True}, in_axes=nn.broadcast, length=NUM,
            metadata_params=BOXES,
        )(name="blocks")  # fmt: skip
        x, aux = blocks(mhc.expand(u, streams=N), scale)
        return mhc.reduce(x), jnp.sum(aux)


def test_a_linen_stack_is_nn_scan():
    """The same variables from the same seed, results, gradients, and what the call changes."""
    u, rngs = hidden(), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    results = []
    for model in (LinenModel(), LinenScan()):
        start = jax.jit(model.init)(rngs, u, 1.0)

        def loss(params, u, scale, model=model, start=start):
            (out, aux), changed = model.apply(
                {**start, "params": params}, u, scale, mutable=["batch_stats", "intermediates"],
                rngs={"dropout": jax.random.key(2)},
            )  # fmt: skip
            return jnp.sum(jnp.sin(out)) + aux, changed

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        operands = away_from_initial(start["params"]), u, jnp.float32(0.7)
        step = run.lower(*operands).compile()
        assert custom_calls(step.as_text())["post_pre_fwd"] == 2
        results.append((start, step(*operands)))
    (start, got), (same_start, expected) = results
    assert jax.tree.structure(start) == jax.tree.structure(same_start)
    jax.tree.map(np.testing.assert_array_equal, start, same_start)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(
        got[0][1]["batch_stats"]["blocks"]["LinenMix_1"]["count"], NUM * [1]
    )


def test_dropout_of_linen():
    u, model = hidden(), LinenModel(0.5)
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, u, 1.0)
    run = jax.jit(
        lambda seed: model.apply(variables, u, 1.0, rngs={"dropout": jax.random.key(seed)})[0]
    )
    np.testing.assert_array_equal(run(0), run(0))
    assert np.any(run(0) != run(1))


# ---- loops with no other call -------------------------------------------------------------------


def jax_scan(blocks, x, scan=jax.lax.scan):
    arrays, static = eqx.partition(blocks, eqx.is_array)
    return scan(lambda x, block: (eqx.combine(block, static)(x)[0], None), x, arrays)[0]


@pytest.mark.parametrize(
    "jit, make, run",
    [
        (nnx.jit, nnx_blocks, nnx_scan),
        (eqx.filter_jit, eqx_blocks, jax_scan),
        (eqx.filter_jit, eqx_blocks, functools.partial(jax_scan, scan=mhc.scan)),
    ],
)
def test_scans_of_modules_are_seams(jit, make, run):
    """That of Linen is in its own test."""
    loop = jit(lambda blocks, u: run(blocks, mhc.expand(u, streams=N)).array())
    program = loop.lower(make(), hidden()).compile()
    text = getattr(program, "compiled", program).as_text()
    assert custom_calls(text) == {"post_pre_fwd": 2, "post_fwd": 1}
