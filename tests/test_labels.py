"""Labels of parameters: in all libraries, stacked, boxed and masked, and as Optax takes them."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_mhc as mhc
import jax_mhc.equinox as mhc_eqx
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

pytestmark = pytest.mark.usefixtures("default_dtypes")

# No K, unlike 8: a bias of so many channels is nobody's static coefficients.
C, BLOCKS = 9, 5
KEY = jax.random.key(0)

# By module and name; all else is another's, such as the bias of the layers and what is named alpha.
EXPECTED = {
    ("dynamic", "phi"): "projection",
    ("dynamic", "alpha"): "gate",
    ("dynamic", "bias"): "bias",
    ("dynamic", "norm_scale"): "norm",
    ("static", "bias"): "bias",
    ("normed", "bias"): "bias",
    ("normed", "norm_scale"): "norm",
    ("head", "phi"): "projection",
    ("head", "alpha"): "gate",
    ("head", "bias"): "bias",
}


class NNX(nnx.Module):
    def __init__(self, rngs):
        def linear():
            return nnx.Linear(C, C, rngs=rngs)

        self.dynamic = mhc_nnx.MHC(linear(), C, norm=True, rngs=rngs)
        self.static = mhc_nnx.MHC(linear(), C, static=True, rngs=rngs)
        self.normed = mhc_nnx.MHC(jnp.tanh, C, static=True, norm=True, rngs=rngs)
        self.head = mhc_nnx.Head(C, rngs=rngs)
        self.shift = nnx.LayerNorm(C, use_scale=False, rngs=rngs)
        self.alpha = nnx.Param(jnp.ones(3))
        self.blocks = nnx.List([linear(), linear()])


class Linen(nn.Module):
    def setup(self):
        self.dynamic = mhc_linen.MHC(nn.Dense(C), C, norm=True)
        self.static = mhc_linen.MHC(nn.Dense(C), C, static=True)
        self.normed = mhc_linen.MHC(jnp.tanh, C, static=True, norm=True)
        self.head = mhc_linen.Head(C)
        self.shift = nn.LayerNorm(use_scale=False)
        self.alpha = self.param("alpha", nn.initializers.ones, (3,))

    def __call__(self, u):
        x = mhc.expand(u, streams=4)
        for module in (self.dynamic, self.static, self.normed, self.head, self.shift):
            x = module(x)
        return self.alpha[0] * x


def linen():
    return Linen().init(KEY, jnp.ones((1, C), jnp.float32))


class Eqx(eqx.Module):
    dynamic: mhc_eqx.MHC
    static: mhc_eqx.MHC
    normed: mhc_eqx.MHC
    head: mhc_eqx.Head
    linear: eqx.nn.Linear
    alpha: jax.Array

    def __init__(self):
        layer = self.linear = eqx.nn.Linear(C, C, key=KEY)
        self.dynamic = mhc_eqx.MHC(layer, C, norm=True, key=KEY)
        self.static = mhc_eqx.MHC(layer, C, static=True, key=KEY)
        self.normed = mhc_eqx.MHC(jnp.tanh, C, static=True, norm=True, key=KEY)
        self.head = mhc_eqx.Head(C, key=KEY)
        self.alpha = jnp.ones(3)


def plain():
    return {
        "dynamic": mhc.init_params(KEY, streams=4, hidden=C),
        "static": mhc.init_params(KEY, streams=4, hidden=C, static=True),
        "head": mhc.init_head(KEY, streams=4, hidden=C),
        "alpha": jnp.ones(3),
        "layers": [{"kernel": jnp.ones((C, C)), "bias": jnp.ones(24)}],
    }


NAMED = {module for module, _ in EXPECTED}

# Each with the number of its arrays that EXPECTED names.
MODELS = {
    "plain": (plain, 7),
    "dicts": (lambda: {name: vars(of) if name in NAMED else of for name, of in plain().items()}, 7),
    "nnx module": (lambda: NNX(nnx.Rngs(0)), 10),
    "nnx state": (lambda: nnx.state(NNX(nnx.Rngs(0)), nnx.Param), 10),
    "nnx dict": (lambda: nnx.to_pure_dict(nnx.state(NNX(nnx.Rngs(0)), nnx.Param)), 10),
    "linen": (linen, 10),
    "equinox": (lambda: eqx.filter(Eqx(), eqx.is_array), 10),
}


def stacked(axis):
    def stack(params):
        return jax.tree.map(lambda leaf: jnp.stack(BLOCKS * [leaf], axis), params)

    return stack


def boxed(params):
    box = nn.with_logical_partitioning(lambda leaf: leaf, ("any",))
    return jax.tree.map(box, params)


FORMS = {"as it is": lambda params: params, "stacked": stacked(0), "stacked on axis 1": stacked(1)}


def check(params, num_connected):
    """All labels, by the names in the path of each leaf."""
    labels = mhc.param_labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    num = 0
    for path, label in jax.tree.leaves_with_path(labels):
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        # The name within the boxes of Flax.
        expected = EXPECTED.get(tuple(name for name in names if name not in ("params", "value")))
        assert label == (expected or "other"), jax.tree_util.keystr(path)
        num += expected is not None
    assert num == num_connected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_labels(model, form):
    make, num_connected = MODELS[model]
    check(jax.eval_shape(lambda: FORMS[form](make())), num_connected)


def test_labels_in_boxes():
    check(jax.eval_shape(lambda: boxed(linen())), 10)


def test_labels_of_arrays_and_of_modules_with_functions():
    model = Eqx()
    labels = mhc.param_labels(model)
    assert labels.normed.layer == "other"
    check(eqx.filter(model, eqx.is_array), 10)


@pytest.mark.parametrize(
    "shapes",
    [
        {"phi": (8, 8), "alpha": (8,), "bias": (8,)},
        {"phi": (36, 24), "alpha": (3,), "bias": (36, 24)},
        {"phi": (36, 24), "alpha": (3,), "bias": (25,)},
        {"phi": (36, 24), "alpha": (3,)},
        {"kernel": (24, 24), "bias": (24,)},
        {"scale": (24,), "bias": (24,)},
        {"bias": (25,)},
        {"bias": (24,), "dense": (3, 3)},
        {"norm_scale": (24,)},
    ],
)
def test_other_dicts_are_told_apart(shapes):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    assert mhc.param_labels(params) == dict.fromkeys(shapes, "other")


def test_modules_with_the_names_of_parameters_are_told_apart():
    modules = {name: {"kernel": jnp.ones((3, 24))} for name in ("phi", "alpha", "bias")}
    for params in (modules, {"bias": modules["bias"]}, {"bias": {"bias": jnp.ones(C)}}):
        assert set(jax.tree.leaves(mhc.param_labels(params))) == {"other"}


def test_a_lone_bias_of_a_possible_size_counts_as_static():
    assert mhc.param_labels({"bias": jnp.ones(24)}) == {"bias": "bias"}


def test_subclasses_of_modules_are_connections_with_other_arrays():
    class Mine(mhc_eqx.MHC):
        extra: jax.Array

        def __init__(self):
            super().__init__(jnp.tanh, C, key=KEY)
            self.extra = jnp.ones(2)

    labels = mhc.param_labels(Mine())
    assert (labels.phi, labels.bias, labels.extra) == ("projection", "bias", "other")


# ---- in Optax ------------------------------------------------------------------------------------

RATES = {"projection": 1.0, "gate": 2.0, "bias": 3.0, "norm": 4.0, "other": 5.0}


@pytest.mark.parametrize("model", ["plain", "nnx state", "linen", "equinox"])
def test_multi_transform_moves_each_array_by_its_own_rate(model):
    params = jax.tree.map(np.asarray, jax.jit(MODELS[model][0])())
    optimizer = optax.multi_transform(
        {label: optax.sgd(rate) for label, rate in RATES.items()}, mhc.param_labels
    )
    # Of which the gates are frozen.
    moved = jax.tree.map(lambda label: label != "gate", mhc.param_labels(params))
    optimizer = optax.masked(optimizer, moved)

    @jax.jit
    def step(params):
        grads = jax.tree.map(jnp.ones_like, params)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    rates = {**RATES, "gate": -1.0}  # masked: the gradient as it is
    for update, label in zip(
        jax.tree.leaves(step(params)), jax.tree.leaves(mhc.param_labels(params)), strict=True
    ):
        np.testing.assert_array_equal(update, -rates[label])
