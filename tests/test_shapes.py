"""Random shapes, dtypes and settings: the kernels against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import (
    OPS,
    Case,
    assert_trees_close,
    exact,
    in_float64,
    limit,
    make_cotangents,
    make_operands,
    quick,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_mhc import MHCConfig

configs = st.builds(
    MHCConfig,
    constraint=st.sampled_from(["birkhoff", "birkhoff", "none", "identity"]),
    sinkhorn_iters=st.integers(0, 30),
    sinkhorn_eps=st.sampled_from([0.0, 1e-6, 0.1]),
    sinkhorn_eps_mode=st.sampled_from(["add", "clamp"]),
    order=st.sampled_from(["column_row", "row_column"]),
    norm_eps=st.sampled_from([0.0, 1e-6, 0.5]),
    norm_eps_mode=st.sampled_from(["inside", "outside"]),
    pre_eps=st.sampled_from([0.0, 1e-6, 0.5]),
    post_scale=st.sampled_from([0.5, 1.0, 2.0]),
    post_eps=st.sampled_from([0.0, 1e-6, 0.5]),
)
cases = st.builds(
    Case,
    tokens=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    streams=st.integers(1, 16),
    hidden=st.integers(1, 70),
    sigma=st.sampled_from([0.5, 1.0, 3.0, 6.0]),
    config=configs,
    static=st.booleans(),
)


def applies(op, case):
    return op != "sinkhorn" or case.config.constraint == "birkhoff"


@settings(max_examples=25)
@given(op=st.sampled_from(sorted(OPS)), case=cases)
@example(op="pre", case=Case((), 1, 1))
@example(op="post_pre", case=Case((0,), 16, 1))
def test_agrees_with_plain_jax(op, case):
    if not applies(op, case):
        case = Case(case.tokens, case.streams, case.hidden, case.sigma)
    arrays = make_operands(op, case), make_cotangents(op, case)
    results = quick(op, case.config, "fused", *arrays)
    assert_trees_close(results, exact(op, case.config, *arrays), limit(case))


@settings(max_examples=15)
@given(
    op=st.sampled_from(sorted(OPS)),
    case=cases,
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_any_dtype_is_close_to_float64(op, case, dtype):
    """Coarse, for any shape and setting in any dtype; test_values.py compares errors."""
    if not applies(op, case):
        case = Case(case.tokens, case.streams, case.hidden, case.sigma)
    operands = make_operands(op, case, jnp.dtype(dtype))
    fused, plain = (
        jax.jit(functools.partial(OPS[op].run, config=case.config, implementation=implementation))
        for implementation in ("fused", "reference")
    )
    outputs, expected = fused(operands), in_float64(plain, operands)
    atol = 16 * float(jnp.finfo(dtype).eps) * max(1.0, case.sigma)
    for leaf, wanted in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        scale = np.abs(wanted).max(initial=0.0) or 1.0
        np.testing.assert_allclose(
            np.asarray(leaf, np.float64) / scale, wanted / scale, rtol=0, atol=atol
        )
