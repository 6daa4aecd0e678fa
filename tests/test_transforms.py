"""Every op under JAX's transformations, against plain JAX without them.

Expected values never pass through the transformation under test: they come from the plain-JAX op on
one element of the batch, or on one layer, at a time.
"""

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, OPS, Case, exact, in_float64, make_cotangents, make_operands, value_and_vjp
from jax import checkpoint_policies, export

import jax_mhc
from jax_mhc import presets
from jax_mhc._call import library

CASE = Case((3,), 4, 5, 3.0)
BATCH = 2
LAYERS = 3

# No test here has more layers, or adds up more elements of a batch.
assert_trees_close = functools.partial(
    cases.assert_trees_close, limit=cases.limit(CASE, layers=LAYERS)
)


def run(op, operands):
    return OPS[op].run(operands, CASE.config, "fused")


def vjp(op):
    """`(operands, cotangents) -> outputs, gradients` of the fused op."""
    return functools.partial(value_and_vjp, op, CASE.config, "fused")


def vjp_of(function):
    """The same for any function of the operands."""

    def outputs_and_gradients(operands, cotangents):
        outputs, pullback = jax.vjp(function, operands)
        return outputs, pullback(cotangents)[0]

    return outputs_and_gradients


def stack(elements):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *elements)


# Operands that are mapped; an op without parameters has one way only.
MAPPED = [
    (op, names)
    for op in OPS
    for names in {
        OPS[op].batched,
        tuple(OPS[op].operands),
        tuple(name for name in OPS[op].operands if name not in OPS[op].batched),
    }
    if names
]
MAPPED.sort()


@functools.cache
def batch(op: str, mapped: tuple[str, ...]) -> tuple[Any, Any, Any, Any]:
    """in_axes, operands with a leading axis on the mapped ones, cotangents, and what to expect.

    Expected are (outputs, gradients of each element), both stacked.
    """
    elements = [make_operands(op, CASE, draw=draw) for draw in range(BATCH)]
    for element in elements:
        element |= {name: elements[0][name] for name in element if name not in mapped}
    cotangents = [make_cotangents(op, CASE, draw=draw) for draw in range(BATCH)]
    expected = stack(
        [exact(op, CASE.config, *pair) for pair in zip(elements, cotangents, strict=True)]
    )
    stacked = stack(elements)
    operands = {name: (stacked if name in mapped else elements[0])[name] for name in stacked}
    axes = {name: 0 if name in mapped else None for name in stacked}
    return axes, operands, stack(cotangents), expected


def summed(gradients, mapped):
    """Gradients of shared operands are sums over the batch."""
    return {
        name: value if name in mapped else jax.tree.map(lambda leaf: leaf.sum(0), value)
        for name, value in gradients.items()
    }


# ---- vmap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op, mapped", MAPPED)
def test_gradient_of_vmap(op, mapped):
    axes, operands, cotangents, (outputs, gradients) = batch(op, mapped)
    function = jax.vmap(functools.partial(run, op), in_axes=(axes,))
    actual = jax.jit(vjp_of(function))(operands, cotangents)
    assert_trees_close(actual, (outputs, summed(gradients, mapped)))


def test_gradient_of_shared_streams_rounds_once():
    """The gradient is a sum over the batch; in bfloat16 each of these ones would be lost."""
    params = jax.vmap(lambda key: jax_mhc.init_params(key, streams=2, hidden=3))(
        jax.random.split(jax.random.key(0), 5)
    )

    def streams(x):
        return jax.vmap(lambda p: jax_mhc.pre(x, p, implementation="fused")[1].x)(params)

    x = jnp.ones((2, 3), jnp.bfloat16)
    cotangent = jnp.ones((5, 2, 3), jnp.bfloat16).at[0].set(256)
    (d_x,) = jax.vjp(streams, x)[1](cotangent)
    assert (d_x == 260).all()


@pytest.mark.parametrize("op, mapped", MAPPED)
def test_vmap_of_gradient(op, mapped):
    axes, operands, cotangents, expected = batch(op, mapped)
    assert_trees_close(
        jax.jit(jax.vmap(vjp(op), in_axes=(axes, 0)))(operands, cotangents), expected
    )


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_cotangents_alone(op):
    """The same as in jax.jacrev."""
    operands = make_operands(op, CASE)
    cotangents = [make_cotangents(op, CASE, draw=draw) for draw in range(BATCH)]
    expected = stack([exact(op, CASE.config, operands, ct)[1] for ct in cotangents])
    _, pullback = jax.vjp(functools.partial(run, op), operands)
    (gradients,) = jax.jit(jax.vmap(pullback))(stack(cotangents))
    assert_trees_close(gradients, expected)


@pytest.mark.parametrize("op", OPS)
def test_vmap_of_other_axes(op):
    """The last axis of every operand in, an inner axis of every result out."""
    mapped = tuple(OPS[op].operands)
    _, operands, _, (outputs, _) = batch(op, mapped)
    operands = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), operands)
    function = jax.vmap(functools.partial(run, op), in_axes=-1, out_axes=1)
    expected = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), outputs)
    assert_trees_close(jax.jit(function)(operands), expected)


@pytest.mark.parametrize("op", [op for op in OPS if "params" in OPS[op].operands])
def test_nested_vmap(op):
    """Every element of the data with every set of parameters, and the gradient of it all."""
    data = [make_operands(op, CASE, draw=draw) for draw in range(2)]
    params = [make_operands(op, CASE, draw=draw)["params"] for draw in range(2, 5)]
    cotangents = make_cotangents(op, CASE)
    table = [[exact(op, CASE.config, {**d, "params": p}, cotangents) for p in params] for d in data]
    outputs, gradients = stack([stack(row) for row in table])
    # A set of parameters meets all data, and the other way round.
    expected = {
        name: jax.tree.map(lambda leaf, axis=axis: leaf.sum(axis), value)
        for name, value in gradients.items()
        for axis in [0 if name == "params" else 1]
    }
    shared = {name: 0 if name != "params" else None for name in data[0]}
    inner = jax.vmap(functools.partial(run, op), in_axes=({**dict.fromkeys(shared), "params": 0},))
    function = jax.vmap(inner, in_axes=(shared,))
    everywhere = jax.tree.map(lambda ct: jnp.broadcast_to(ct, (2, 3, *ct.shape)), cotangents)
    operands = {**stack(data), "params": stack(params)}
    assert_trees_close(jax.jit(vjp_of(function))(operands, everywhere), (outputs, expected))


# ---- compilation --------------------------------------------------------------------------------


@pytest.fixture(params=OPS)
def problem(request):
    """An op, operands, cotangents, and the outputs and gradients to expect."""
    op = request.param
    arrays = make_operands(op, CASE), make_cotangents(op, CASE)
    return op, *arrays, exact(op, CASE.config, *arrays)


def test_without_jit(problem):
    op, operands, cotangents, expected = problem
    assert_trees_close(vjp(op)(operands, cotangents), expected)


def test_value_and_grad(problem):
    op, operands, cotangents, (outputs, gradients) = problem

    def loss(outputs):
        products = jax.tree.map(lambda o, ct: jnp.vdot(o, ct.astype(o.dtype)), outputs, cotangents)
        return jax.tree.reduce(jnp.add, products)

    value_and_grad = jax.jit(jax.value_and_grad(lambda operands: loss(run(op, operands))))
    assert_trees_close(value_and_grad(operands), (loss(outputs), gradients))


def test_ahead_of_time(problem):
    op, operands, cotangents, expected = problem
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (operands, cotangents)
    )
    executable = jax.jit(vjp(op)).lower(*shapes).compile()
    assert_trees_close(executable(operands, cotangents), expected)


def test_export(problem):
    """Serialised and read back, forward and backward."""
    op, operands, cotangents, (outputs, gradients) = problem
    leaves, structure = jax.tree.flatten(operands)
    targets = [
        library.target_name(f"{call}_{way}") for call in OPS[op].calls for way in ("fwd", "bwd")
    ]
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]

    @jax.jit
    def flat(*leaves):
        return jax.tree.leaves(run(op, jax.tree.unflatten(structure, leaves)))

    exported = export.export(flat, disabled_checks=checks)(*leaves)
    exported = export.deserialize(exported.serialize(vjp_order=1))
    assert_trees_close(exported.call(*leaves), jax.tree.leaves(outputs))
    _, pullback = jax.vjp(exported.call, *leaves)
    assert_trees_close(list(pullback(jax.tree.leaves(cotangents))), jax.tree.leaves(gradients))


def test_export_with_a_symbolic_batch(problem):
    """One program for every number of tokens."""
    op, operands, _, (outputs, _) = problem
    (tokens,) = export.symbolic_shape("tokens")

    def symbolic(name, leaf):
        shape = (tokens, *leaf.shape[1:]) if name in OPS[op].batched else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    shapes = {
        name: jax.tree.map(functools.partial(symbolic, name), value)
        for name, value in operands.items()
    }
    targets = [library.target_name(f"{call}_fwd") for call in OPS[op].calls]
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    exported = export.export(jax.jit(functools.partial(run, op)), disabled_checks=checks)(shapes)
    assert_trees_close(exported.call(operands), outputs)


def test_donation():
    x, params = (make_operands("pre", CASE)[name] for name in ("x", "params"))
    layer = functools.partial(jax_mhc.mhc_residual, jnp.tanh)
    expected = in_float64(functools.partial(layer, implementation="reference"), x, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(x, params):
        return layer(x, params, implementation="fused")

    x_new = step(x, params)
    assert x.is_deleted()
    assert_trees_close(x_new, expected)


# ---- layers -------------------------------------------------------------------------------------

NAMES = ("mhc_layer_input", "mhc_coefficients", "mhc_streams")
POLICIES = {
    "none": lambda function: function,
    "everything_saveable": checkpoint_policies.everything_saveable,
    "nothing_saveable": checkpoint_policies.nothing_saveable,
    "dots_saveable": checkpoint_policies.dots_saveable,
    **{name: checkpoint_policies.save_only_these_names(name) for name in NAMES},
    "all_names": checkpoint_policies.save_only_these_names(*NAMES),
}


def checkpointed(function, policy):
    return function if policy == "none" else jax.checkpoint(function, policy=POLICIES[policy])


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint(problem, policy):
    op, operands, cotangents, expected = problem
    function = vjp_of(checkpointed(functools.partial(run, op), policy))
    assert_trees_close(jax.jit(function)(operands, cotangents), expected)


def layers():
    """Streams, the parameters of three layers, stacked, and a cotangent."""
    x = make_operands("pre", CASE)["x"]
    params = [make_operands("pre", CASE, draw=draw)["params"] for draw in range(LAYERS)]
    return x, stack(params), make_operands("pre", CASE, draw=9)["x"]


def element(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def loop_of_layers(x, params, implementation):
    for index in range(LAYERS):
        x = jax_mhc.mhc_residual(jnp.tanh, x, element(params, index), implementation=implementation)
    return x


def loop_of_seams(x, params, implementation):
    options = {"implementation": implementation}
    u, ctx = jax_mhc.pre(x, element(params, 0), **options)
    for index in range(1, LAYERS):
        u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, element(params, index), **options)
    return jax_mhc.post(jnp.tanh(u), ctx, **options)


def scan_of_layers(x, params, implementation, policy="none"):
    def layer(x, params):
        return jax_mhc.mhc_residual(jnp.tanh, x, params, implementation=implementation), None

    return jax.lax.scan(checkpointed(layer, policy), x, params)[0]


def scan_of_seams(x, params, implementation, policy="none"):
    options = {"implementation": implementation}

    def seam(carry, params):
        u, ctx = carry
        return jax_mhc.post_pre(jnp.tanh(u), ctx, params, **options), None

    first, others = element(params, 0), element(params, slice(1, None))
    carry = jax_mhc.pre(x, first, **options)
    (u, ctx), _ = jax.lax.scan(checkpointed(seam, policy), carry, others)
    return jax_mhc.post(jnp.tanh(u), ctx, **options)


@functools.cache
def expected_of_layers():
    """Outputs and gradients of the loop in plain JAX."""
    return in_float64(plain_layers, *layers())


def plain_layers(x, params, cotangent):
    model = functools.partial(loop_of_layers, implementation="reference")
    outputs, pullback = jax.vjp(model, x, params)
    return outputs, *pullback(cotangent)


@pytest.mark.parametrize("policy", ["none", "nothing_saveable", "all_names"])
@pytest.mark.parametrize("scan", [scan_of_layers, scan_of_seams])
def test_scan_over_layers(scan, policy):
    x, params, cotangent = layers()

    @jax.jit
    def run(x, params, cotangent):
        model = functools.partial(scan, implementation="fused", policy=policy)
        outputs, pullback = jax.vjp(model, x, params)
        return outputs, *pullback(cotangent)

    assert_trees_close(run(x, params, cotangent), expected_of_layers())


@pytest.mark.parametrize("loop", [loop_of_layers, loop_of_seams])
def test_loop_over_layers(loop):
    x, params, cotangent = layers()

    @jax.jit
    def run(x, params, cotangent):
        outputs, pullback = jax.vjp(functools.partial(loop, implementation="fused"), x, params)
        return outputs, *pullback(cotangent)

    assert_trees_close(run(x, params, cotangent), expected_of_layers())


@pytest.mark.parametrize("scan", [scan_of_layers, scan_of_seams])
def test_composition(scan):
    """Gradient, under jit, of vmap over models and data of a scan over checkpointed layers."""
    x, params, cotangent = layers()
    model = functools.partial(scan, implementation="fused", policy="all_names")

    @jax.jit
    def run(x, params, cotangent):
        outputs, pullback = jax.vjp(jax.vmap(jax.vmap(model), in_axes=(0, None)), x, params)
        return outputs, *pullback(cotangent)

    # Two batches (outer) of one model (inner): the inner axis of x and params has length 1.
    def twice(leaf):
        return jnp.stack([leaf, -leaf])[:, None]

    outputs, d_x, d_params = run(twice(x), stack([params]), twice(cotangent))
    expected, expected_d_x, _ = expected_of_layers()
    assert_trees_close((outputs[0, 0], d_x[0, 0]), (expected, expected_d_x))
    pulled = [in_float64(plain_layers, sign * x, params, sign * cotangent) for sign in (1.0, -1.0)]
    assert_trees_close(d_x[1, 0], pulled[1][1])
    total = jax.tree.map(np.add, pulled[0][2], pulled[1][2])
    assert_trees_close(element(d_params, 0), total)


def test_per_example_gradients():
    """vmap of grad over tokens, with shared parameters: as for differential privacy."""
    operands = make_operands("mhc_residual", CASES["paper"])
    x, params = operands["x"].reshape(-1, *operands["x"].shape[-2:]), operands["params"]

    def loss(params, x, implementation):
        x = jax_mhc.mhc_residual(
            jnp.tanh, x, params, config=presets.PAPER, implementation=implementation
        )
        return jnp.sum(jnp.sin(x))

    def gradients(implementation):
        return jax.jit(jax.grad(functools.partial(loss, implementation=implementation)))

    actual = jax.jit(jax.vmap(gradients("fused"), in_axes=(None, 0)))(params, x)
    expected = stack([in_float64(gradients("reference"), params, token) for token in x])
    cases.assert_trees_close(actual, expected, cases.limit(CASES["paper"]))
