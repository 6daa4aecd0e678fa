"""Gradients of every op: against plain JAX in float64, and against finite differences.

tests/test_values.py compares their errors in lower precision, together with those of values.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    OP_CASES,
    OPS,
    WIDEST,
    assert_trees_close,
    evaluate,
    expected,
    in_float64,
    limit,
    make_cotangents,
    make_operands,
)
from jax.test_util import check_grads

import jax_mhc
from jax_mhc import presets
from jax_mhc._types import Context


@pytest.mark.parametrize("op, case", OP_CASES)
def test_kernels_agree_with_plain_jax(op, case):
    assert_trees_close(evaluate(op, case, "fused"), expected(op, case), limit(CASES[case]))


# Finite differences judge both from outside, where logits are smooth enough for them.
CHECKED = ("three_streams", "peaked_3", "deepseek_v4", "megatron", "unconstrained", "identity",
           "static", "large_eps", "eps_outside", "clamp", "permutations",
           "permutations_three_streams")  # fmt: skip


@pytest.mark.cpu("finite differences need kernels for float64")
@pytest.mark.parametrize("op, case", [(op, case) for op, case in OP_CASES if case in CHECKED])
def test_finite_differences(op, case):
    run = jax.jit(lambda operands: OPS[op].run(operands, CASES[case].config, "fused"))
    operands = make_operands(op, CASES[case])
    # The error of a central difference is about eps ** 2, and about roundoff / eps.
    check_grads(run, (operands,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


# ---- what a caller may do with a context --------------------------------------------------------

OPTIONS = {"config": presets.PAPER}


def no_post(o, options):
    u, _ = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    return jnp.sin(u)


def one_post(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    return jax_mhc.post(jnp.tanh(u), ctx, **options)


def two_posts(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    posts = [jax_mhc.post(layer(u), ctx, **options) for layer in (jnp.tanh, jnp.sin)]
    return posts[0] * posts[1]


def post_and_seam(o, options):
    """Both read the same context."""
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    x_new = jax_mhc.post(jnp.tanh(u), ctx, **options)
    u, ctx = jax_mhc.post_pre(jnp.sin(u), ctx, o["params"], **OPTIONS, **options)
    return x_new * jax_mhc.post(jnp.sin(u), ctx, **options)


def seam_without_post(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    return jax_mhc.post_pre(jnp.tanh(u), ctx, o["params"], **OPTIONS, **options)[0]


def every_field(o, options):
    """A loss on the coefficients beside the new streams, as for a penalty or a plot."""
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    x_new = jax_mhc.post(jnp.tanh(u), ctx, **options)
    penalty = jnp.sum(jnp.sin(ctx.h_pre)) + jnp.sum(ctx.h_post**2) + jnp.sum(jnp.cos(ctx.h_res))
    return x_new + penalty + jnp.sin(ctx.x)


def one_field(o, options):
    _, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    return jnp.cos(ctx.h_res)


def streams_alone(o, options):
    _, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    return jnp.sin(ctx.x)


def same_parameters_twice(o, options):
    x = o["x"]
    for layer in (jnp.tanh, jnp.sin):
        x = jax_mhc.mhc_residual(layer, x, o["params"], **OPTIONS, **options)
    return x


def every_field_and_seam(o, options):
    """The same after a seam."""
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, o["params"], **OPTIONS, **options)
    x_new = jax_mhc.post(jnp.tanh(u), ctx, **options)
    return x_new * jnp.sin(ctx.x) + jnp.sum(jnp.cos(ctx.h_res))


def streams_after_a_seam(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    _, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, o["params"], **OPTIONS, **options)
    return jnp.sin(ctx.x)


def replaced_h_res(o, options):
    """One post with what pre returned, one with another mixing matrix."""
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    other = dataclasses.replace(ctx, h_res=jnp.sin(3 * ctx.h_res))
    return jax_mhc.post(u, ctx, **options) * jax_mhc.post(jnp.tanh(u), other, **options)


def replaced_h_res_and_seam(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    ctx = dataclasses.replace(ctx, h_res=jnp.sin(3 * ctx.h_res))
    u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, o["params"], **OPTIONS, **options)
    return jax_mhc.post(jnp.tanh(u), ctx, **options)


def replaced_streams(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    ctx = dataclasses.replace(ctx, x=ctx.x * jnp.cos(ctx.x))
    return jax_mhc.post(jnp.tanh(u), ctx, **options)


def no_gradient_of_streams(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    ctx = dataclasses.replace(ctx, x=jax.lax.stop_gradient(ctx.x))
    return jax_mhc.post(jnp.tanh(u), ctx, **options)


def no_gradient_of_a_context(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    return jax_mhc.post(jnp.tanh(u), jax.lax.stop_gradient(ctx), **options)


def made_by_hand(o, options):
    x = o["x"]
    h_post = jnp.tanh(x[..., 0].astype(o["params"].bias.dtype))
    ctx = Context(x=x, h_pre=h_post, h_post=h_post, h_res=h_post[..., None] * h_post[..., None, :])
    u, ctx = jax_mhc.post_pre(jnp.sin(x[..., 0, :]), ctx, o["params"], **OPTIONS, **options)
    return jax_mhc.post(jnp.tanh(u), ctx, **options)


def across_jit(o, options):
    u, ctx = jax.jit(functools.partial(jax_mhc.pre, **OPTIONS, **options))(o["x"], o["params"])
    return jax.jit(functools.partial(jax_mhc.post, **options))(jnp.tanh(u), ctx)


def across_checkpoint(o, options):
    pre = jax.checkpoint(functools.partial(jax_mhc.pre, **OPTIONS, **options))
    u, ctx = pre(o["x"], o["params"])
    return jax.checkpoint(functools.partial(jax_mhc.post, **options))(jnp.tanh(u), ctx)


def across_vmap(o, options):
    pre = functools.partial(jax_mhc.pre, **OPTIONS, **options)
    u, ctx = jax.vmap(pre, in_axes=(0, None))(o["x"], o["params"])
    return jax.vmap(functools.partial(jax_mhc.post, **options))(jnp.tanh(u), ctx)


def across_scan(o, options):
    """In the carry, with and without a look at the streams."""

    def seam(carry, gain):
        u, ctx = carry
        u, ctx = jax_mhc.post_pre(gain * jnp.tanh(u), ctx, o["params"], **OPTIONS, **options)
        return (u, ctx), jnp.sin(ctx.x) if look else None

    total = 0.0
    for look in (True, False):
        carry = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
        (u, ctx), seen = jax.lax.scan(seam, carry, jnp.arange(1, 3, dtype=o["x"].dtype))
        total += jax_mhc.post(u, ctx, **options) + (jnp.sum(seen, axis=0) if look else 0)
    return total


def across_cond(o, options):
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    branches = (
        lambda u, ctx: jax_mhc.post(jnp.tanh(u), ctx, **options),
        lambda u, ctx: jnp.sin(ctx.x),
    )
    return sum(jax.lax.switch(index, branches, u, ctx) for index in jnp.arange(2))


def parts_of_a_context(o, options):
    """Some tokens of it, and all of them in another shape."""
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    first, others = (
        jax.tree.map(lambda leaf, some=some: leaf[some], (u, ctx))
        for some in (slice(None, 2), slice(2, None))
    )
    posts = [jax_mhc.post(jnp.tanh(u), ctx, **options) for u, ctx in (first, others)]
    u, ctx = jax.tree.map(lambda leaf: leaf[None], (u, ctx))
    return jnp.concatenate(posts) * jax_mhc.post(jnp.sin(u), ctx, **options)[0]


def other_implementation_of_post(o, options):
    """A context may come from either implementation."""
    u, ctx = jax_mhc.pre(o["x"], o["params"], **OPTIONS, **options)
    u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, o["params"], implementation="reference", **OPTIONS)
    x_new = jax_mhc.post(jnp.tanh(u), ctx, **options)
    u, ctx = jax_mhc.pre(x_new, o["params"], **OPTIONS, **options)
    return jax_mhc.post(jnp.tanh(u), ctx, **options) * jax_mhc.post(
        u, ctx, implementation="reference"
    )


USES = [
    no_post, one_post, two_posts, post_and_seam, seam_without_post, every_field,
    every_field_and_seam, streams_after_a_seam, one_field, streams_alone, same_parameters_twice,
    replaced_h_res, replaced_h_res_and_seam, replaced_streams, no_gradient_of_streams,
    no_gradient_of_a_context, made_by_hand, across_jit, across_checkpoint, across_vmap,
    across_scan, across_cond, parts_of_a_context, other_implementation_of_post,
]  # fmt: skip


@functools.cache
def program_of(use, implementation):
    """One for all dtypes: what is exact is compiled once."""

    def loss(operands):
        return jnp.sum(use(operands, {"implementation": implementation}))

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("dtype", sorted({"float32", WIDEST.name}))
@pytest.mark.parametrize("use", USES)
def test_uses_of_a_context(use, dtype):
    operands = make_operands("pre", CASES["peaked_3"], jnp.dtype(dtype))
    exact = in_float64(program_of(use, "reference"), operands)
    largest = limit(CASES["peaked_3"], dtype=jnp.dtype(dtype), layers=4)
    assert_trees_close(program_of(use, "fused")(operands), exact, largest, jnp.dtype(dtype))


@pytest.mark.parametrize("op", OPS)
def test_each_operand_alone(op):
    """JAX hands zeros to the rules of what is not differentiated."""
    operands, cotangents = (make(op, CASES["paper"]) for make in (make_operands, make_cotangents))
    _, gradients = expected(op, "paper")
    for name in operands:

        def run(operand, name=name):
            return OPS[op].run({**operands, name: operand}, presets.PAPER, "fused")

        (gradient,) = jax.vjp(run, operands[name])[1](cotangents)
        assert_trees_close(gradient, gradients[name], limit(CASES["paper"]))


def test_gradients_of_integers_and_constants_are_not_asked_for():
    """A layer with integer inputs, such as token ids, and a loss that ignores the streams."""
    operands = make_operands("pre", CASES["paper"])
    table = jnp.asarray(np.random.default_rng(0).normal(size=(7, CASES["paper"].hidden)), WIDEST)
    ids = jnp.arange(6).reshape(CASES["paper"].tokens) % 7

    def loss(x, params, implementation):
        x = jax_mhc.mhc_residual(lambda u: u * table[ids], x, params, implementation=implementation)
        return jnp.sum(jax.lax.stop_gradient(x)) + jnp.sum(params.bias**2)

    for implementation in ("fused", "reference"):
        d_x, d_params = jax.grad(loss, (0, 1))(operands["x"], operands["params"], implementation)
        assert not d_x.any()
        assert not d_params.phi.any()
        np.testing.assert_array_equal(d_params.bias, 2 * operands["params"].bias)
