"""The modules for Flax NNX, Flax Linen and Equinox."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_mhc.flax import nnx as mhc_nnx

C, N = 8, 4
SCALES = jnp.float32([0.5, 2.0, 1.0])


def activation(u, w):
    return jnp.sin(jnp.matmul(u, w, precision="highest"))


# ---- Flax NNX -----------------------------------------------------------------------------------


class NNXLayer(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (C, C), jnp.float32) / 3)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, u, scale=1.0, rest=False):
        y = self.dropout(activation(scale * u, self.w[...]))
        return (y, jnp.sum(u), "rest") if rest else y


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = mhc_nnx.MHC(NNXLayer(rngs), C, norm=True, rngs=rngs)
        self.mlp = mhc_nnx.MHC(NNXLayer(rngs), C, rngs=rngs)

    def __call__(self, x):
        return self.mlp(self.attention(x))


def nnx_blocks(num=3, block=NNXBlock, seed=0):
    blocks = nnx.split_rngs(splits=num)(nnx.vmap(block))(nnx.Rngs(seed))
    # Initially phi is 0, and alpha without a gradient.
    for i, module in enumerate((blocks.attention, blocks.mlp)):
        shape = module.phi.shape
        module.phi[...] = jax.random.normal(jax.random.key(i), shape, jnp.float32)
    return blocks


def streams(*tokens, seed=0):
    return jax.random.normal(jax.random.key(seed), (*tokens, N, C), jnp.float32)


def nnx_sequential(blocks, x):
    run = nnx.scan(nnx.remat(NNXBlock.__call__), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    return run(blocks, x)


def nnx_stacked(blocks, x):
    return mhc_nnx.stack(blocks, x, ["attention", "mlp"])


def test_an_nnx_stack_is_a_scan_over_blocks():
    blocks, x = nnx_blocks(), streams(5)
    results = {}
    for run in (nnx_sequential, nnx_stacked):

        def loss(blocks, x, run=run):
            return jnp.sum(jnp.sin(run(blocks, x)))

        results[run] = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(blocks, x)
    for one, other in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert np.any(one != 0)


def test_missing_packages(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jax_mhc.flax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError) as error:
        importlib.import_module("jax_mhc.flax.nnx")
    assert str(error.value) == (
        "jax_mhc.flax: flax: expected an installed package, got none. "
        "Install it: pip install 'jax-mhc[flax]'."
    )
