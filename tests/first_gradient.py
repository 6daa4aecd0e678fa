"""First gradient of a jax-mhc that is installed: `python first_gradient.py fused` or `plain`.

A release runs it where pip has just installed one of the wheels. The argument is what the wheel of
this platform brings: fused kernels, whose custom calls the compiled program has to hold, or plain
JAX.
"""

import argparse
import re

import jax
import jax.numpy as jnp

import jax_mhc as mhc


def calls():
    """Our custom calls in a compiled gradient, whose numbers are checked on the way."""
    params = mhc.init_params(jax.random.key(0), streams=4, hidden=64)
    u = jax.random.normal(jax.random.key(1), (8, 64))

    def loss(params, u):
        x = mhc.mhc_residual(jnp.tanh, mhc.expand(u, streams=4), params)
        return jnp.mean(jnp.square(mhc.reduce(x)))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, u).compile()
    _, d_u = gradient(params, u)
    # The initial parameters make the sublayer a plain residual one, which plain JAX can tell of.
    plain = jax.grad(lambda u: jnp.mean(jnp.square(u + jnp.tanh(u))))(u)
    error = float(jnp.abs(d_u - plain).max() / jnp.abs(plain).max())
    if not error < 1e-5:
        raise SystemExit(f"the gradient is {error:.1e} off that of a plain residual connection")
    return sorted(set(re.findall(r'custom_call_target="(jax_mhc_\w+)"', gradient.as_text())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("expected", choices=["fused", "plain"])
    expected = parser.parse_args().expected
    found = calls()
    if bool(found) != (expected == "fused"):
        raise SystemExit(f"expected a {expected} program, got one with the calls {found}")
    print(f"{mhc.__file__}: {expected}", *found)
