"""Choice between the kernels and plain JAX by what was measured to be faster."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_mhc as mhc
from jax_mhc._call import dispatch, faster, library
from jax_mhc._call.faster import Configuration, Measured

pytestmark = pytest.mark.cpu("the GPU is made up")

DTYPE = jnp.float32
N, HIDDEN, DEPTH = 4, 32, 3


@pytest.fixture(autouse=True)
def gpu(monkeypatch, caplog):
    """A GPU, as far as the choice of an implementation goes, and a log that nobody wrote to."""
    monkeypatch.setattr(dispatch, "default_platform", lambda: "cuda")
    monkeypatch.setattr(library, "_cuda_outcome", "")
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="jax_mhc"):
        yield
    faster.nearest.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Sets what was measured: configurations, each with whether plain JAX is faster in it."""

    def set_rows(rows):
        table = tuple(Measured(c, 2.0, 1.0 if is_plain else 3.0) for c, is_plain in rows.items())
        monkeypatch.setattr(faster, "measured", lambda: table)
        faster.nearest.cache_clear()

    return set_rows


def messages(caplog):
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "jax_mhc"]


def operands(streams=N, hidden=HIDDEN, dtype=DTYPE, tokens=(7,), constraint="birkhoff"):
    config = mhc.MHCConfig(constraint=constraint)
    make = functools.partial(mhc.init_params, streams=streams, hidden=hidden, config=config)
    params = make(jax.random.key(0))
    phi = jax.random.normal(jax.random.key(1), params.phi.shape, DTYPE)
    params = mhc.MHCParams(phi * (streams * hidden) ** -0.5, params.alpha + 0.5, params.bias)
    x = jax.random.normal(jax.random.key(2), (*tokens, streams, hidden), dtype)
    return x, params, config


def calls_of(function, *arrays):
    """The custom calls of a program, lowered for the CPU."""
    text = jax.jit(function).lower(*arrays).as_text()
    found = re.findall(r"@jax_mhc_(\w+)_v\d+", text)
    return {name: found.count(name) for name in found}


# ---- the table ----------------------------------------------------------------------------------


def test_every_row_of_the_table_decides():
    """Of the configuration that it was measured in."""
    assert len(faster.measured()) >= 47
    for row in faster.measured():
        assert faster.nearest(row.configuration) == row
        decided = faster.plain(row.configuration)
        assert decided == (row if row.plain_us < row.fused_us else None)


BIRKHOFF = Configuration(4, 4096, "bfloat16", 8192, "birkhoff")
ROWS = {
    BIRKHOFF: False,
    Configuration(4, 512, "bfloat16", 65536, "birkhoff"): False,
    Configuration(4, 2050, "bfloat16", 8192, "birkhoff"): True,
    Configuration(4, 4096, "bfloat16", 8192, "identity"): True,
    Configuration(4, 4096, "float32", 8192, "birkhoff"): False,
    Configuration(4, 4096, "bfloat16", 8192, "birkhoff", True): True,
    Configuration(3, 2048, "bfloat16", 16384, "birkhoff"): True,
    Configuration(3, 2048, "bfloat16", 32, "birkhoff"): False,
    Configuration(16, 2048, "bfloat16", 4096, "birkhoff"): True,
    Configuration(8, 2048, "bfloat16", 8192, "birkhoff"): False,
}


@pytest.mark.parametrize(
    "given, found",
    [
        # The nearest width and number of tokens, in log scale.
        ((4, 1000, "bfloat16", 8192, "birkhoff"), (4, 512, "bfloat16", 65536, "birkhoff")),
        ((4, 3000, "bfloat16", 8192, "birkhoff"), BIRKHOFF),
        ((4, 1 << 20, "bfloat16", 0, "birkhoff"), BIRKHOFF),
        ((3, 64, "bfloat16", 100, "birkhoff"), (3, 2048, "bfloat16", 32, "birkhoff")),
        ((3, 64, "bfloat16", None, "birkhoff"), (3, 2048, "bfloat16", 16384, "birkhoff")),
        # A multiple of 8 or not; the number of streams, and whether it is a power of two.
        ((4, 4097, "bfloat16", 8192, "birkhoff"), (4, 2050, "bfloat16", 8192, "birkhoff")),
        ((3, 2050, "bfloat16", 16384, "birkhoff"), (3, 2048, "bfloat16", 16384, "birkhoff")),
        ((5, 4096, "bfloat16", 8192, "birkhoff"), (3, 2048, "bfloat16", 16384, "birkhoff")),
        ((1, 4096, "bfloat16", 8192, "birkhoff"), BIRKHOFF),
        # Other dtypes, constraints and norms.
        ((4, 4096, "float16", 8192, "birkhoff"), BIRKHOFF),
        ((4, 4096, "float32", 8192, "identity"), (4, 4096, "float32", 8192, "birkhoff")),
        ((4, 8192, "bfloat16", 8192, "identity"), (4, 4096, "bfloat16", 8192, "identity")),
        ((4, 512, "bfloat16", 9, "birkhoff", True), (4, 4096, "bfloat16", 8192, "birkhoff", True)),
    ],
)  # fmt: skip
def test_the_nearest_configuration_decides(measured, given, found):
    measured(ROWS)
    found = found if isinstance(found, Configuration) else Configuration(*found)
    row = faster.nearest(Configuration(*given))
    assert row.configuration == found
    assert faster.plain(Configuration(*given)) == (row if ROWS[found] else None)


def test_without_a_table_the_kernels_run(measured):
    measured({})
    x, params, _ = operands(streams=3)
    assert faster.nearest(BIRKHOFF) is None
    assert calls_of(lambda x: mhc.pre(x, params)[0], x) == {"pre_fwd": 1}


# ---- ops ----------------------------------------------------------------------------------------


def ops(x, params, implementation, **options):
    """Every op of a configuration."""
    run = functools.partial(mhc.pre, params=params, implementation=implementation, **options)
    u, ctx = run(x)
    u, ctx = mhc.post_pre(u, ctx, params, implementation=implementation, **options)
    return mhc.post(u, ctx, implementation=implementation)


ALL_OPS = {"pre_fwd": 1, "post_pre_fwd": 1, "post_fwd": 1}


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("constraint", ["birkhoff", "identity", "static"])
def test_one_answer_for_the_ops_of_a_configuration(measured, caplog, constraint, norm, is_plain):
    row = Configuration(N, HIDDEN, "float32", 7, constraint, norm)
    other = Configuration(N, HIDDEN, "float32", 7, "none", norm)
    measured({row: is_plain, other: not is_plain})
    x, params, config = operands(constraint="birkhoff" if constraint == "static" else constraint)
    if constraint == "static":
        params = mhc.MHCParams(None, None, params.bias)
    options = {"config": config, "norm_scale": jnp.ones(HIDDEN, DTYPE) if norm else None}
    expected = {} if is_plain else ALL_OPS
    assert calls_of(lambda x: ops(x, params, None, **options), x) == expected
    assert calls_of(lambda x: ops(x, params, None, **options), x) == expected
    assert calls_of(lambda x: ops(x, params, "fused", **options), x) == ALL_OPS
    assert calls_of(lambda x: ops(x, params, "reference", **options), x) == {}
    told = f"plain JAX is faster than the kernels: 1 us for 2 us, measured for {row} on NVIDIA H200"
    fused = "implementation='fused' takes the kernels"
    assert messages(caplog) == ([("INFO", f"{told}. {fused}")] if is_plain else [])


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_head_has_its_own_answer(measured, is_plain):
    head, other = (Configuration(N, HIDDEN, "float32", 7, c) for c in ("head", "birkhoff"))
    measured({head: is_plain, other: not is_plain})
    x, params, _ = operands()
    of_head = mhc.init_head(jax.random.key(0), streams=N, hidden=HIDDEN)
    assert calls_of(lambda x: mhc.head(x, of_head), x) == ({} if is_plain else {"head_fwd": 1})
    assert calls_of(lambda x: ops(x, params, None), x) == (ALL_OPS if is_plain else {})


def test_a_context_of_plain_jax(measured):
    """post knows no constraint: it is plain JAX wherever pre could have been."""
    of = functools.partial(Configuration, N, HIDDEN, "float32", 7)
    x, params, _ = operands()
    y, ctx = mhc.pre(x, params, implementation="reference")
    for rows, expected in (
        ({of("birkhoff"): False, of("head"): True}, {"post_fwd": 1}),
        ({of("birkhoff"): False, of("none"): True}, {}),
    ):
        measured(rows)
        assert calls_of(lambda y, ctx: mhc.post(y, ctx), y, ctx) == expected


def test_sinkhorn_runs_its_kernel(measured):
    measured({BIRKHOFF: True})
    assert calls_of(mhc.sinkhorn, jnp.ones((7, 4, 4), jnp.float32)) == {"sinkhorn_fwd": 1}


def test_tokens_may_be_a_symbol(measured):
    """They are taken for many."""
    of = functools.partial(Configuration, N, HIDDEN, "float32")
    measured({of(32, "birkhoff"): False, of(4096, "birkhoff"): True})
    x, params, _ = operands()
    types = jax.ShapeDtypeStruct((export.symbolic_shape("t")[0], N, HIDDEN), DTYPE)
    run = jax.jit(lambda x: mhc.pre(x, params)[0])
    assert "@jax_mhc_" in run.lower(x).as_text()
    assert "@jax_mhc_" not in export.export(run)(types).mlir_module()


def test_a_cpu_takes_the_kernels(measured, monkeypatch):
    measured({Configuration(N, HIDDEN, "float32", 7, "birkhoff"): True})
    monkeypatch.setattr(dispatch, "default_platform", lambda: "cpu")
    x, params, _ = operands()
    assert calls_of(lambda x: ops(x, params, None), x) == ALL_OPS


@pytest.mark.mesh
@pytest.mark.parametrize("manual", [False, True])
def test_split_channels_take_the_kernels(measured, manual):
    """Plain JAX cannot."""
    measured({Configuration(N, HIDDEN, "float32", 8, "birkhoff"): True})
    kind = AxisType.Manual if manual else AxisType.Explicit
    mesh = jax.make_mesh((2,), ("c",), axis_types=(AxisType.Auto if manual else kind,))
    x, params, _ = operands(tokens=(8,))
    spec = PartitionSpec(None, None, "c")

    def run(x):
        u, ctx = mhc.pre(x, params, hidden_axis_name="c" if manual else None)
        return mhc.post(u, ctx)

    if manual:
        run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(jax.device_put(x, NamedSharding(mesh, spec))).as_text()
    assert "@jax_mhc_" in text


# ---- streams ------------------------------------------------------------------------------------


def layer(w, u):
    return jnp.tanh(u * w)


def in_a_loop(start, x, params, ws, residual):
    x = start(x)
    for i in range(DEPTH):
        p, w = jax.tree.map(lambda leaf, i=i: leaf[i], (params, ws))
        x = residual(functools.partial(layer, w), x, p)
    return x


def in_a_scan(scan, start, x, params, ws, residual):
    def body(x, slices):
        p, w = slices
        return residual(functools.partial(layer, w), x, p), None

    return scan(body, start(x), (params, ws))[0]


def in_a_stack(recompute, start, x, params, ws, residual):
    options = residual.keywords | recompute
    return mhc.stack([lambda u, w: layer(w, u)], start(x), [params], xs=ws, **options)


def without_xs(start, x, params, ws, residual):
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], (params, ws)) for i in range(DEPTH)]
    layers = [functools.partial(layer, w) for _, w in each]
    return mhc.stack(layers, start(x), [p for p, _ in each], **residual.keywords)


FORMS = {
    "loop": in_a_loop,
    "jax.lax.scan": functools.partial(in_a_scan, jax.lax.scan),
    "mhc.scan": functools.partial(in_a_scan, mhc.scan),
    "stack": functools.partial(in_a_stack, {}),
    "stack, streams recomputed": functools.partial(
        in_a_stack, {"recompute": mhc.Recompute(every=3)}
    ),
    "stack, all recomputed": functools.partial(
        in_a_stack, {"recompute": mhc.Recompute(every=3, policy="mhc")}
    ),
    "stack without xs": without_xs,
}


@pytest.mark.parametrize("start", [lambda x: x, mhc.as_streams])
@pytest.mark.parametrize("form", FORMS)
def test_streams_in_plain_jax(measured, form, start):
    """The sublayers run in plain JAX, whatever the streams were made for."""
    measured({Configuration(N, HIDDEN, "float32", 7, "birkhoff"): True})
    x, params, _ = operands()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf + 0.1 * i for i in range(DEPTH)]), params)
    ws = jax.random.normal(jax.random.key(3), (DEPTH,), DTYPE)

    def value(run, start, implementation, x, params, ws):
        residual = functools.partial(mhc.mhc_residual, implementation=implementation)
        x = run(start, x, params, ws, residual)
        x = x.array(implementation=implementation) if isinstance(x, mhc.Streams) else x
        return jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=DTYPE)).reshape(x.shape))

    def gradients(run, start, implementation):
        of_one = functools.partial(value, run, start, implementation)
        return jax.jit(jax.value_and_grad(of_one, argnums=(0, 1, 2)))

    program = gradients(FORMS[form], start, None).lower(x, stacked, ws)
    assert "@jax_mhc_" not in program.as_text()
    got = program.compile()(x, stacked, ws)
    expected = gradients(in_a_loop, lambda x: x, "reference")(x, stacked, ws)
    for out, exact in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(out, exact, rtol=2e-4, atol=2e-4 * np.abs(exact).max())
