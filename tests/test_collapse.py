"""The call behind ops whose hidden width is split, on one device: test_mesh.py has the ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, PLATFORM, accumulation

from jax_mhc._call import library
from jax_mhc._call.primitive import bind
from jax_mhc._call.table import Call

FORWARD, BACKWARD = Call("collapse_fwd"), Call("collapse_bwd")


def operands(tokens, streams, hidden, dtype):
    """Streams, h_pre and d_u."""
    rng = np.random.default_rng(0)
    wide = accumulation(dtype)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    x, d_u = normal(tokens, streams, hidden), normal(tokens, hidden)
    return x, normal(tokens, streams, dtype=wide), d_u


def run(x, h_pre, d_u):
    library.ensure_registered(PLATFORM)
    u = bind(FORWARD, {"x": x, "h_pre": h_pre})["u"]
    return u, bind(BACKWARD, {"x": x, "d_u": d_u})["d_h_pre"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, streams, hidden",
    [(1, 1, 1), (7, 2, 37), (13, 3, 64), (131, 4, 1000), (5, 8, 24), (17, 16, 129), (0, 4, 64)],
)
def test_it_agrees_with_float64(tokens, streams, hidden, dtype):
    given = operands(tokens, streams, hidden, dtype)
    u, d_h_pre = jax.jit(run)(*given)
    assert u.shape == (tokens, hidden) and u.dtype == dtype
    assert d_h_pre.shape == (tokens, streams) and d_h_pre.dtype == given[1].dtype
    x, h_pre, d_u = (np.asarray(value, np.float64) for value in given)
    # Of the result, and of sums that are in float32 at least.
    rounding, wide = (float(jnp.finfo(array.dtype).eps) for array in (u, given[1]))
    size = np.einsum("tn,tnc->tc", abs(h_pre), abs(x))
    error = abs(np.einsum("tn,tnc->tc", h_pre, x) - np.asarray(u, np.float64))
    assert np.all(error <= (rounding + wide * np.sqrt(streams)) * size)
    size = np.einsum("tc,tnc->tn", abs(d_u), abs(x))
    error = abs(np.einsum("tc,tnc->tn", d_u, x) - np.asarray(d_h_pre, np.float64))
    assert np.all(error <= wide * (1 + np.sqrt(hidden)) * size)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_keeps_to_itself(value):
    """Neither values that are no numbers nor how many tokens there are reach others."""
    given = operands(13, 4, 100, DTYPES[0])
    before = jax.jit(run)(*given)
    x, h_pre, d_u = given
    after = jax.jit(run)(x.at[5, 2, 3].set(value), h_pre, d_u)
    some = jax.jit(run)(*(array[:5] for array in given))
    for one, other, part in zip(before, after, some, strict=True):
        np.testing.assert_array_equal(np.delete(one, 5, 0), np.delete(other, 5, 0))
        assert not np.all(np.isfinite(other[5]))
        np.testing.assert_array_equal(one[:5], part)
