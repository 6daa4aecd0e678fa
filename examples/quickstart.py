"""mHC in a plain jax.jit training loop: a deep MLP learns a function of its input."""

import jax
import jax.numpy as jnp

import jax_mhc as mhc

STREAMS, HIDDEN, DEPTH, BATCH = 4, 64, 6, 256


def layer(v, w):
    """One layer of the network: v [batch, hidden] -> [batch, hidden]."""
    w_in, w_out = w
    return jnp.tanh(v @ w_in) @ w_out


def forward(weights, u):
    """Run the residual network: u [batch, hidden] -> [batch, hidden]."""
    layers, connections = weights
    x = mhc.expand(u, streams=STREAMS)
    # The plain residual network would say, for each w in a jax.lax.scan: x = x + layer(x, w)
    x = mhc.stack([layer], x, [connections], xs=layers)
    return mhc.reduce(x)


@jax.jit
def train_step(weights, u, target):
    """One step of gradient descent; `weights` is an ordinary pytree."""
    loss, grads = jax.value_and_grad(lambda w: jnp.mean((forward(w, u) - target) ** 2))(weights)
    return jax.tree.map(lambda w, g: w - 0.3 * g, weights, grads), loss


@jax.vmap
def init(key):
    """Weights of a layer, and parameters of the hyper-connection around it."""
    w_in, w_out = 0.1 * jax.random.normal(key, (2, HIDDEN, HIDDEN))
    return (w_in, w_out), mhc.init_params(key, streams=STREAMS, hidden=HIDDEN)


weights = init(jax.random.split(jax.random.key(0), DEPTH))
for step in range(201):
    u = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (BATCH, HIDDEN))
    weights, loss = train_step(weights, u, jnp.sin(2 * jnp.roll(u, 1, axis=-1)))
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss:.4f}")
