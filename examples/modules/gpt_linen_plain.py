"""A GPT in Flax Linen, before (gpt_linen_plain.py) and after (gpt_linen_mhc.py) its conversion."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(self.heads)
        return attention(nn.RMSNorm()(x), mask=nn.make_causal_mask(x[..., 0]))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        up = nn.Dense(4 * x.shape[-1])(nn.RMSNorm()(x))
        return nn.Dense(x.shape[-1])(nn.gelu(up))


class Block(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.heads)(x)
        x = x + MLP()(x)
        return x


class GPT(nn.Module):
    vocab: int
    width: int
    heads: int
    depth: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocab, self.width)
        x = embed(tokens)
        for _ in range(self.depth):
            x = Block(self.width, self.heads)(x)
        return embed.attend(nn.RMSNorm()(x))


def loss(variables, model, tokens):
    log_p = jax.nn.log_softmax(model.apply(variables, tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))
