"""Every op on meshes of devices, of every kind, against one device."""

import dataclasses
import functools

import cases
import jax
import pytest
from cases import exact, make_cotangents, make_operands
from meshes import (
    CASE,
    LAYOUTS,
    SUMS,
    K,
    both,
    collectives,
    expected,
    forward,
    make_mesh,
    rows,
    spread,
    where,
)
from test_hlo import custom_calls

import jax_mhc
from jax_mhc import presets

pytestmark = pytest.mark.mesh

assert_trees_close = functools.partial(cases.assert_trees_close, limit=cases.limit(CASE, layers=2))


@functools.cache
def problem(op, case=CASE):
    """Operands, cotangents, and the outputs and gradients to expect."""
    arrays = make_operands(op, case), make_cotangents(op, case)
    return *arrays, exact(op, case.config, *arrays)


def check_collectives(mode, found, limits):
    """None of another kind, and none larger."""
    if mode == "explicit, auto":
        return  # XLA gathers, as a warning says
    if mode == "manual, explicit" and jax.__version_info__ < (0, 12):
        return  # jax.numpy.sin alone gathers there
    for kind, (_, size) in found.items():
        assert size <= limits.get(kind, 0), (found, limits)


@pytest.mark.parametrize("mode, layout", rows())
@pytest.mark.parametrize("op", SUMS)
def test_every_layout(op, mode, layout):
    operands, cotangents, (outputs, gradients) = problem(op)
    layout, mesh = LAYOUTS[layout], make_mesh(mode)
    with jax.set_mesh(mesh):
        forward_limits, limits = expected(op, mode, layout, mesh)
        function, placed = spread(
            functools.partial(both, op), mode, layout, mesh,
            (operands, cotangents), (outputs, gradients),
        )  # fmt: skip
        compiled = jax.jit(function).lower(*placed).compile()
        results = compiled(*placed)
        check_collectives(mode, collectives(compiled.as_text()), limits)
        assert_trees_close(results, (outputs, gradients))

        function, placed = spread(
            functools.partial(forward, op), mode, layout, mesh, (operands,), outputs
        )
        text = jax.jit(function).lower(*placed).compile().as_text()
        check_collectives(mode, collectives(text), forward_limits)
        calls = custom_calls(text)
        assert all(calls[f"{call}_fwd"] for call in cases.OPS[op].calls), calls


# ---- settings, where C is split -----------------------------------------------------------------

SETTINGS = {
    "norm": {"norm": True},
    "static": {"static": True},
    "static with norm": {"static": True, "norm": True},
    "peaked": {"sigma": 10.0},
    "no streams mix": {"config": cases.variant(constraint="identity")},
    "unconstrained": {"config": cases.variant(constraint="none")},
    "deepseek_v4": {"config": presets.DEEPSEEK_V4, "norm": True},
    "megatron": {"config": presets.MEGATRON},
    "large eps": {
        "config": cases.variant(norm_eps=0.5, norm_eps_mode="outside", pre_eps=0.25, post_scale=0.7)
    },
    "no tokens": {"tokens": (0, 8)},
    "one stream": {"streams": 1},
    "three streams": {"streams": 3, "hidden": 10},
    "sixteen streams": {"streams": 16, "hidden": 6},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", ["auto", "explicit", "manual"])
def test_every_setting_with_split_channels(mode, setting):
    case = dataclasses.replace(CASE, **SETTINGS[setting])
    layout, mesh = LAYOUTS["batch and hidden"], make_mesh(mode)
    with jax.set_mesh(mesh):
        for op in ("two_sublayers", "head"):
            if op == "head" and (case.norm or case.static):
                continue
            operands, cotangents, wanted = problem(op, case)
            run = functools.partial(both, op, config=case.config)
            function, placed = spread(run, mode, layout, mesh, (operands, cotangents), wanted)
            assert_trees_close(jax.jit(function)(*placed), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["pre", "post_pre", "head"])
def test_rounding_where_channels_are_split(op, dtype):
    """Not above what one device may err by."""
    dtype = jax.numpy.dtype(dtype)
    case = dataclasses.replace(CASE, hidden=512)
    operands, cotangents = (make(op, case, dtype) for make in (make_operands, make_cotangents))
    wanted = exact(op, case.config, operands, cotangents)
    layout, mesh = LAYOUTS["batch and hidden"], make_mesh("auto")
    run = functools.partial(both, op)
    function, placed = spread(run, "auto", layout, mesh, (operands, cotangents), wanted)
    results = jax.jit(function, compiler_options=cases.AS_WRITTEN)(*placed)
    for (path, got), want in zip(
        jax.tree.leaves_with_path(results), jax.tree.leaves(wanted), strict=True
    ):
        limit = cases.limit(case, dtype=dtype)
        cases.assert_close(got, want, limit, cases.leaf_name(path))


# ---- transformations ----------------------------------------------------------------------------

LAYERS = 2


def residual(x, params, weights, **options):
    """One sublayer."""
    first = jax.tree.map(lambda leaf: leaf[0], params)
    layer = functools.partial(elementwise, s=weights[0])
    return jax_mhc.mhc_residual(layer, x, first, **options)


def elementwise(u, s):
    """A layer that works however u lies: the products of real ones add all-reduces of their own."""
    return jax.numpy.tanh(s * u)


def stack(x, params, weights, **options):
    """Blocks of two sublayers in a scan."""
    layers = [elementwise, lambda u, s: jax.numpy.sin(s * u)]
    return jax_mhc.stack(layers, x, [params, params], xs=weights, **options)


def saved(x, params, weights, **options):
    policy = jax.checkpoint_policies.save_only_these_names("mhc_layer_input", "mhc_coefficients")
    return jax.checkpoint(functools.partial(residual, **options), policy=policy)(x, params, weights)


def scan_of_sublayers(x, params, weights, **options):
    def block(x, slices):
        p, s = slices
        layer = functools.partial(elementwise, s=s)
        return jax_mhc.mhc_residual(layer, x, p, **options), None

    return jax.lax.scan(block, x, (params, weights))[0]


def mapped(x, params, weights, **options):
    """jax.vmap over the batch."""
    return jax.vmap(lambda x: residual(x, params, weights, **options))(x)


def mapped_stack(x, params, weights, **options):
    return jax.vmap(lambda x: stack(x, params, weights, **options))(x)


def mapped_weights(x, params, weights, **options):
    """Parameters of its own for every element of the batch."""
    bias = params.bias[0] + x[:, 0, 0, :1]
    p = jax.tree.map(lambda leaf: leaf[0], params)

    def one(x, bias):
        own = dataclasses.replace(p, bias=bias)
        layer = functools.partial(elementwise, s=weights[0])
        return jax_mhc.mhc_residual(layer, x, own, **options)

    return jax.vmap(one)(x, bias)


PROGRAMS = {
    "sublayer": residual,
    "stack": stack,
    "recomputed stack": functools.partial(stack, keep_streams_every=2),
    "checkpoint": saved,
    "scan": scan_of_sublayers,
    "vmap": mapped,
    "vmap of stack": mapped_stack,
}


@functools.cache
def layers():
    x = make_operands("pre", CASE)["x"]
    params = [make_operands("pre", CASE, draw=draw)["params"] for draw in range(LAYERS)]
    weights = jax.numpy.linspace(0.5, 1.0, LAYERS, dtype=x.dtype)
    return x, jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *params), weights


@functools.cache
def exact_layers(program):
    run = functools.partial(PROGRAMS[program], implementation="reference")
    return cases.in_float64(gradients(run), *layers())


def gradients(run):
    def value_and_gradients(x, params, weights, **options):
        outputs, pullback = jax.vjp(functools.partial(run, **options), x, params, weights)
        return outputs, *pullback(jax.numpy.cos(outputs))

    return value_and_gradients


@pytest.mark.parametrize(
    "layout", ["batch over two axes", "batch and sequence", "batch and hidden"]
)
@pytest.mark.parametrize("mode", ["auto", "explicit", "manual", "manual, explicit"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_transformations(program, mode, layout):
    layout, mesh = LAYOUTS[layout], make_mesh(mode)
    wanted = exact_layers(program)

    def run(x, params, weights, hidden_axis_name=None):
        options = {"implementation": "fused", **where(hidden_axis_name)}
        function = functools.partial(PROGRAMS[program], **options)
        return gradients(function)(x["x"], params, weights)

    x, params, weights = layers()
    with jax.set_mesh(mesh):
        results = ({"x": wanted[0]}, {"x": wanted[1]}, *wanted[2:])
        named = lambda *arrays, **options: named_results(run(*arrays, **options))  # noqa: E731
        function, placed = spread(named, mode, layout, mesh, ({"x": x}, params, weights), results)
        compiled = jax.jit(function).lower(*placed).compile()
        outputs = compiled(*placed)
    limit = cases.limit(CASE, layers=4)
    cases.assert_trees_close(outputs, results, limit)
    found = collectives(compiled.as_text())
    assert sum(custom_calls(compiled.as_text()).values()) >= 4
    if mode == "manual, explicit" and jax.__version_info__ < (0, 12):
        return
    # No array of streams, whole or in part, is sent.
    kinds = {"all-reduce", "all-gather"} if layout.hidden else {"all-reduce"}
    assert set(found) <= kinds, found
    streams = layout.tokens(mesh) * CASE.streams * layout.channels(mesh)
    gathered = found.get("all-gather", (0, 0))[1]
    whole = CASE.streams * CASE.hidden * K
    assert gathered % whole == 0 and gathered < 8 * whole, (found, streams)


def named_results(results):
    outputs, d_x, *others = results
    return ({"x": outputs}, {"x": d_x}, *others)
