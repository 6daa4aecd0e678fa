"""Values of every op: against the oracle in float64, against plain JAX's own errors below that."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    ERROR_RATIO,
    FLOAT64,
    KERNELS,
    LEAST_ERROR,
    OP_CASES,
    OPS,
    PERMUTED,
    PRECISION_OP_CASES,
    WIDEST,
    Case,
    accumulation,
    assert_trees_close,
    compiled,
    evaluate,
    implemented,
    leaf_name,
    limit,
    make_cotangents,
    make_operands,
    rounding_errors,
    tolerance,
    variant,
    widened,
)

import jax_mhc
from jax_mhc import MHCParams, presets


@pytest.mark.parametrize("op, case", OP_CASES)
def test_agrees_with_the_oracle(op, case, implementation):
    fused = implementation == "fused"
    dtype = WIDEST if fused else np.dtype(np.float64)
    operands = widened(make_operands(op, CASES[case], dtype))
    expected = OPS[op].oracle(operands, CASES[case].config)
    outputs, _ = evaluate(op, case, implementation)
    largest = limit(CASES[case], gradient=False) if fused else FLOAT64
    assert_trees_close(outputs, expected, largest, dtype)


@pytest.mark.parametrize("op, case, dtype", PRECISION_OP_CASES)
def test_kernels_err_no_more_than_plain_jax(op, case, dtype):
    """Values and gradients; and plain JAX errs by no more than roundings."""
    errors = rounding_errors(op, case, dtype)
    for name, error in errors["reference"].items():
        assert error <= tolerance(CASES[case], dtype, gradient=name.startswith("d_")), name
        assert errors["fused"][name] <= max(ERROR_RATIO * error, LEAST_ERROR[dtype]), name


@pytest.mark.parametrize(
    "dtype, implementation", implemented("float32", "bfloat16", "float16", "float64")
)
@pytest.mark.parametrize("op", OPS)
def test_dtypes_of_results(op, dtype, implementation):
    dtype = jnp.dtype(dtype)
    operands = make_operands(op, CASES["paper"], dtype)
    run = functools.partial(OPS[op].run, config=presets.PAPER, implementation=implementation)
    wide = ("h_pre", "h_post", "h_res", "aux")
    for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(run, operands)):
        name = leaf_name(path)
        assert leaf.dtype == (accumulation(dtype) if name.endswith(wide) else dtype), name


# ---- peaked and extreme logits ------------------------------------------------------------------


@pytest.mark.parametrize("dtype, implementation", implemented("float32", "float64"))
def test_extreme_logits_stay_finite(dtype, implementation):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(1e4 * rng.choice([-1, 0, 1], size=(64, 4, 4)), dtype)
    cotangents = {"h_res": jnp.asarray(rng.normal(size=(64, 4, 4)), dtype)}
    outputs, gradients = compiled(
        "sinkhorn", presets.PAPER, implementation, {"logits": logits}, cotangents
    )
    h_res = outputs["h_res"]
    assert np.isfinite(gradients["logits"]).all()
    assert (h_res >= 0).all()
    eps = jnp.finfo(dtype).eps
    np.testing.assert_allclose(h_res.sum(-1), 1, rtol=4 * eps)
    # Columns converge slowly, but their sums add up.
    np.testing.assert_allclose(h_res.sum((-2, -1)), 4, rtol=8 * eps)


def test_logits_of_a_permutation_give_the_permutation(implementation):
    permutation = np.eye(4)[[2, 0, 3, 1]]
    for size in (60.0, 1e4, 1e30):
        logits = jnp.asarray(size * permutation, jnp.float32)
        h_res = jax_mhc.sinkhorn(logits, implementation=implementation)
        np.testing.assert_array_equal(np.asarray(h_res).round(20), permutation)


@pytest.mark.parametrize("case", ["peaked_3", "peaked_6", "peaked_10"])
def test_last_axis_sums_to_one(case, implementation):
    for order, axis in (("column_row", -1), ("row_column", -2)):
        logits = make_operands("sinkhorn", CASES[case])["logits"]
        h_res = jax_mhc.sinkhorn(logits, config=variant(order=order), implementation=implementation)
        np.testing.assert_allclose(h_res.sum(axis), 1, rtol=32 * jnp.finfo(WIDEST).eps)


@pytest.mark.parametrize("size", [1.0, 3.0, 6.0, 10.0, 1e4])
@pytest.mark.parametrize("streams", [2, 3, 4])
@pytest.mark.parametrize("dtype, implementation", implemented("float32", "bfloat16"))
def test_means_of_permutations_are_doubly_stochastic(dtype, implementation, streams, size):
    """To rounding, however peaked they are; and their gradients are finite."""
    case = Case((64,), streams, 16, size, PERMUTED)
    arrays = [make("pre", case, jnp.dtype(dtype)) for make in (make_operands, make_cotangents)]
    outputs, gradients = compiled("pre", PERMUTED, implementation, *arrays)
    h_res = outputs["ctx"].h_res
    assert (h_res >= 0).all()
    for axis in (-1, -2):
        np.testing.assert_allclose(h_res.sum(axis), 1, rtol=16 * jnp.finfo(h_res.dtype).eps)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


# ---- not a number -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "op, case",
    [
        *[(op, "many_tokens") for op in KERNELS],
        *[(op, "permutations_peaked_3") for op in ("pre", "post_pre")],
    ],
)
def test_bad_tokens_stay_alone(op, case, dtype, implementation):
    """Other tokens keep their bits, forward and backward; a bad one shows that it is bad."""
    case = CASES[case]
    operands = make_operands(op, case, jnp.dtype(dtype))
    cotangents = make_cotangents(op, case, jnp.dtype(dtype))
    data = next(name for name in ("x", "y", "logits") if name in operands)
    spoiled = dict(operands)
    others = np.ones(case.tokens, bool)
    for token, bad in {(0, 0, 3): np.nan, (0, 1, 66): np.inf, (1, 2, 40): -np.inf}.items():
        spoiled[data] = spoiled[data].at[(*token, ..., 0)].set(bad)
        others[token] = False

    def run(operands):
        outputs, gradients = compiled(op, case.config, implementation, operands, cotangents)
        return outputs, {name: gradients[name] for name in OPS[op].batched}

    kept = jax.tree.map(lambda leaf: np.asarray(leaf)[others], (run(operands), run(spoiled)))
    jax.tree.map(np.testing.assert_array_equal, *kept)
    outputs, _ = run(spoiled)
    finite = [
        np.isfinite(np.asarray(leaf, np.float32)).reshape(*case.tokens, -1).all(-1)
        for leaf in jax.tree.leaves(outputs)
    ]
    np.testing.assert_array_equal(np.all(finite, axis=0), others)


# ---- static coefficients ------------------------------------------------------------------------


def test_static_coefficients_are_those_of_a_phi_of_zeros(implementation):
    case = CASES["static"]
    operands = make_operands("pre", case)
    width, num = case.streams * case.hidden, operands["params"].bias.size
    dense = MHCParams(jnp.zeros((width, num), WIDEST), jnp.ones(3, WIDEST), operands["params"].bias)
    run = jax.jit(
        functools.partial(OPS["pre"].run, config=case.config, implementation=implementation)
    )
    results = run(operands), run(operands | {"params": dense})
    assert_trees_close(*results, limit(case, gradient=False))


# ---- 32-bit JAX ---------------------------------------------------------------------------------


def train_without_x64():
    """A few steps of gradient descent with each implementation; what users run by default."""
    assert not jax.config.jax_enable_x64
    params = jax_mhc.init_params(jax.random.key(0), streams=4, hidden=12)
    u, target = jax.random.normal(jax.random.key(1), (2, 5, 12))

    @functools.partial(jax.jit, static_argnums=1)
    def step(params, implementation):
        def loss(params):
            x = jax_mhc.expand(u, streams=4)
            for layer in (jnp.tanh, jnp.sin):
                x = jax_mhc.mhc_residual(layer, x, params, implementation=implementation)
            return jnp.mean((jax_mhc.reduce(x) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, d: p - 0.1 * d, params, gradients)

    losses = {}
    for implementation in ("fused", "reference"):
        trained, losses[implementation] = params, []
        for _ in range(5):
            value, trained = step(trained, implementation)
            assert value.dtype == jnp.float32
            losses[implementation].append(float(value))
    np.testing.assert_allclose(losses["fused"], losses["reference"], rtol=1e-5)
    assert losses["fused"][-1] < losses["fused"][0]


def test_without_x64():
    """In a process of its own: the setting is global, and all other tests have it on."""
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    subprocess.run([sys.executable, __file__], env=environment, check=True)


if __name__ == "__main__":
    train_without_x64()
