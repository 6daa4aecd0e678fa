"""The warning for layers that are functions over modules, whose parameters nobody sees."""

import functools
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jax_mhc.equinox as mhc_eqx
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

C = 8
KEY = jax.random.key(0)
X = jnp.ones((5, 4, C), jnp.float32)

LINEAR = {
    "nnx": nnx.Linear(C, C, rngs=nnx.Rngs(0)),
    "eqx": eqx.nn.Linear(C, C, key=KEY, dtype=jnp.float32),
}
GLOBAL_NNX, GLOBAL_EQX = LINEAR["nnx"], LINEAR["eqx"]


def make(library, layer):
    if library == "nnx":
        return mhc_nnx.MHC(layer, C, rngs=nnx.Rngs(0))
    return mhc_eqx.MHC(layer, C, key=KEY)


def over_global_nnx(u):
    return jax.vmap(lambda token: GLOBAL_NNX(token))(u)


def over_global_eqx(u):
    return jax.vmap(lambda token: GLOBAL_EQX(token))(u)


def with_default(linear):
    def layer(u, linear=linear):
        return linear(u)

    return layer


HIDING = {
    "lambda": lambda linear: lambda u: linear(u),
    "vmap": jax.vmap,
    "jit": lambda linear: jax.jit(lambda u: linear(u)),
    "checkpoint": lambda linear: jax.checkpoint(jax.vmap(linear)),
    "partial": lambda linear: functools.partial(lambda linear, u: linear(u), linear),
    "list": lambda linear: (lambda layers: lambda u: layers[0](u))([linear]),
    "default": with_default,
}


@pytest.mark.parametrize("how", [*HIDING, "global"])
@pytest.mark.parametrize("library", LINEAR)
def test_a_layer_that_hides_parameters(library, how):
    linear = LINEAR[library]
    if how == "global":
        layer = over_global_nnx if library == "nnx" else over_global_eqx
    else:
        layer = HIDING[how](linear)
    with pytest.warns(UserWarning) as found:
        make(library, layer)
    # Equinox warns of functions that JAX has transformed, too.
    (warning,) = [each for each in found if "JAX-transformed" not in str(each.message)]
    assert warning.filename == __file__
    op = {"nnx": "flax.nnx", "eqx": "equinox"}[library]
    remedy = " For single tokens that is eqx.filter_vmap(layer)." if library == "eqx" else ""
    assert str(warning.message) == (
        f"jax_mhc.{op}.MHC: layer: expected a module, or a function without parameters, got a "
        "function over a Linear, whose parameters the model does not have, so that no optimizer "
        "finds them. Pass the module itself, or one of your own that has it as an attribute and "
        f"does what the function does.{remedy}"
    )


class Dropping(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.0)
        self.linear = LINEAR["nnx"]

    def layer(self, u):
        return self.linear(u)


def test_a_method_and_a_parameter_of_nnx():
    with pytest.warns(UserWarning, match="a function over a Dropping, "):
        make("nnx", Dropping().layer)
    param = nnx.Param(jnp.ones(C))
    with pytest.warns(UserWarning, match="a function over a Param, "):
        make("nnx", lambda u: u * param[...])


TABLE, SETTINGS = jnp.ones((5, C), jnp.float32), {"scale": 2.0}

NOT_HIDING = {
    "function": jnp.tanh,
    "gelu": jax.nn.gelu,
    "array": (lambda mask: lambda u: mask * TABLE * u * SETTINGS["scale"])(jnp.ones(C)),
    "function over functions": (lambda f: jax.vmap(lambda u: f(u)))(functools.partial(jnp.sin)),
    "attribute of a global's name": lambda u: u.GLOBAL_NNX,
    "class": (lambda kind: lambda u: kind)(nnx.Linear),
    "recursive": (lambda held: held.append(held) or (lambda u: held))([1]),
}


@pytest.mark.parametrize("library", LINEAR)
def test_layers_that_hide_nothing(library):
    linear, foreign = LINEAR[library], LINEAR[{"nnx": "eqx", "eqx": "nnx"}[library]]
    without = {"nnx": nnx.Dropout(0.0), "eqx": eqx.nn.Dropout(0.0)}[library]
    layers = [linear, *NOT_HIDING.values(), lambda u: without(u), lambda u: foreign(u)]
    if library == "eqx":
        layers += [eqx.filter_vmap(linear), eqx.filter_jit(linear)]
        layers += [jax.tree_util.Partial(lambda linear, u: linear(u), linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in layers:
            make(library, layer)
        with pytest.raises(NameError):  # of a name that has no value yet
            make(library, lambda u: later(u))(X)
    later = linear


class LinenBlock(nn.Module):
    """Dense layers of its own: its closures over them are as good as modules."""

    def setup(self):
        self.second = nn.Dense(C)
        self.second_connection = mhc_linen.MHC(lambda u: self.second(u), C)

    @nn.compact
    def __call__(self, x):
        first = nn.Dense(C)
        x = mhc_linen.MHC(lambda u: first(u), C)(x)
        x = mhc_linen.MHC(lambda u: nn.Dense(C)(u), C)(x)
        return self.second_connection(x)


def test_closures_in_linen():
    """Parameters of modules that a model has are its own, however they are called."""
    block = LinenBlock()
    variables = block.init(KEY, X)
    d = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(block.apply(v, X)))))(variables)
    kernels = [d["params"][name]["kernel"] for name in ("Dense_0", "second")]
    assert all(
        jnp.any(kernel != 0) for kernel in [*kernels, d["params"]["MHC_1"]["Dense_0"]["kernel"]]
    )

    dense = nn.Dense(C)
    bound = dense.bind(dense.init(KEY, X))
    with pytest.warns(UserWarning, match="^jax_mhc.flax.linen.MHC: .* over a Dense, ") as found:
        mhc_linen.MHC(lambda u: bound(u), C).init(KEY, X)
    assert {warning.filename for warning in found} == {__file__}
