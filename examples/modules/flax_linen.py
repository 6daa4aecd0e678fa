"""mHC in a Flax Linen model: one gradient step on a block of attention and MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import jax_mhc as mhc
from jax_mhc.flax.linen import MHC, Head

C = 32


class Model(nn.Module):
    @nn.compact
    def __call__(self, u):
        x = mhc.expand(u, streams=4)
        x = MHC(nn.MultiHeadDotProductAttention(4), C, norm=True)(x)  # u + attention(norm(u))
        x = MHC(nn.Sequential([nn.Dense(4 * C), nn.gelu, nn.Dense(C)]), C, norm=True)(x)
        return Head(C)(x)


@jax.jit
def step(params, u):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((model.apply(p, u) - 1) ** 2))(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


model, u = Model(), jax.random.normal(jax.random.key(1), (2, 16, C))
params, loss = step(jax.jit(model.init)(jax.random.key(0), u), u)
print(f"loss {loss:.4f}, after one step {step(params, u)[1]:.4f}")
