"""A GPT in Flax NNX, before (gpt_plain.py) and after (gpt_mhc.py) its conversion to mHC."""

import jax
import jax.numpy as jnp
from flax import nnx

import jax_mhc.flax.nnx


class Attention(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))


class MLP(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(self.norm(x))))


class Block(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.attention = jax_mhc.flax.nnx.MHC(Attention(width, heads, rngs), width, rngs=rngs)
        self.mlp = jax_mhc.flax.nnx.MHC(MLP(width, rngs), width, rngs=rngs)

    def __call__(self, x):
        for layer in (self.attention, self.mlp):
            x = layer(x)
        return x


class GPT(nnx.Module):
    def __init__(self, vocab, width, heads, depth, rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, rngs) for _ in range(depth))
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens):
        x = jax_mhc.expand(self.embed(tokens), streams=4)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(jax_mhc.reduce(x)))


def loss(model, tokens):
    log_p = jax.nn.log_softmax(model(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))
