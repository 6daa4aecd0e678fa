"""Hy4 against stored results of transformers; tests/vectors/make_hy4.py says what they hold."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FLOAT64, WIDEST, Case, assert_close, limit

import jax_mhc
from jax_mhc import convert, presets

VECTORS = np.load(Path(__file__).parent / "vectors" / "hy4.npz")

# The largest logits, and hc_magnitude of Hy4's config.json.
CASES = {"unit": (1.0, 2.0), "peaked_6": (6.0, 2.0), "three_streams": (3.0, 1.5)}


def read(case, piece):
    """The arrays of one piece, or the inputs, by name."""
    prefix = f"{case}/{piece}/"
    return {k.removeprefix(prefix): VECTORS[k] for k in VECTORS.files if k.startswith(prefix)}


def connection(x, weights, **options):
    """`HYV4HyperConnection` with this package."""
    u, ctx = jax_mhc.pre(x, convert.from_hy4(*weights), **options)
    return {"collapsed": u, "post": ctx.h_post}


def layer(x, attn, ffn, **options):
    """The decoder layer of the vectors, whose second sublayer runs the post of the first."""
    x = jax_mhc.as_streams(x, implementation=options["implementation"])
    for function, weights in ((jnp.tanh, attn), (jnp.sin, ffn)):
        x = jax_mhc.mhc_residual(function, x, convert.from_hy4(*weights), **options)
    return {"out": x.array()}


def head(x, weights, **options):
    """`HYV4HyperHead` with this package."""
    return {"out": jax_mhc.head(x, convert.head_from_deepseek_v4(*weights), **options)}


# Each piece and the prefixes of its weights.
PIECES = {connection: [""], layer: ["", "ffn_"], head: ["hc_"]}


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("case", CASES)
def test_hy4_agrees_with_transformers(case, piece, implementation):
    sigma, magnitude = CASES[case]
    inputs, expected = read(case, "inputs"), read(case, piece.__name__)
    *tokens, n, hidden = inputs["x"].shape
    fused = implementation == "fused"
    largest = limit(Case(tuple(tokens), n, hidden, sigma), layers=2) if fused else FLOAT64
    dtype = WIDEST if fused else np.float64
    config = dataclasses.replace(presets.HY4, post_scale=magnitude)

    @jax.jit
    def run(arrays, cotangents):
        def of(arrays):
            weights = ([arrays[p + k] for k in ("fn", "base", "scale")] for p in PIECES[piece])
            return piece(arrays["x"], *weights, config=config, implementation=implementation)

        outputs, pullback = jax.vjp(of, arrays)
        return outputs, *pullback(cotangents)

    names = [k.removeprefix("d_") for k in expected if k.startswith("d_")]
    cotangents = {k.removeprefix("ct_"): v for k, v in expected.items() if k.startswith("ct_")}
    arrays = {name: inputs[name].astype(dtype) for name in names}
    outputs, gradients = run(arrays, {k: v.astype(dtype) for k, v in cotangents.items()})
    assert outputs.keys() == cotangents.keys()
    for name, value in outputs.items():
        assert_close(value, expected[name], largest, name)
    for name, value in gradients.items():
        assert_close(value, expected[f"d_{name}"], largest, f"d_{name}")


@pytest.mark.parametrize("case", CASES)
def test_conversion_is_exact_both_ways(case):
    inputs = read(case, "inputs")
    weights = [inputs[name] for name in ("fn", "base", "scale")]
    params = convert.from_hy4(*weights)
    assert params.alpha.shape == (2,)
    for there, back in zip(weights, convert.to_hy4(params), strict=True):
        np.testing.assert_array_equal(back, there)
