"""A GPT in Equinox, before (gpt_equinox_plain.py) and after (gpt_equinox_mhc.py) its conversion."""

import equinox as eqx
import jax
import jax.numpy as jnp

import jax_mhc.equinox


class Attention(eqx.Module):
    norm: eqx.nn.RMSNorm
    attention: eqx.nn.MultiheadAttention

    def __init__(self, width, heads, key):
        self.norm = eqx.nn.RMSNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=key)

    def __call__(self, x):
        u = jax.vmap(self.norm)(x)
        return self.attention(u, u, u, mask=jnp.tri(len(u), dtype=bool))


class MLP(eqx.Module):
    norm: eqx.nn.RMSNorm
    mlp: eqx.nn.MLP

    def __init__(self, width, key):
        self.norm = eqx.nn.RMSNorm(width)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=key)

    def __call__(self, x):
        return jax.vmap(lambda token: self.mlp(self.norm(token)))(x)


class Block(eqx.Module):
    attention: eqx.Module
    mlp: eqx.Module

    def __init__(self, width, heads, key):
        key_1, key_2 = jax.random.split(key)
        self.attention = jax_mhc.equinox.MHC(Attention(width, heads, key_1), width, key=key_1)
        self.mlp = jax_mhc.equinox.MHC(MLP(width, key_2), width, key=key_2)

    def __call__(self, x):
        for layer in (self.attention, self.mlp):
            x = layer(x)
        return x


class GPT(eqx.Module):
    embed: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm

    def __init__(self, vocab, width, heads, depth, key):
        key, *keys = jax.random.split(key, depth + 1)
        self.embed = eqx.nn.Embedding(vocab, width, key=key)
        self.blocks = [Block(width, heads, key) for key in keys]
        self.norm = eqx.nn.RMSNorm(width)

    def __call__(self, tokens):  # of one example
        x = jax_mhc.expand(jax.vmap(self.embed)(tokens), streams=4)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(jax_mhc.reduce(x)) @ self.embed.weight.T


def loss(model, tokens):
    log_p = jax.nn.log_softmax(jax.vmap(model)(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))
