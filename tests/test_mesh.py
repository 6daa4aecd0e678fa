"""Every op on meshes of devices, of every kind, against one device."""

import dataclasses
import functools
import math

import cases
import jax
import pytest
from cases import exact, make_cotangents, make_operands
from collectives import collectives
from hlo import custom_calls
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    CASE,
    LAYOUTS,
    SUMS,
    K,
    both,
    expected,
    forward,
    make_mesh,
    rows,
    spread,
    where,
)

import jax_mhc
from jax_mhc import presets
from jax_mhc._mesh import auto

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


# The calls of the delayed schedule are those of other ops: one layout tells of their sums.
ROWS = [
    (op, mode, layout)
    for op in SUMS
    for mode, layout in rows()
    if op != "delayed" or layout == "batch and hidden"
]


@pytest.mark.parametrize("op, mode, layout", ROWS)
def test_every_layout(op, mode, layout):
    operands, cotangents, (outputs, gradients) = problem(op)
    layout = LAYOUTS[layout]
    mesh = make_mesh(mode, layout)
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
    "permutations": {"config": cases.PERMUTED, "sigma": 3.0},
    "deepseek_v4": {"config": presets.DEEPSEEK_V4, "norm": True},
    "megatron": {"config": presets.MEGATRON},
    "large eps": {
        "config": cases.variant(
            norm_eps=0.5, norm_eps_mode="outside", pre_eps=0.25, post_scale=0.7, post_eps=0.125
        )
    },
    "no tokens": {"tokens": (0, 8)},
    "one stream": {"streams": 1},
    "three streams": {"streams": 3, "hidden": 10},
    "sixteen streams": {"streams": 16, "hidden": 6},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", ["auto", "explicit", "manual"])
def test_every_setting_with_split_channels(mode, setting):
    if (setting, mode) == ("no tokens", "manual") and jax.__version_info__[:2] == (0, 11):
        pytest.skip("XLA of jaxlib 0.11 crashes where an array without values leaves a shard_map")
    case = dataclasses.replace(CASE, **SETTINGS[setting])
    layout = LAYOUTS["batch and hidden"]
    mesh = make_mesh(mode, layout)
    with jax.set_mesh(mesh):
        for op in ("two_sublayers", "head", "delayed"):
            if op == "head" and (case.norm or case.static):
                continue
            if op == "delayed" and setting != "norm":
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
    layout = LAYOUTS["batch and hidden"]
    mesh = make_mesh("auto", layout)
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
    """A layer for any sharding of u: the products of real ones add all-reduces of their own."""
    return jax.numpy.tanh(s * u)


def stack(x, params, weights, **options):
    """Blocks of two sublayers in a scan."""
    layers = [elementwise, lambda u, s: jax.numpy.sin(s * u)]
    return jax_mhc.stack(layers, x, [params, params], xs=weights, **options)


def static_stack(x, params, weights, **options):
    params = dataclasses.replace(params, phi=None, alpha=None)
    options |= {"recompute": jax_mhc.Recompute(every=2, policy="mhc")}
    return stack(x, params, weights, **options)


def delayed_stack(x, params, weights, **options):
    x = jax_mhc.as_streams(x, **options)
    x = stack(x, params, weights, config=presets.DEEPSEEK_V41, **options)
    options.pop("hidden_axis_name", None)
    u = jax_mhc.collapse(x, implementation=options["implementation"])
    return x.array(**options) * jax.numpy.expand_dims(u, -2)


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
    "recomputed stack": functools.partial(stack, recompute=jax_mhc.Recompute(every=2)),
    "static stack, recomputed": static_stack,
    "delayed stack": delayed_stack,
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


# One layout tells of the delayed schedule, whose carry is that of any other stack.
PROGRAM_ROWS = [
    (program, mode, layout)
    for program in PROGRAMS
    for mode in ("auto", "explicit", "manual", "manual, explicit")
    for layout in ("batch over two axes", "batch and sequence", "batch and hidden")
    if program != "delayed stack" or layout == "batch and hidden"
]


@pytest.mark.parametrize("program, mode, layout", PROGRAM_ROWS)
def test_transformations(program, mode, layout):
    layout = LAYOUTS[layout]
    mesh = make_mesh(mode, layout)
    wanted = exact_layers(program)

    def run(x, params, weights, hidden_axis_name=None):
        options = {"implementation": "fused", **where(hidden_axis_name)}
        function = functools.partial(PROGRAMS[program], **options)
        return gradients(function)(x["x"], params, weights)

    x, params, weights = layers()
    with jax.set_mesh(mesh):
        results = ({"x": wanted[0]}, {"x": wanted[1]}, *wanted[2:])

        def named(*arrays, **options):
            return named_results(run(*arrays, **options))

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
    # Gathered are gradients of phi: of every sublayer, and with jax.vmap of every element.
    gathered, whole = found.get("all-gather", (0, 0))[1], CASE.streams * CASE.hidden * K
    elements = CASE.tokens[0] // math.prod(mesh.shape[axis] for axis in layout.batch)
    assert gathered % whole == 0
    assert gathered <= 2 * LAYERS * whole * (elements if "vmap" in program else 1), found


def named_results(results):
    outputs, d_x, *others = results
    return ({"x": outputs}, {"x": d_x}, *others)


# ---- what cannot be, and what is brought to where it must be ------------------------------------


def pre_of(x, params, **options):
    return jax_mhc.pre(x, params, implementation="fused", **options)[0]


def placed_pre(mode, x_spec, params_specs=None):
    """Streams and parameters on a mesh."""
    mesh, operands = make_mesh(mode, LAYOUTS["hidden"]), make_operands("pre", CASE)
    params = operands["params"]

    def put(leaf, spec):
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    specs = params_specs or dict.fromkeys(("phi", "alpha", "bias"), P())
    params = dataclasses.replace(
        params, **{name: put(getattr(params, name), spec) for name, spec in specs.items()}
    )
    return mesh, put(operands["x"], x_spec), params


def test_split_streams_are_refused_where_they_were_named():
    mesh, x, params = placed_pre("explicit", P(None, None, "b"))
    message = (
        r"jax_mhc.pre: x: expected streams \[..., n, C\] whose n is not split over devices, got"
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jax.jit(pre_of)(x, params)


@pytest.mark.parametrize("op", SUMS)
def test_streams_that_xla_splits_are_gathered(op, caplog):
    """A constraint with too few names: what a model does to streams that it takes for channels."""
    operands, cotangents, wanted = problem(op)
    mesh = make_mesh("auto")

    def split(leaf):
        # Of streams n, of others whatever lies there.
        splits = leaf.ndim >= 3 and leaf.shape[-2] % 2 == 0
        spec = P(*[None] * (leaf.ndim - 2), "b") if splits else P()
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    auto._warn_of_streams.cache_clear()
    with caplog.at_level("WARNING", logger="jax_mhc"):
        for _ in range(2):
            split_first = jax.jit(lambda *arrays: both(op, *jax.tree.map(split, arrays)))
            actual = split_first(operands, cotangents)
    assert_trees_close(actual, wanted)
    warnings = [record.getMessage() for record in caplog.records if record.name == "jax_mhc"]
    has_streams = op != "sinkhorn"
    assert len(warnings) == has_streams
    assert not has_streams or "mesh axes ('b',)" in warnings[0]


def test_split_streams_on_manual_axes_are_refused():
    """Streams of one device have a shape that does not fit the parameters."""
    mesh, x, params = placed_pre("manual", P())
    spec = P(None, None, "b")
    function = jax.shard_map(pre_of, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    with pytest.raises(ValueError, match=r"jax_mhc.pre: params.bias: expected shape \[8\]"):
        jax.jit(function)(x, params)


@pytest.mark.parametrize("spec", [P("a"), P(("a", "b")), P(None, "b"), P("a", "b")])
@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_split_parameters_are_gathered(mode, spec):
    """Rows, as fully sharded training has them, or columns; gradients are sharded alike."""
    operands, cotangents, wanted = problem("pre")
    mesh, x, params = placed_pre(mode, P("a"), {"phi": spec, "alpha": P(), "bias": P("b")})
    cotangents = jax.device_put(cotangents, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        cotangents = jax.tree.map(
            lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P("a"))), cotangents
        )
        run = jax.jit(functools.partial(both, "pre"))
        outputs, gradients = run({"x": x, "params": params, "norm_scale": None}, cotangents)
    assert_trees_close((outputs, gradients), wanted)
    if mode == "explicit":
        assert gradients["params"].phi.sharding.is_equivalent_to(params.phi.sharding, 2)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_streams_and_output_that_are_sharded_differently(mode):
    """On auto axes XLA brings one to the other; explicit axes are for those who want to know."""
    operands, _, wanted = problem("post")
    if jax.device_count() < 4:
        pytest.skip("needs two axes of two devices")
    mesh = make_mesh(mode)
    shardings = {"ctx": NamedSharding(mesh, P("a")), "y": NamedSharding(mesh, P("b"))}
    placed = {name: jax.device_put(operands[name], shardings[name]) for name in shardings}
    run = jax.jit(functools.partial(forward, "post"))
    with jax.set_mesh(mesh):
        if mode == "auto":
            assert_trees_close(run(placed), wanted[0])
        else:
            with pytest.raises(ValueError, match=r"jax_mhc.post: y: expected .*reshard"):
                run(placed)


def test_a_mesh_that_does_not_divide_the_tokens():
    """XLA pads what it splits by itself; padding must not enter sums over tokens."""
    case = dataclasses.replace(CASE, tokens=(8 + 3,))
    operands, cotangents, wanted = problem("pre", case)
    mesh = make_mesh("auto")
    x = jax.device_put(operands["x"][:8], NamedSharding(mesh, P(("a", "b"))))

    def run(x, rest, params, cotangents):
        x = jax.numpy.concatenate([x, rest])
        return both("pre", {"x": x, "params": params, "norm_scale": None}, cotangents)

    with jax.set_mesh(mesh):
        results = jax.jit(run)(x, operands["x"][8:], operands["params"], cotangents)
    assert_trees_close(results, wanted)


def test_channels_split_by_hand_need_the_kernels():
    mesh, x, params = placed_pre("manual", P())
    run = functools.partial(jax_mhc.pre, implementation="reference", hidden_axis_name="b")
    spec = P(None, None, None, "b")
    function = jax.shard_map(
        lambda *a: run(*a)[0], mesh=mesh, in_specs=(spec, P()), out_specs=P(None, None, "b")
    )
    with pytest.raises(ValueError, match="jax_mhc.pre: hidden_axis_name: expected None where"):
        jax.jit(function)(x, params)


def test_channels_split_by_hand_without_a_word():
    """Parameters do not fit; with fitting ones it would be another function."""
    mesh, x, params = placed_pre("manual", P())
    spec = P(None, None, None, "b")
    function = jax.shard_map(pre_of, mesh=mesh, in_specs=(spec, P()), out_specs=P(None, None, "b"))
    with pytest.raises(ValueError, match=r"jax_mhc.pre: params.phi: expected shape \[128, 24\]"):
        jax.jit(function)(x, params)


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_without_jit(mode):
    """Each op is compiled for all devices by itself."""
    operands, _, wanted = problem("two_sublayers")
    mesh = make_mesh(mode)
    placed = jax.tree.map(
        lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)),
        operands, LAYOUTS["batch"].specs(operands),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        assert_trees_close(forward("two_sublayers", placed), wanted[0])


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.mark.cpu("Orbax does not know how parameters are sharded")
@pytest.mark.parametrize("restored_spec", [P(), P("a"), P(("b", "a"))])
def test_checkpoints_of_split_parameters(restored_spec, tmp_path):
    """Saved as fully sharded training has them, restored with other shardings, bit for bit."""
    ocp = pytest.importorskip("orbax.checkpoint")
    mesh, x, params = placed_pre(
        "auto", P("a"), {"phi": P(("a", "b")), "alpha": P(), "bias": P("b")}
    )
    expected = jax.jit(pre_of)(x, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype,
                sharding=NamedSharding(mesh, restored_spec if leaf.ndim == 2 else P()),
            ),
            params,
        )  # fmt: skip
        restored = checkpointer.restore(tmp_path / "params", wanted)
    assert isinstance(restored, jax_mhc.MHCParams)
    assert restored.phi.sharding.spec == restored_spec
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        assert (jax.device_get(one) == jax.device_get(other)).all()
    assert (jax.device_get(jax.jit(pre_of)(x, restored)) == jax.device_get(expected)).all()
