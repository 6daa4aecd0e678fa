"""Layers of the language model of model.py as modules, in three libraries.

Their blocks run in a Python loop. The modules are made of the parameters that all connections have
in common, while the step is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import STREAMS

import jax_mhc as mhc

# The layers of a block by their names: functions of u and of their parameters.
Layers = dict[str, Callable[..., jax.Array]]


def run_modules(
    library: str, layers: Layers, x: mhc.Streams, params: list[Any], connections: list[Any]
) -> mhc.Streams:
    """The streams after all blocks.

    library: where the modules come from, "jax_mhc.flax.nnx" and so on.
    params, connections: of each block, by the names of its layers.
    """
    hidden = x.shape[-1]
    by_name = {"nnx": _run_nnx, "linen": _run_linen, "equinox": _run_equinox}
    run = by_name[library.rpartition(".")[2]]
    options = {"streams": STREAMS, "implementation": "fused"}
    return run(layers, x, params, connections, hidden, options)


def values(connection: mhc.MHCParams) -> dict[str, jax.Array]:
    """The parameters of a connection by their names."""
    return {name: getattr(connection, name) for name in ("phi", "alpha", "bias")}


def _run_nnx(
    layers: Layers, x: Any, params: list[Any], connections: list[Any], hidden: int, options: Any
) -> Any:
    from flax import nnx

    from jax_mhc.flax.nnx import MHC

    class Layer(nnx.Module):
        def __init__(self, run: Any, params: Any):
            self.run = run
            self.weights = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})

        def __call__(self, u: jax.Array) -> jax.Array:
            return self.run(u, params={name: p[...] for name, p in self.weights.items()})

    class Block(nnx.Module):
        def __init__(self, params: Any, connections: Any):
            self.attention = self.connected("attention", params, connections)
            self.mlp = self.connected("mlp", params, connections)

        @staticmethod
        def connected(name: str, params: Any, connections: Any) -> MHC:
            layer = Layer(layers[name], params[name])
            module = MHC(layer, hidden, **options, rngs=nnx.Rngs(0))
            for part, value in values(connections[name]).items():
                setattr(module, part, nnx.Param(value))
            return module

        def __call__(self, x: Any) -> Any:
            for layer in (self.attention, self.mlp):
                x = layer(x)
            return x

    for block in nnx.List(Block(*each) for each in zip(params, connections, strict=True)):
        x = block(x)
    return x


def _run_linen(
    layers: Layers, x: Any, params: list[Any], connections: list[Any], hidden: int, options: Any
) -> Any:
    import flax.linen as nn

    from jax_mhc.flax.linen import MHC

    shapes = jax.tree.map(jnp.shape, params[0])

    class Layer(nn.Module):
        kind: str

        @nn.compact
        def __call__(self, u: jax.Array) -> jax.Array:
            weights = {
                name: self.param(name, nn.initializers.zeros, shape)
                for name, shape in shapes[self.kind].items()
            }
            return layers[self.kind](u, params=weights)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for name in layers:
                x = MHC(Layer(name, name=name), hidden, **options, name=f"{name}_connection")(x)
            return x

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for i in range(len(params)):
                x = Block(name=f"block_{i}")(x)
            return x

    variables: dict[str, Any] = {
        f"block_{i}": {
            **of_block,
            **{f"{name}_connection": values(c) for name, c in connections[i].items()},
        }
        for i, of_block in enumerate(params)
    }
    return Blocks().apply({"params": variables}, x)


def _run_equinox(
    layers: Layers, x: Any, params: list[Any], connections: list[Any], hidden: int, options: Any
) -> Any:
    import equinox as eqx

    from jax_mhc.equinox import MHC

    class Layer(eqx.Module):
        weights: dict[str, jax.Array]
        run: Callable[..., jax.Array] = eqx.field(static=True)

        def __call__(self, u: jax.Array) -> jax.Array:
            return self.run(u, params=self.weights)

    class Block(eqx.Module):
        attention: MHC
        mlp: MHC

        def __init__(self, params: Any, connections: Any):
            self.attention = self.connected("attention", params, connections)
            self.mlp = self.connected("mlp", params, connections)

        @staticmethod
        def connected(name: str, params: Any, connections: Any) -> MHC:
            layer = Layer(params[name], layers[name])
            module = MHC(layer, hidden, **options, key=jax.random.key(0))
            new = tuple(values(connections[name]).values())
            return eqx.tree_at(lambda m: (m.phi, m.alpha, m.bias), module, new)

        def __call__(self, x: Any) -> Any:
            for layer in (self.attention, self.mlp):
                x = layer(x)
            return x

    for block in [Block(*each) for each in zip(params, connections, strict=True)]:
        x = block(x)
    return x
