"""The presets against other implementations: stored results of transformers, and the oracle.

tests/vectors/make_deepseek_v4.py says what the vectors hold.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import FLOAT64, WIDEST, Case, assert_close, implemented, limit, relative_error

import jax_mhc
from jax_mhc import convert, presets

VECTORS = np.load(Path(__file__).parent / "vectors" / "deepseek_v4.npz")
CASES = sorted({name.split("/")[0] for name in VECTORS.files if "/" in name})

# The order of the operands of each piece.
OPERANDS = {
    "connection": ("x", "fn", "base", "scale"),
    "layer": ("x", "fn", "base", "scale", "ffn_fn", "ffn_base", "ffn_scale"),
    "head": ("x", "hc_fn", "hc_base", "hc_scale"),
}


def read(case, piece):
    """The arrays of one piece, or the inputs, by name."""
    prefix = f"{case}/{piece}/"
    return {k.removeprefix(prefix): VECTORS[k] for k in VECTORS.files if k.startswith(prefix)}


def largest_error(case):
    """Error that the kernels may make in two sublayers."""
    *tokens, n, hidden = read(case, "inputs")["x"].shape
    sigma = float(case.removeprefix("peaked_")) if case.startswith("peaked_") else 1.0
    return limit(Case(tuple(tokens), n, hidden, sigma), layers=2)


def operands(case, piece, dtype=np.float64):
    """The operands of a piece, in its order."""
    arrays = read(case, "inputs")
    return [arrays[name].astype(dtype) for name in OPERANDS[piece]]


def connection(x, fn, base, scale, *, implementation):
    """`DeepseekV4HyperConnection` with this package."""
    params = convert.from_deepseek_v4(fn, base, scale)
    u, ctx = jax_mhc.pre(x, params, config=presets.DEEPSEEK_V4, implementation=implementation)
    return {"collapsed": u, "post": ctx.h_post, "comb": ctx.h_res.mT}


def layer(x, *arrays, implementation):
    """The decoder layer of the vectors with this package; the seam joins its sublayers."""
    attn, ffn = (convert.from_deepseek_v4(*arrays[i : i + 3]) for i in (0, 3))
    options = {"config": presets.DEEPSEEK_V4, "implementation": implementation}
    u, ctx = jax_mhc.pre(x, attn, **options)
    u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, ffn, **options)
    return {"out": jax_mhc.post(jnp.sin(u), ctx, implementation=implementation)}


def head(x, hc_fn, hc_base, hc_scale, *, implementation):
    """`DeepseekV4HyperHead` with this package."""
    params = convert.head_from_deepseek_v4(hc_fn, hc_base, hc_scale)
    config = presets.DEEPSEEK_V4
    return {"out": jax_mhc.head(x, params, config=config, implementation=implementation)}


PIECES = {"connection": connection, "layer": layer, "head": head}


@pytest.mark.parametrize("case", CASES)
def test_oracle_agrees_with_transformers(case):
    inputs = {name: value.astype(np.float64) for name, value in read(case, "inputs").items()}
    x = inputs["x"]
    for piece, name in (("connection", ""), ("layer", "ffn_")):
        weights = [inputs[name + key] for key in ("fn", "base", "scale")]
        result = oracle.deepseek_v4(x, *weights)
        if piece == "connection":
            expected = read(case, piece)
            for output in ("collapsed", "post", "comb"):
                assert_close(getattr(result, output), expected[output], FLOAT64, output)
        y = np.tanh(result.collapsed) if piece == "connection" else np.sin(result.collapsed)
        x = oracle.deepseek_v4_post(y, x, result.post, result.comb)
    assert_close(x, read(case, "layer")["out"], FLOAT64, "layer")
    exit_weights = [inputs["hc_" + key] for key in ("fn", "base", "scale")]
    result = oracle.deepseek_v4_head(inputs["x"], *exit_weights)
    assert_close(result, read(case, "head")["out"], FLOAT64, "head")


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("case", CASES)
def test_deepseek_v4_agrees_with_transformers(case, piece, implementation):
    expected = read(case, piece)
    fused = implementation == "fused"
    dtype, largest = (WIDEST, largest_error(case)) if fused else (np.float64, FLOAT64)

    @jax.jit
    def run(arrays, cotangents):
        outputs, vjp = jax.vjp(
            lambda *args: PIECES[piece](*args, implementation=implementation), *arrays
        )
        return outputs, vjp(cotangents)

    cotangents = {
        name.removeprefix("ct_"): value.astype(dtype)
        for name, value in expected.items()
        if name.startswith("ct_")
    }
    outputs, gradients = run(operands(case, piece, dtype), cotangents)
    assert outputs.keys() == cotangents.keys()
    for name, value in outputs.items():
        assert_close(value, expected[name], largest, name)
    for name, value in zip(OPERANDS[piece], gradients, strict=True):
        assert_close(value, expected[f"d_{name}"], largest, f"d_{name}")


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_close_to_float64_as_transformers(case, piece, implementation):
    exact, other = read(case, piece), read(case, f"{piece}_float32")
    arrays = operands(case, piece, np.float32)
    outputs = jax.jit(lambda *args: PIECES[piece](*args, implementation=implementation))(*arrays)
    for name, value in outputs.items():
        assert value.dtype == jnp.float32
        # Both errors are a few roundings of few numbers: below that their ratio is left to chance.
        limit = 1.5 * relative_error(other[name], exact[name]) + 4 * np.finfo(np.float32).eps
        assert_close(value, exact[name], limit, name)


@pytest.mark.parametrize("piece", ["connection", "head"])
@pytest.mark.parametrize("case", CASES)
def test_conversion_is_exact_both_ways(case, piece):
    weights = operands(case, piece, np.float32)[1:]
    if piece == "connection":
        params = convert.from_deepseek_v4(*weights)
        for there, back in zip(weights, convert.to_deepseek_v4(params), strict=True):
            np.testing.assert_array_equal(back, there)
    else:
        params = convert.head_from_deepseek_v4(*weights)
        np.testing.assert_array_equal(params.phi, weights[0].T)
        np.testing.assert_array_equal(params.bias, weights[1])
        np.testing.assert_array_equal(params.alpha, weights[2])


def megatron_weights(rng, streams, hidden, sigma):
    """weight [K, nC], alpha [3] and bias [K] for logits of standard deviation sigma."""
    num = streams * (streams + 2)
    spread = sigma / np.sqrt(2)
    weight = rng.normal(size=(num, streams * hidden)) / np.sqrt(streams * hidden)
    return weight, spread * rng.uniform(0.9, 1.1, 3), spread * rng.normal(size=num)


@pytest.mark.parametrize("dtype, implementation", implemented("float32", "float64"))
@pytest.mark.parametrize("sigma", [1, 3, 6, 10])
@pytest.mark.parametrize("streams, hidden", [(4, 9), (2, 33)])
def test_megatron_agrees_with_the_oracle(streams, hidden, sigma, dtype, implementation):
    rng = np.random.default_rng(sigma)
    x = rng.normal(size=(2, 3, streams, hidden))
    weights = megatron_weights(rng, streams, hidden, sigma)

    def run(x, *weights):
        params = convert.from_megatron(*weights)
        u, ctx = jax_mhc.pre(x, params, config=presets.MEGATRON, implementation=implementation)
        return u, ctx.h_pre, ctx.h_post, ctx.h_res

    arrays = [array.astype(dtype) for array in (x, *weights)]
    expected = oracle.megatron(*(array.astype(np.float64) for array in arrays))
    largest = FLOAT64 if dtype == "float64" else 1e-5
    for name, value in zip(oracle.Pre._fields, jax.jit(run)(*arrays), strict=True):
        assert value.dtype == dtype
        assert_close(value, getattr(expected, name), largest, name)


def test_peaked_logits_tell_the_presets_apart():
    rng = np.random.default_rng(0)
    logits = 6 * rng.normal(size=(64, 4, 4))
    variants = (presets.PAPER, presets.DEEPSEEK_V4, presets.MEGATRON)
    results = [oracle.sinkhorn(logits, config) for config in variants]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert np.abs(one - other).max() > 0.05
