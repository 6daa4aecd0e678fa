"""Compiled programs: which custom calls there are, and what the backward pass keeps."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from cases import (
    CASES,
    KERNELS,
    OPS,
    WIDEST,
    Case,
    make_cotangents,
    make_operands,
    value_and_vjp,
)
from hlo import backward, compiled_text, custom_calls, forward, residuals
from jax import checkpoint_policies

import jax_mhc
from jax_mhc import presets

# Large enough that a value of n C numbers a token is told from K + 1 = 25 of them.
CASE = Case((6, 5), 4, 64)


@pytest.mark.parametrize("op", OPS)
def test_fused_ops_are_custom_calls(op):
    operands, cotangents = (make(op, CASE) for make in (make_operands, make_cotangents))
    run = functools.partial(OPS[op].run, config=presets.PAPER, implementation="fused")
    assert custom_calls(compiled_text(run, operands)) == forward(op)
    text = compiled_text(
        functools.partial(value_and_vjp, op, presets.PAPER, "fused"), operands, cotangents
    )
    assert custom_calls(text) == forward(op) + backward(op)


@pytest.mark.parametrize("op", OPS)
def test_the_platform_with_kernels_uses_them(op):
    """implementation=None is the fused op here."""
    operands = make_operands(op, CASE)
    run = functools.partial(OPS[op].run, config=presets.PAPER, implementation=None)
    assert custom_calls(compiled_text(run, operands)) == forward(op)


@pytest.mark.parametrize("op", OPS)
def test_reference_has_no_custom_call(op):
    operands = make_operands(op, CASE)
    run = functools.partial(OPS[op].run, config=presets.PAPER, implementation="reference")
    assert not custom_calls(compiled_text(run, operands))


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_data_is_one_call(op):
    """A mapped axis is one more axis of tokens, and no loop."""
    operands = make_operands(op, CASE)
    axes = {name: 0 if name in OPS[op].batched else None for name in operands}
    run = functools.partial(OPS[op].run, config=presets.PAPER, implementation="fused")
    text = compiled_text(jax.vmap(run, in_axes=(axes,)), operands)
    assert custom_calls(text) == forward(op)
    assert " while(" not in text


def model(x, params):
    """Two sublayers joined by the seam."""
    u, ctx = jax_mhc.pre(x, params[0], implementation="fused")
    u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, params[1], implementation="fused")
    return jax_mhc.post(jnp.tanh(u), ctx, implementation="fused")


def model_operands():
    params = tuple(make_operands("pre", CASE, draw=draw)["params"] for draw in range(2))
    return make_operands("pre", CASE)["x"], params


# The forward calls that the backward pass repeats, by the names of what it may keep.
REPEATED = {
    ("mhc_layer_input", "mhc_coefficients", "mhc_streams"): {},
    (): {"pre_fwd": 1, "post_pre_fwd": 1},
}


@pytest.mark.parametrize("names", REPEATED)
def test_named_values_are_not_computed_twice(names):
    x, params = model_operands()
    policy = checkpoint_policies.save_only_these_names(*names)

    def value_and_gradients(x, params, cotangent):
        outputs, pullback = jax.vjp(jax.checkpoint(model, policy=policy), x, params)
        return outputs, pullback(cotangent)

    once = {f"{call}_{way}": 1 for call in ("pre", "post_pre", "post") for way in ("fwd", "bwd")}
    # As handed to XLA, which on the CPU may merge what is computed twice.
    program = jax.jit(value_and_gradients).lower(x, params, x).as_text()
    calls = re.findall(r"custom_call @jax_mhc_(\w+)_v\d+", program)
    assert collections.Counter(calls) == collections.Counter(once) + collections.Counter(
        REPEATED[names]
    )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("op", KERNELS)
def test_backward_keeps_m_r_and_h_res_alone(op, static):
    """K + 1 numbers a token beside the operands, and h_res for the cotangent of the streams."""
    case = dataclasses.replace(CASE, static=static)
    n, tokens = case.streams, math.prod(case.tokens)
    run = functools.partial(OPS[op].run, config=presets.PAPER, implementation="fused")
    kept = sum(residuals(run, make_operands(op, case)))
    if op in ("post", "sinkhorn", "collapse"):
        assert kept == 0
    elif op == "head":
        assert kept == tokens * (n + 1)
    elif static:
        assert kept == tokens * (1 + n * n)  # r and h_res
    else:
        assert kept == tokens * (n * (n + 2) + 1 + n * n)


def test_a_sublayer_keeps_what_its_layer_keeps():
    """Beside its operands: what sin and post read, and the coefficients."""
    x, params = model_operands()

    # Not tanh: its gradient reads its own result, which `checkpoint_name` tells from the named y.
    def sublayer(x, params):
        return jax_mhc.mhc_residual(jnp.sin, x, params, implementation="fused")

    tokens, n = math.prod(CASE.tokens), CASE.streams
    kept = residuals(sublayer, x, params[0])
    # y for post, and cos(u) for sin.
    assert sum(size for size in kept if size >= tokens * CASE.hidden) == 2 * tokens * CASE.hidden
    coefficients = n * (n + 2) + 1 + n + n * n
    assert sum(size for size in kept if size < tokens * CASE.hidden) == tokens * coefficients


def sublayer(x, params):
    return jax_mhc.mhc_residual(jnp.tanh, x, params, implementation="fused")


def scan_of_sublayers(x, params):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(lambda x, params: (sublayer(x, params), None), x, stacked)[0]


def scan_of_seams(x, params):
    """A context in the carry."""

    def seam(carry, params):
        u, ctx = carry
        return jax_mhc.post_pre(jnp.tanh(u), ctx, params, implementation="fused"), None

    carry = jax_mhc.pre(x, params[0], implementation="fused")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    (u, ctx), _ = jax.lax.scan(seam, carry, stacked)
    return jax_mhc.post(jnp.tanh(u), ctx, implementation="fused")


def vjp_of(function):
    return lambda x, params, cotangent: jax.vjp(function, x, params)[1](cotangent)


def test_backward_of_sublayers_passes_over_the_streams_in_kernels_alone():
    """No op of its own adds to the gradient of X, or copies it."""
    x, params = model_operands()
    shape = ",".join(map(str, x.shape))
    for function, some in ((sublayer, params[0]), (model, params)):
        # The kernels add where the cotangent lies; that of a caller would be copied first.
        program = jax.jit(vjp_of(function), donate_argnums=2).lower(x, some, x)
        text = program.compile().as_text()
        makers = re.findall(rf"= f{8 * WIDEST.itemsize}\[{shape}\]\S* ([\w-]+)\(", text)
        assert makers.count("parameter") == 2
        assert set(makers) <= {"parameter", "get-tuple-element", "bitcast"}, makers


def kinds_of_cotangents(function, *arrays):
    """Backward calls that get the cotangent of their streams deferred, as handed to XLA."""
    program = jax.jit(function).lower(*arrays).as_text()
    found = re.findall(r"custom_call @jax_mhc_(\w+)_v\d+\(.*?deferred = (\d)", program)
    return {(call, bool(int(deferred))) for call, deferred in found}


BATCHED = functools.partial(jax.vmap, in_axes=(0, None))
FIRST_AXIS = functools.partial(jax.tree.map, lambda leaf: leaf[None])

DEFERRED = {
    "sublayers": model,
    "jit of each op": lambda x, params: jax.jit(jax_mhc.post)(
        *jax.jit(jax_mhc.post_pre)(*jax.jit(jax_mhc.pre)(x, params[0]), params[1])
    ),
    "scan": scan_of_sublayers,
    "scan of seams": scan_of_seams,
    "checkpoint": jax.checkpoint(scan_of_seams),
    "checkpoint in scan": lambda x, params: jax.lax.scan(
        jax.checkpoint(lambda x, params: (sublayer(x, params), None)), x, FIRST_AXIS(params[0])
    )[0],
    "vmap": BATCHED(model),
    "vmap of scan": BATCHED(scan_of_seams),
}


@pytest.mark.parametrize("name", DEFERRED)
def test_cotangents_of_streams_are_deferred(name):
    x, params = model_operands()
    found = kinds_of_cotangents(vjp_of(DEFERRED[name]), x, params, x)
    assert ("pre_bwd", True) in found
    assert found <= {("pre_bwd", True), ("post_pre_bwd", True)}


def test_cotangents_of_public_streams_are_not_deferred():
    x, (params, _) = model_operands()

    def streams(x, params):
        return jax_mhc.pre(x, params, implementation="fused")[1].x

    def both(x, params):
        u, ctx = jax_mhc.pre(x, params, implementation="fused")
        return jax_mhc.post(u, ctx, implementation="fused") + ctx.x

    def neither(x, params):
        u, _ = jax_mhc.pre(x, params, implementation="fused")
        return jnp.stack([u] * CASE.streams, axis=-2)

    for function in (streams, both, neither):
        assert kinds_of_cotangents(vjp_of(function), x, params, x) == {("pre_bwd", False)}


@pytest.mark.parametrize("case", ["one_stream", "sixteen_streams", "width_1", "static"])
def test_no_shape_falls_back(case):
    operands = make_operands("pre", CASES[case])
    run = functools.partial(OPS["pre"].run, config=presets.PAPER, implementation=None)
    assert custom_calls(compiled_text(run, operands)) == {"pre_fwd": 1}
