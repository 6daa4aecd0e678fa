"""Peaked logits, and offsets of whole rows and columns: values and gradients of every variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, compiled, variant

import jax_mhc
from jax_mhc import presets

N = 4
# The smallest number of float32.
TINY = float(np.finfo(np.float32).smallest_subnormal)


def oracle(z, config):
    """The projection in float64, or in complex numbers.

    Without eps its first iteration is in logarithms. What is smaller than float32's numbers after
    that, or with eps after the softmax, is zero for good.
    """
    first, second = (-2, -1) if config.order == "column_row" else (-1, -2)
    eps = config.sinkhorn_eps

    def softmax(log, axis):
        log = log - log.real.max(axis, keepdims=True)
        return log - np.log(np.exp(log).sum(axis, keepdims=True))

    def matrix_of(log):
        return np.where(log.real < np.log(TINY), 0, np.exp(log))

    def normalized(matrix, axis):
        total = matrix.sum(axis, keepdims=True)
        if config.sinkhorn_eps_mode == "add":
            return matrix / (total + eps)
        return matrix / np.where(total.real < eps, eps, total)

    if config.sinkhorn_iters == 0:
        return np.exp(z)
    log = softmax(z, first)
    if eps == 0:
        matrix = matrix_of(softmax(log, second))
    else:
        matrix = matrix_of(log) + (eps if config.sinkhorn_eps_mode == "add" else 0)
        matrix = normalized(matrix, second)
    for _ in range(1, config.sinkhorn_iters):
        matrix = normalized(normalized(matrix, first), second)
    return matrix


def value_and_gradient(z, cotangents, config):
    """Both in float64, the gradient by complex steps, which cancel no digits."""
    step = 1e-30
    steps = step * np.eye(N * N).reshape(N * N, N, N)
    moved = oracle(z[:, None] + 1j * steps, config)
    gradient = np.sum(cotangents[:, None] * moved.imag, (-2, -1)) / step
    return oracle(z, config), gradient.reshape(z.shape)


def peaked(rng):
    """Normal logits, and large ones that are equal or so far apart that float32 has no doubt."""
    return [sigma * rng.normal(size=(8, N, N)) for sigma in (1, 3, 6, 10)] + [
        size * rng.choice([-1, 0, 1], (8, N, N)) for size in (200, 1000)
    ]


def offset(rng):
    """A row, a column, or both, of equal logits of any size beside others of size 1."""
    matrices = []
    for size in (4e2, 1e4, 1e6, 1e9):
        for signed in (size, -size):
            for rows, columns in (((1,), ()), ((), (2,)), ((0,), (1,)), ((0, 2), ()), ((), (0, 3))):
                z = rng.normal(size=(N, N))
                z[list(rows)] = signed
                z[:, list(columns)] = signed / 2 if rows else signed
                matrices.append(z)
    return np.stack(matrices)


VARIANTS = {
    "no_iterations": variant(sinkhorn_iters=0),
    "one_iteration": variant(sinkhorn_iters=1, order="row_column"),
    "paper": presets.PAPER,
    "many_iterations": variant(sinkhorn_iters=200, order="row_column"),
    "add_one_iteration": variant(sinkhorn_iters=1, order="row_column", sinkhorn_eps=1e-6),
    "add": presets.DEEPSEEK_V4,
    "clamp_one_iteration": variant(sinkhorn_iters=1, sinkhorn_eps=1e-6, sinkhorn_eps_mode="clamp"),
    "clamp": presets.MEGATRON,
    "clamp_many_iterations": variant(
        sinkhorn_iters=200, sinkhorn_eps=1e-6, sinkhorn_eps_mode="clamp"
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_peaked_and_offset_logits(name, implementation):
    config, rng = VARIANTS[name], np.random.default_rng(0)
    # Without iterations large logits overflow.
    logits = peaked(rng)[:2] if name == "no_iterations" else [*peaked(rng), offset(rng)]
    z = np.concatenate(logits).astype(np.float32)
    cotangents = rng.normal(size=z.shape).astype(np.float32)
    arrays = {"logits": jnp.asarray(z)}, {"h_res": jnp.asarray(cotangents)}
    outputs, gradients = compiled("sinkhorn", config, implementation, *arrays)
    wanted, d_wanted = value_and_gradient(z.astype(np.float64), cotangents, config)
    assert_close(outputs["h_res"], wanted, 5e-6, "h_res")
    assert_close(gradients["logits"], d_wanted, 5e-6, "d_logits")


def test_offsets_of_any_size_stay_finite(implementation):
    """Beyond 2^31 the logits beside an offset of their group are lost, and it is still a mean."""
    z = np.zeros((4, 3, N, N), np.float32)
    for of_size, size in zip(z, (-1e12, 1e20, -1e30, 1e38), strict=True):
        of_size[:, 0] = size
        of_size[1, 1:] = np.arange(N) * 100
        of_size[2, 1:] = np.arange(N) * size / 7
    arrays = {"logits": jnp.asarray(z)}, {"h_res": jnp.ones_like(z)}
    outputs, gradients = compiled("sinkhorn", presets.PAPER, implementation, *arrays)
    np.testing.assert_allclose(outputs["h_res"].sum(-1), 1, rtol=1e-6)
    assert np.isfinite(gradients["logits"]).all()


def hessian(config, cotangent):
    """Of <h_res, cotangent>: forward mode through reverse mode."""

    def loss(z):
        h_res = jax_mhc.sinkhorn(z, config=config, implementation="reference")
        return jnp.sum(cotangent * h_res)

    return jax.hessian(loss)


@pytest.mark.parametrize("mode, eps", [("add", 0.0), ("add", 0.05), ("clamp", 0.4)])
def test_plain_jax_has_derivatives_of_second_order(mode, eps):
    config = variant(sinkhorn_iters=3, sinkhorn_eps=eps, sinkhorn_eps_mode=mode)
    rng = np.random.default_rng(0)
    z, cotangent = 2 * rng.normal(size=(N, N)), rng.normal(size=(N, N))

    actual = jax.jit(hessian(config, cotangent))(z)
    # Central differences of the gradient, whose error is about the square of the step.
    step = 1e-5
    moved = z + step * np.concatenate([directions := np.eye(N * N).reshape(-1, N, N), -directions])
    _, gradients = value_and_gradient(moved, np.broadcast_to(cotangent, moved.shape), config)
    forward, backward = np.split(gradients, 2)
    wanted = ((forward - backward) / (2 * step)).reshape(N, N, N, N)
    assert_close(actual, np.moveaxis(wanted, (0, 1), (2, 3)), 1e-8)


def test_every_derivative_of_clamped_logits_is_finite():
    """A derivative with respect to M would be divided by eps in every iteration."""
    z = jnp.asarray([[95.0, 0, 0], [95, 0, 0], [0, 95, 0]], jnp.float32)
    assert np.isfinite(jax.jit(hessian(presets.MEGATRON, jnp.ones_like(z)))(z)).all()
