"""The bias of a layer's output in post: its values, its gradient, and what is rounded when."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, context, gain, layer_output, relative_error

import jax_mhc

CASE = Case((2, 65), 4, 33)
# Of results, and of gradients.
ERRORS = {"float32": (1e-6, 1e-5), "bfloat16": (2.0**-8, 1e-5), "float64": (1e-14, 1e-13)}


def operands(dtype):
    rng = np.random.default_rng(0)
    y, bias = layer_output(CASE, rng, dtype), gain(CASE, rng, dtype)
    return jnp.asarray(y), jax.tree.map(jnp.asarray, context(CASE, rng, dtype)), jnp.asarray(bias)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_values_and_gradients(dtype, implementation):
    """Of the bias too: beside bfloat16 streams it is not the sum of rounded d_y."""
    y, ctx, bias = operands(jnp.dtype(dtype))
    wide = {k: np.asarray(v, np.float64) for k, v in vars(ctx).items() if v is not None}
    x_new, pullback = jax.vjp(
        lambda y, bias: jax_mhc.post(y, ctx, bias=bias, implementation=implementation), y, bias
    )
    biased = np.asarray(y, np.float64) + np.asarray(bias, np.float64)
    exact = oracle.post(biased, wide["x"], wide["h_post"], wide["h_res"])
    largest, of_gradients = ERRORS[dtype]
    assert x_new.dtype == dtype and relative_error(x_new, exact) <= largest
    if dtype == "bfloat16":  # A y + bias that was rounded would leave a third of them elsewhere.
        assert np.mean(np.asarray(x_new) == exact.astype(jnp.bfloat16)) > 0.999
    ct = jnp.asarray(np.random.default_rng(1).normal(size=x_new.shape), dtype)
    d_y, d_bias = pullback(ct)
    d_wide_y = np.einsum("...i,...ic->...c", wide["h_post"], np.asarray(ct, np.float64))
    assert d_y.dtype == dtype and relative_error(d_y, d_wide_y) <= max(largest, of_gradients)
    assert relative_error(d_bias, d_wide_y.sum((0, 1))) <= of_gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_sublayer(dtype):
    """Whose pre takes the cotangent of its streams deferred where it runs in a kernel."""
    y, ctx, bias = operands(jnp.dtype(dtype))
    params = jax.tree.map(jnp.asarray, cases.params(CASE, np.random.default_rng(2), np.float32))

    def run(implementation):
        def loss(x, params, bias):
            u, ctx = jax_mhc.pre(x, params, implementation=implementation)
            x_new = jax_mhc.post(jnp.tanh(u), ctx, bias=bias, implementation=implementation)
            return jnp.sum(jnp.sin(x_new.astype(jnp.float32)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(ctx.x, params, bias)

    kernels, plain = run(None), run("reference")
    largest = 1e-5 if dtype == "float32" else 2.0**-6
    for own, other in zip(*map(jax.tree.leaves, (kernels, plain)), strict=True):
        assert own.dtype == other.dtype and relative_error(own, other) <= largest


def test_no_kernel_takes_a_bias_beside_half_precision():
    y, ctx, bias = operands(jnp.bfloat16)
    with pytest.raises(ValueError, match="jax_mhc.post: implementation='fused': expected no bias"):
        jax_mhc.post(y, ctx, bias=bias, implementation="fused")
