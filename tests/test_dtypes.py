"""A model that is cast whole but for its connections, by the lines of docs/dtypes.md."""

from types import SimpleNamespace

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pages
import pytest
from flax import nnx

import jax_mhc as mhc
import jax_mhc.equinox as mhc_eqx
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

C = 8
KEY = jax.random.key(0)
CAST, *BLOCKS = pages.blocks(pages.ROOT / "docs" / "dtypes.md")


class NNXModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        linear = nnx.Linear(C, C, rngs=rngs)
        self.connection = mhc_nnx.MHC(linear, C, norm=True, rngs=rngs)
        self.static = mhc_nnx.MHC(nnx.Linear(C, C, rngs=rngs), C, static=True, rngs=rngs)
        self.head = mhc_nnx.Head(C, rngs=rngs)

    def __call__(self, x):
        return self.head(self.static(self.connection(x)))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        dtype = x.dtype
        x = mhc_linen.MHC(nn.Dense(C, dtype=dtype), C, norm=True)(x)
        x = mhc_linen.MHC(nn.Dense(C, dtype=dtype), C, static=True)(x)
        return mhc_linen.Head(C)(x)


class EqxModel(eqx.Module):
    connection: mhc_eqx.MHC
    static: mhc_eqx.MHC
    head: mhc_eqx.Head

    def __init__(self):
        linear = eqx.filter_vmap(eqx.nn.Linear(C, C, key=KEY, dtype=jnp.float32))
        self.connection = mhc_eqx.MHC(linear, C, norm=True, key=KEY)
        self.static = mhc_eqx.MHC(linear, C, static=True, key=KEY)
        self.head = mhc_eqx.Head(C, key=KEY)

    def __call__(self, x):
        return self.head(self.static(self.connection(x)))


def of_nnx(run):
    model = NNXModel()
    run(model=model)
    graphdef, state = nnx.split(model)
    return state, lambda state, x: nnx.merge(graphdef, state)(x)


def of_linen(run):
    model = LinenModel()
    params = model.init(KEY, jnp.ones((5, 4, C), jnp.float32))
    return run(params=params).params, model.apply


def of_equinox(run):
    arrays, static = eqx.partition(run(model=EqxModel()).model, eqx.is_array)
    return arrays, lambda arrays, x: eqx.combine(arrays, static)(x)


@pytest.mark.parametrize("which", range(3), ids=["nnx", "linen", "equinox"])
def test_a_bfloat16_model_with_float32_connections(which):
    def run(**names):
        return SimpleNamespace(**BLOCKS[which].run(**names, **CAST.run()))

    params, call = (of_nnx, of_linen, of_equinox)[which](run)
    # Layers have 2 parameters each; connections 4, 1 and 3.
    kinds = sorted(leaf.dtype.name for leaf in jax.tree.leaves(params))
    assert kinds == 4 * ["bfloat16"] + 8 * ["float32"]
    labels = jax.tree.leaves(mhc.param_labels(params))
    for leaf, label in zip(jax.tree.leaves(params), labels, strict=True):
        assert (leaf.dtype == jnp.bfloat16) is (label == "other")

    def loss(params, u):
        out = call(params, mhc.expand(u, streams=4))
        return jnp.sum(out.astype(jnp.float32))

    u = jax.random.normal(KEY, (5, C), jnp.bfloat16)
    out = call(params, mhc.expand(u, streams=4))
    assert out.dtype == jnp.bfloat16
    grads = jax.jit(jax.grad(loss))(params, u)
    for d, p in zip(*map(jax.tree.leaves, (grads, params)), strict=True):
        assert d.dtype == p.dtype and jnp.all(jnp.isfinite(d))
