"""Names of the dimensions of the modules' parameters, and rules that lay them over a mesh."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

C, N, K = 8, 4, 24
NAMES = {"phi": ("embed", None), "alpha": (None,), "bias": (None,), "norm_scale": ("norm",)}
SPECS = {"phi": P("embed", None), "alpha": P(None), "bias": P(None), "norm_scale": P("norm")}
OF_HEAD = {name: NAMES[name] for name in ("phi", "alpha", "bias")}
# Rows of phi are stored in parts, as fully sharded training has them.
RULES = (("embed", "data"), ("norm", None), ("layers", None))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return mhc_linen.MHC(jnp.sin, C, norm=True, axis_names=NAMES)(x), None


def linen_blocks():
    """Blocks in a scan."""
    return nn.scan(
        LinenBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.connection = mhc_nnx.MHC(jnp.sin, C, norm=True, axis_names=NAMES, rngs=rngs)


def nnx_blocks():
    """Stacked blocks."""
    init = nnx.vmap(NNXBlock, transform_metadata={nnx.PARTITION_NAME: "layers"})
    return nnx.split_rngs(splits=3)(init)(nnx.Rngs(0))


def streams(*tokens):
    return jax.random.normal(jax.random.key(0), (*tokens, N, C), jnp.float32)


def test_names_in_linen():
    init = functools.partial(linen_blocks().init, jax.random.key(0))
    found = nn.get_partition_spec(jax.eval_shape(init, streams(2), None))["params"]["MHC_0"]
    assert found == {name: P("layers", *spec) for name, spec in SPECS.items()}
    head = mhc_linen.Head(C, axis_names={"phi": ("embed", None)})
    found = nn.get_partition_spec(jax.eval_shape(head.init, jax.random.key(0), streams(2)))
    assert found["params"] == {"phi": SPECS["phi"], "alpha": P(), "bias": P()}
    static = mhc_linen.MHC(jnp.sin, C, static=True, axis_names=NAMES)
    found = nn.get_partition_spec(jax.eval_shape(static.init, jax.random.key(0), streams(2)))
    assert found["params"] == {"bias": SPECS["bias"]}


def test_names_in_nnx():
    with nnx.use_eager_sharding(False):
        found = nnx.get_partition_spec(nnx.state(nnx_blocks()))["connection"]
        head = mhc_nnx.Head(C, axis_names=OF_HEAD, rngs=nnx.Rngs(0))
    specs = {name: found[name].get_value() for name in found}
    assert specs == {name: P("layers", *spec) for name, spec in SPECS.items()}
    assert nnx.get_partition_spec(nnx.state(head))["phi"].get_value() == SPECS["phi"]
    plain = nnx.state(mhc_nnx.Head(C, rngs=nnx.Rngs(0)))
    assert nnx.get_partition_spec(plain)["phi"].get_value() == P()


def check(run, params, x, expected, phi):
    """Values are those of one device; phi stays in parts, and is brought together for the op."""
    compiled = run.lower(params, x).compile()
    value, d = compiled(params, x)
    for one, other in zip(*map(jax.tree.leaves, ((value, d), expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert phi(d).addressable_shards[0].data.shape == (3, N * C // 4, K)
    found = collectives(compiled.as_text())
    assert found["all-gather"][1] <= 3 * N * C * K, found


@pytest.mark.mesh
def test_rules_in_linen():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=2 * (AxisType.Auto,))
    blocks, x = linen_blocks(), streams(8)

    def init(x):
        return blocks.init(jax.random.key(0), x, None)

    specs = nn.get_partition_spec(jax.eval_shape(init, x))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    variables = jax.jit(init, out_shardings=shardings)(x)
    phi = nn.unbox(variables)["params"]["MHC_0"]["phi"]
    assert tuple(phi.sharding.spec)[:2] == (None, "data")

    def loss(variables, x):
        return jnp.sum(jnp.sin(blocks.apply(variables, x, None)[0]))

    expected = jax.jit(jax.value_and_grad(loss))(nn.unbox(init(x)), x)
    run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    placed = jax.device_put(x, NamedSharding(mesh, P("data")))
    check(run, variables, placed, expected, lambda d: nn.unbox(d)["params"]["MHC_0"]["phi"])


@pytest.mark.mesh
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rules_in_nnx(kind):
    """Variables are laid out as they are made."""
    x = streams(8)

    def loss(state, x):
        def block(x, block):
            return nnx.merge(graphdef, block).connection(x), None

        return jnp.sum(jnp.sin(jax.lax.scan(block, x, state)[0]))

    with nnx.use_eager_sharding(False):
        graphdef, state = nnx.split(nnx_blocks())
        expected = jax.jit(jax.value_and_grad(loss))(state, x)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=2 * (kind,))
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        graphdef, state = nnx.split(nnx_blocks())
        phi = state["connection"]["phi"].get_value()
        assert tuple(phi.sharding.spec)[:2] == (None, "data")
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        check(run, state, placed, expected, lambda d: d["connection"]["phi"].get_value())
