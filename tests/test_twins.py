"""Plain residual models and their twins with hyper-connections: the same start, moved weights."""

import runpy
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_mhc as mhc
import jax_mhc.equinox as mhc_eqx
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

MODULES = Path(__file__).parents[1] / "examples" / "modules"
WIDTH, DEPTH, VOCAB = 8, 2, 16
TOKENS = np.arange(18, dtype=np.int32).reshape(2, 9) % VOCAB
pytestmark = pytest.mark.usefixtures("default_dtypes")

# ---- a GPT in three libraries, plain and with n streams -----------------------------------------


def enter(u, n):
    return mhc.expand(u, streams=n) if n else u


def leave(x):
    return mhc.reduce(x) if isinstance(x, mhc.Streams) else x


def add(layer, x):
    """A sublayer: what `MHC` is in place of."""
    return layer(x) if isinstance(x, mhc.Streams) else x + layer(x)


class LinenAttention(nn.Module):
    norm: bool = True

    @nn.compact
    def __call__(self, u):
        mask = nn.make_causal_mask(jnp.ones(u.shape[:-1]))
        u = nn.RMSNorm()(u) if self.norm else u
        return nn.MultiHeadDotProductAttention(2)(u, mask=mask)


class LinenMLP(nn.Module):
    norm: bool = True

    def setup(self):
        self.scale = nn.RMSNorm() if self.norm else lambda u: u
        self.layers = nn.Sequential([nn.Dense(4 * WIDTH), nn.gelu, nn.Dense(WIDTH)])

    def __call__(self, u):
        return self.layers(self.scale(u))


def linen_layers(n, norm):
    def wrap(layer):
        return mhc_linen.MHC(layer, WIDTH, streams=n, norm=norm) if n else layer

    for _ in range(DEPTH):
        yield wrap(LinenAttention(not norm))
        yield wrap(LinenMLP(not norm))


class LinenGPT(nn.Module):
    """Layers that setup makes."""

    n: int = 0
    norm: bool = False

    def setup(self):
        self.embed = nn.Embed(VOCAB, WIDTH)
        self.layers = list(linen_layers(self.n, self.norm))

    def __call__(self, tokens):
        x = enter(self.embed(tokens), self.n)
        for layer in self.layers:
            x = add(layer, x)
        return self.embed.attend(leave(x))


class CompactGPT(nn.Module):
    """Layers made in the call."""

    n: int = 0
    norm: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, WIDTH)
        x = enter(embed(tokens), self.n)
        for layer in linen_layers(self.n, self.norm):
            x = add(layer, x)
        return embed.attend(mhc_linen.Head(WIDTH, streams=self.n)(x) if self.n else x)


class EqxAttention(eqx.nn.MultiheadAttention):
    def __call__(self, u):
        return super().__call__(u, u, u, mask=jnp.tril(jnp.ones((len(u), len(u)), bool)))


class EqxMLP(eqx.Module):
    norm: eqx.nn.RMSNorm | None
    layers: eqx.nn.MLP

    def __call__(self, u):
        return self.layers(self.norm(u) if self.norm else u)


class EqxGPT(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list
    n: int = eqx.field(static=True)

    def __init__(self, key, n=0, norm=False):
        keys = iter(jax.random.split(key, 2 * DEPTH + 1))
        self.n, self.embed, self.layers = n, eqx.nn.Embedding(VOCAB, WIDTH, key=next(keys)), []
        for _ in range(DEPTH):
            self.layers.append(self.wrap(EqxAttention(2, WIDTH, key=key), False, key := next(keys)))
            layers = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=(key := next(keys)))
            mlp = EqxMLP(None if norm else eqx.nn.RMSNorm(WIDTH, 1e-6, use_bias=False), layers)
            self.layers.append(self.wrap(eqx.filter_vmap(mlp), norm, key))

    def wrap(self, layer, norm, key):
        return mhc_eqx.MHC(layer, WIDTH, streams=self.n, norm=norm, key=key) if self.n else layer

    def __call__(self, tokens):
        x = enter(jax.vmap(self.embed)(tokens), self.n)
        for layer in self.layers:
            x = add(layer, x)
        return leave(x) @ self.embed.weight.T


class Identity(nnx.Module):
    def __call__(self, u):
        return u


class NNXDropout(nnx.Module):
    """A layer with a stream of keys, and statistics."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, u):
        return self.dropout(self.norm(self.linear(u)))


class NNXGPT(nnx.Module):
    def __init__(self, rngs, n=0, norm=False):
        parts = runpy.run_path(str(MODULES / "gpt_plain.py"))
        self.n = n
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List()
        for _ in range(DEPTH):
            for layer in (parts["Attention"](WIDTH, 2, rngs), parts["MLP"](WIDTH, rngs)):
                if norm:
                    layer.norm = Identity()
                self.layers.append(self.wrap(layer, norm, rngs))
            self.layers.append(self.wrap(NNXDropout(rngs), False, rngs))

    def wrap(self, layer, norm, rngs):
        options = {"streams": self.n, "norm": norm, "rngs": rngs}
        return mhc_nnx.MHC(layer, WIDTH, **options) if self.n else layer

    __call__ = LinenGPT.__call__


# ---- the same for all of them: made of a seed, weights by path, loss ----------------------------


class NNX:
    from_plain = staticmethod(mhc_nnx.from_plain)

    @staticmethod
    def make(seed, **options):
        return NNXGPT(nnx.Rngs(seed), **options)

    @staticmethod
    def weights(model):
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {".".join(map(str, path)): variable[...] for path, variable in state}

    @staticmethod
    def logits(model, **_):
        return nnx.jit(lambda model: model(TOKENS))(model)


def dotted(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").replace("._fun", ""): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if isinstance(leaf, jax.Array)
    }


class Linen:
    from_plain = staticmethod(mhc_linen.from_plain)
    weights = staticmethod(dotted)
    gpt = LinenGPT

    @classmethod
    def make(cls, seed, **options):
        return jax.jit(cls.gpt(**options).init)(jax.random.key(seed), TOKENS)

    @classmethod
    def logits(cls, variables, **options):
        return jax.jit(cls.gpt(**options).apply)(variables, TOKENS)


class Compact(Linen):
    gpt = CompactGPT


class Equinox:
    from_plain = staticmethod(mhc_eqx.from_plain)
    weights = staticmethod(dotted)

    @staticmethod
    def make(seed, **options):
        return EqxGPT(jax.random.key(seed), **options)

    @staticmethod
    def logits(model, **_):
        return eqx.filter_jit(lambda model: jax.vmap(model)(TOKENS))(model)


LIBRARIES = pytest.mark.parametrize("library", [NNX, Linen, Compact, Equinox])


def assert_close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@LIBRARIES
def test_the_same_start(library):
    """Of one seed: all weights to the bit, and the logits to rounding."""
    with jax.default_matmul_precision("highest"):
        plain = library.make(0)
        expected, weights = library.logits(plain), library.weights(plain)
        twin = library.make(0, n=3)
        assert_close(library.logits(twin, n=3), expected)
    found = library.weights(twin)
    of_layers = {path.replace(".layer.", "."): value for path, value in found.items()}
    for path, value in weights.items():
        np.testing.assert_array_equal(of_layers.pop(path), value, err_msg=path)
    biases = [tuple(v.tolist()) for k, v in of_layers.items() if k.endswith("bias")]
    assert len(set(biases)) == len(biases) >= 2 * DEPTH


def trained(model):
    """A model none of whose weights are what an initial model has, be it 0 or 1."""
    return jax.tree.map(lambda w: 1.1 * w + 0.01 if eqx.is_inexact_array(w) else w, model)


@LIBRARIES
def test_from_plain(library):
    """With another n and norms in the connections, which keep their values: the same logits."""
    plain, twin = trained(library.make(0)), library.make(1, n=2, norm=True)
    names = {}
    if library is Compact:  # where nothing tells which layer a connection has
        for i in range(DEPTH):
            for j, norm in enumerate((f"LinenAttention_{i}.RMSNorm_0", f"LinenMLP_{i}.scale")):
                names[f"params.MHC_{2 * i + j}.norm_scale"] = f"params.{norm}.scale"
    moved = library.from_plain(plain, twin, names=names)
    assert jax.tree.structure(moved) == jax.tree.structure(twin)
    before, after = library.weights(twin), library.weights(moved)
    for path, value in before.items():
        connection, _, name = path.rpartition(".")
        own = f"{connection}.phi" in before and name != "norm_scale"
        assert np.array_equal(after[path], value) == own, path
    with jax.default_matmul_precision("highest"):
        assert_close(library.logits(moved, n=2, norm=True), library.logits(plain))
    for wrong in (library.make(0, n=2, norm=True), library.make(0, n=2)):
        with pytest.raises(ValueError, match="has none|got none"):
            library.from_plain(wrong, twin, names=names)


@pytest.mark.parametrize(
    "names", [{"mlp": "up"}, {"mlp.layer": "up"}, {"mlp.layer.kernel": "up.kernel"}]
)
def test_names_of_modules_and_of_weights(names):
    rngs, initializers = nnx.Rngs(0), (nnx.initializers.ones, nnx.initializers.zeros)
    one, zero = (
        nnx.Linear(2, 2, use_bias=False, kernel_init=init, rngs=rngs) for init in initializers
    )
    plain, twin = nnx.Dict(up=one), nnx.Dict(mlp=mhc_nnx.MHC(zero, 2, rngs=rngs))
    moved = mhc_nnx.from_plain(plain, twin, names=names)
    np.testing.assert_array_equal(moved.mlp.layer.kernel[...], 1)
    np.testing.assert_array_equal(twin.mlp.layer.kernel[...], 0)


class Boxed(nn.Module):
    """A layer with statistics, whose kernel has a name for each axis."""

    @nn.compact
    def __call__(self, u):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        u = nn.Dense(WIDTH, kernel_init=init)(u)
        return nn.BatchNorm(use_running_average=True)(u)


class Sublayers(nn.Module):
    n: int = 0

    def setup(self):
        kinds = Boxed, nn.remat(Boxed)
        self.layers = [
            mhc_linen.MHC(kind(), WIDTH, streams=self.n, static=True) if self.n else kind()
            for kind in kinds
        ]

    def __call__(self, u):
        x = enter(u, self.n)
        for layer in self.layers:
            x = add(layer, x)
        return leave(x)


def test_linen_collections_boxes_and_static_coefficients():
    """They move too; a box of the plain model is not missed, and that of the new one stays."""
    u = jnp.ones((3, WIDTH))
    plain, twin = (jax.jit(Sublayers(n).init)(jax.random.key(n), u) for n in (0, 2))
    plain = trained(plain)
    for variables in (plain, nn.meta.unbox(plain)):
        moved = mhc_linen.from_plain(variables, twin)
        assert jax.tree.structure(moved) == jax.tree.structure(twin)
        assert_close(Sublayers(2).apply(moved, u), Sublayers().apply(plain, u))
