"""A byte-level GPT; what differs between the connections is `wrap` and `run_blocks`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import jax_mhc as mhc
from jax_mhc.flax import nnx as mhc_nnx

from .settings import CONNECTIONS, Connection, Settings
from .sharding import split_batch


class Attention(nnx.Module):
    """Pre-norm causal self-attention, [batch, seq, width] -> [batch, seq, width]."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        width, dtype = settings.width, jnp.dtype(settings.dtype)
        self.heads, self.implementation = settings.heads, settings.attention
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, u: jax.Array) -> jax.Array:
        qkv = self.qkv(split_batch(self.norm(u))).reshape(*u.shape[:-1], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        mixed = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=self.implementation
        )
        return self.out(mixed.reshape(u.shape))


class MLP(nnx.Module):
    """Pre-norm feed-forward layer, [batch, seq, width] -> [batch, seq, width]."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        width, dtype = settings.width, jnp.dtype(settings.dtype)
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, u: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(split_batch(self.norm(u)))))


class Residual(nnx.Module):
    """The plain residual connection."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.layer(x)


def wrap(connection: Connection, settings: Settings, rngs: nnx.Rngs) -> Callable:
    """Function that makes a sublayer of a layer."""
    options = CONNECTIONS[connection]
    if options is None:
        return Residual
    config = options["config"]
    if config.constraint == "birkhoff":
        config = dataclasses.replace(config, sinkhorn_iters=settings.sinkhorn_iters)
    return lambda layer: mhc_nnx.MHC(
        layer,
        settings.width,
        streams=settings.streams,
        implementation=settings.implementation,
        rngs=rngs,
        **options | {"config": config},
    )


class Block(nnx.Module):
    """Attention and MLP, each with its connection."""

    def __init__(self, connection: Connection, settings: Settings, rngs: nnx.Rngs):
        sublayer = wrap(connection, settings, rngs)
        self.attention = sublayer(Attention(settings, rngs))
        self.mlp = sublayer(MLP(settings, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(self.attention(x))


class GPT(nnx.Module):
    """Byte-level language model; its blocks are stacked, and one loop runs over them."""

    def __init__(self, connection: Connection, settings: Settings, seed: int):
        # The connections have a seed of their own, which recorded results are of; the layers of all
        # models start from the same weights with or without it.
        rngs = nnx.Rngs(seed, mhc=seed)
        width, dtype = settings.width, jnp.dtype(settings.dtype)
        self.streams = None if CONNECTIONS[connection] is None else settings.streams
        self.implementation = settings.implementation
        init = nnx.initializers.normal(width**-0.5)
        # A product, since the gradient of a lookup is a scatter-add: on GPUs slow where many bytes
        # are alike, and in no fixed order.
        self.bytes = nnx.Linear(
            256, width, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs
        )
        self.positions = nnx.Param(init(rngs.params(), (settings.seq, width)))

        @nnx.split_rngs(splits=settings.depth)
        @nnx.vmap
        def stack(rngs):
            return Block(connection, settings, rngs)

        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.logits = nnx.Linear(width, 256, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, sample_tokens: int):
        """[batch, seq] -> logits [batch, seq, 256] float32, and the gain of all blocks.

        The gain is that of the composite mapping, of some tokens.
        """
        x = self.bytes(jax.nn.one_hot(tokens, 256))
        x = split_batch(x + self.positions[: tokens.shape[-1]].astype(x.dtype))
        x, gain = self.run_blocks(x, sample_tokens)
        return self.logits(split_batch(self.norm(x))).astype(jnp.float32), gain

    def run_blocks(self, x: jax.Array, sample_tokens: int):
        if not self.streams:
            run = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            one = jnp.ones(())
            return run(self.blocks, x), mhc.diagnostics.Gain(one, one)
        x = mhc.expand(x, streams=self.streams, implementation=self.implementation)
        x, h_res = mhc_nnx.stack_with_samples(
            self.blocks, x, ("attention", "mlp"), sample_tokens=sample_tokens
        )
        return mhc.reduce(x), mhc.diagnostics.amax_gain(mhc.diagnostics.composite(h_res)[-1])
