"""mHC in an Equinox model: one gradient step on a block of attention and MLP."""

import equinox as eqx
import jax
import jax.numpy as jnp

import jax_mhc as mhc
from jax_mhc.equinox import MHC, Head

C = 32


class SelfAttention(eqx.nn.MultiheadAttention):
    def __call__(self, u):
        return super().__call__(u, u, u)


class Model(eqx.Module):
    attention: MHC
    mlp: MHC
    head: Head

    def __init__(self, key):
        keys = jax.random.split(key)
        mlp = eqx.filter_vmap(eqx.nn.MLP(C, C, 4 * C, 1, jax.nn.gelu, key=keys[1]))
        # A connection makes a key of its own out of its layer's.
        self.attention = MHC(SelfAttention(4, C, key=keys[0]), C, norm=True, key=keys[0])
        self.mlp = MHC(mlp, C, norm=True, key=keys[1])
        self.head = Head(C, key=key)

    def __call__(self, u):  # of one example, [16, C]
        x = self.attention(mhc.expand(u, streams=4))  # in place of u + attention(norm(u))
        return self.head(self.mlp(x))


@eqx.filter_jit
def step(model, u):
    loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean((jax.vmap(m)(u) - 1) ** 2))(model)
    return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads)), loss


model, u = Model(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 16, C))
model, loss = step(model, u)
print(f"loss {loss:.4f}, after one step {step(model, u)[1]:.4f}")
