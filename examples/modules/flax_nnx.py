"""mHC in a Flax NNX model: one gradient step on a block of attention and MLP."""

import jax
import jax.numpy as jnp
from flax import nnx

import jax_mhc as mhc
from jax_mhc.flax.nnx import MHC, Head

C = 32


class Model(nnx.Module):
    def __init__(self, rngs):
        attention = nnx.MultiHeadAttention(4, C, decode=False, rngs=rngs)
        mlp = nnx.Sequential(
            nnx.Linear(C, 4 * C, rngs=rngs), nnx.gelu, nnx.Linear(4 * C, C, rngs=rngs)
        )
        self.attention = MHC(attention, C, norm=True, rngs=rngs)
        self.mlp = MHC(mlp, C, norm=True, rngs=rngs)
        self.head = Head(C, rngs=rngs)

    def __call__(self, u):
        x = self.attention(mhc.expand(u, streams=4))  # in place of u + attention(norm(u))
        return self.head(self.mlp(x))


@nnx.jit
def step(model, u):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(u) - 1) ** 2))(model)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads))
    return loss


model, u = Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 16, C))
print(f"loss {step(model, u):.4f}, after one step {step(model, u):.4f}")
