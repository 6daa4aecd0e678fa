"""Parameters through Orbax and safetensors, as docs/training.md says, bit for bit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
from flax import nnx, traverse_util
from test_modules import C, EqxLayer, LinenLayer, NNXLayer, away_from_initial, initial_w, streams

import jax_mhc as mhc
from jax_mhc.equinox import MHC as EqxMHC
from jax_mhc.flax.linen import MHC as LinenMHC
from jax_mhc.flax.nnx import MHC as NNXMHC

KEY = jax.random.key(0)


def params():
    return [mhc.init_params(KEY, streams=4, hidden=C), mhc.init_head(KEY, streams=4, hidden=C)]


def nnx_state():
    return nnx.state(NNXMHC(NNXLayer(nnx.Rngs(1)), C, norm=True, rngs=nnx.Rngs(0)))


def linen_variables():
    return LinenMHC(LinenLayer(), C, norm=True).init(KEY, streams(1))


def eqx_arrays():
    module = EqxMHC(EqxLayer(initial_w(KEY)), C, norm=True, key=KEY)
    return eqx.filter(module, eqx.is_array)


def carried_streams():
    return mhc.as_streams(streams(1))


TREES = [params, nnx_state, linen_variables, eqx_arrays, carried_streams]


def assert_same(got, tree, other):
    """`got` is `tree`, type by type and bit by bit; `other` is not."""
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for one, expected, wrong in zip(*map(jax.tree.leaves, (got, tree, other)), strict=True):
        assert one.dtype == expected.dtype
        np.testing.assert_array_equal(one, expected)
        assert np.any(one != wrong)


@pytest.mark.parametrize("make", TREES)
# Orbax's threads; their warnings are not ours.
@pytest.mark.filterwarnings("default")
def test_orbax(make, tmp_path):
    template = make()
    tree = away_from_initial(template)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "tree", template)
    assert_same(restored, tree, template)


@pytest.mark.parametrize("make", TREES)
def test_safetensors(make, tmp_path):
    """Flat names from the paths of leaves, which any pytree has."""
    template = make()
    tree = away_from_initial(template)
    paths, treedef = jax.tree.flatten_with_path(template)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    leaves = dict(zip(names, jax.tree.leaves(tree), strict=True))
    safetensors.flax.save_file(leaves, tmp_path / "tree.safetensors")
    loaded = safetensors.flax.load_file(tmp_path / "tree.safetensors")
    assert sorted(loaded) == sorted(names)
    restored = jax.tree.unflatten(treedef, [loaded[name] for name in names])
    assert_same(restored, tree, template)


def test_safetensors_of_flax(tmp_path):
    """By Flax's own functions for dictionaries; names are those of the model."""
    tree = away_from_initial(linen_variables())
    flat = traverse_util.flatten_dict(tree, sep=".")
    assert {"params.phi", "params.alpha", "params.bias", "params.norm_scale"} < set(flat)
    safetensors.flax.save_file(flat, tmp_path / "linen.safetensors")
    loaded = safetensors.flax.load_file(tmp_path / "linen.safetensors")
    assert_same(traverse_util.unflatten_dict(loaded, sep="."), tree, linen_variables())

    module = NNXMHC(NNXLayer(nnx.Rngs(1)), C, rngs=nnx.Rngs(0))
    nnx.update(module, away_from_initial(nnx.state(module)))
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(module, nnx.Param)), sep=".")
    assert set(flat) == {"phi", "alpha", "bias", "layer.w"}
    safetensors.flax.save_file(flat, tmp_path / "nnx.safetensors")
    loaded = safetensors.flax.load_file(tmp_path / "nnx.safetensors")
    other = NNXMHC(NNXLayer(nnx.Rngs(1)), C, rngs=nnx.Rngs(0))
    # The state of a module is its variables themselves.
    initial = jax.tree.map(jnp.copy, nnx.state(other))
    nnx.update(other, traverse_util.unflatten_dict(loaded, sep="."))
    assert_same(nnx.state(other), nnx.state(module), initial)
