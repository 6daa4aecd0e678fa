"""The modules for Flax NNX, Flax Linen and Equinox."""

import collections
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hlo import custom_calls

import jax_mhc as mhc
import jax_mhc.equinox as mhc_eqx
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

C, N = 8, 4
NAMES = ("phi", "alpha", "bias", "norm_scale", "w")


def streams(*tokens, n=N):
    return jax.random.normal(jax.random.key(0), (*tokens, n, C), jnp.float32)


def initial_w(key):
    return jax.random.normal(key, (C, C), jnp.float32) / 3


def apply_layer(w, u, scale=1.0, *, rest=False):
    """Function of every layer below; it takes other arguments, and may return a tuple."""
    y = jnp.sin(jnp.matmul(scale * u, w, precision="highest"))
    return (y, jnp.sum(u), {"cache": u}) if rest else y


# ---- one layer in three libraries ---------------------------------------------------------------


class NNXLayer(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(initial_w(rngs.params()))

    def __call__(self, u, *args, **kwargs):
        return apply_layer(self.w[...], u, *args, **kwargs)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, u, *args, **kwargs):
        return apply_layer(self.param("w", initial_w), u, *args, **kwargs)


class EqxLayer(eqx.Module):
    w: jax.Array

    def __call__(self, u, *args, **kwargs):
        return apply_layer(self.w, u, *args, **kwargs)


@dataclasses.dataclass
class Built:
    """A module as a function of its variables, a pytree; `method` names another than its call."""

    variables: Any
    call: Callable


def build_nnx(module):
    graphdef, state = nnx.split(module)

    def call(state, *args, method="__call__", **options):
        return getattr(nnx.merge(graphdef, state), method)(*args, **options)

    return Built(state, call)


def build_linen(module):
    return Built(module.init(jax.random.key(0), streams(1, n=module.streams)), module.apply)


def build_eqx(module):
    arrays, static = eqx.partition(module, eqx.is_array)

    def call(arrays, *args, method="__call__", **options):
        return getattr(eqx.combine(arrays, static), method)(*args, **options)

    return Built(arrays, call)


def build(library, kind, *args, **options):
    """`kind` of a library, with its layer where it takes one and none is given."""
    if library == "nnx":
        args = args or ((NNXLayer(nnx.Rngs(1)), C) if kind == "MHC" else (C,))
        return build_nnx(getattr(mhc_nnx, kind)(*args, **options, rngs=nnx.Rngs(0)))
    if library == "linen":
        args = args or ((LinenLayer(), C) if kind == "MHC" else (C,))
        return build_linen(getattr(mhc_linen, kind)(*args, **options))
    layer = EqxLayer(initial_w(jax.random.key(1)))
    args = args or ((layer, C) if kind == "MHC" else (C,))
    return build_eqx(getattr(mhc_eqx, kind)(*args, **options, key=jax.random.key(0)))


def named(tree):
    """The leaves by the names of `NAMES`, whatever is around them."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        (name,) = [str(n) for p in path for n in [getattr(p, "key", getattr(p, "name", p))]
                   if str(n) in NAMES]  # fmt: skip
        found[name] = leaf
    return found


def away_from_initial(tree):
    """With noise; initially phi is 0, and alpha without a gradient."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [
        p + 0.3 * jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def value_and_grads(call):
    """A compiled function of variables and x, and its custom calls."""

    def loss(variables, x):
        out = call(variables, x)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


LIBRARIES = ["nnx", "linen", "eqx"]
VARIANTS = {
    "plain": {},
    "norm": {"norm": True, "norm_scale_eps": 0.1},
    "static": {"static": True, "streams": 2, "config": mhc.presets.DEEPSEEK_V4},
    "reference": {"implementation": "reference", "config": mhc.MHCConfig(constraint="identity")},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_mhc_is_mhc_residual(library, variant):
    """To the bit, with all gradients; the parameters have their names and initial values."""
    options = VARIANTS[variant]
    built = build(library, "MHC", **options)
    shapes = {name: (leaf.shape, leaf.dtype.name) for name, leaf in named(built.variables).items()}
    n = options.get("streams", N)
    num = 2 * n if variant == "reference" else n * n + 2 * n
    expected = {"bias": (num,), "w": (C, C)}
    if variant != "static":
        num_gates = 2 if variant == "reference" else 3
        expected |= {"phi": (n * C, num), "alpha": (num_gates,)}
    if variant == "norm":
        expected["norm_scale"] = (C,)
        np.testing.assert_array_equal(named(built.variables)["norm_scale"], 1)
    assert shapes == {name: (shape, "float32") for name, shape in expected.items()}

    def by_function(values, x):
        values = dict(values)
        w, scale = values.pop("w"), values.pop("norm_scale", None)
        kept = {k: v for k, v in options.items() if k not in ("norm", "static", "streams")}
        params = mhc.MHCParams(**{"phi": None, "alpha": None, **values})
        layer = functools.partial(apply_layer, w)
        return mhc.mhc_residual(layer, x, params, norm_scale=scale, **kept)

    x, variables = streams(5, n=n), away_from_initial(built.variables)
    run = value_and_grads(built.call).lower(variables, x).compile()
    calls = ["pre_fwd", "post_fwd", "pre_bwd", "post_bwd"]
    calls = [] if variant == "reference" else calls
    assert custom_calls(run.as_text()) == collections.Counter(calls)
    value, (d_variables, d_x) = run(variables, x)
    assert_equal(
        (value, (named(d_variables), d_x)), value_and_grads(by_function)(named(variables), x)
    )
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(d_variables))


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_head_is_head(library, implementation):
    options = {"config": mhc.MHCConfig(pre_eps=0.1), "implementation": implementation}
    built = build(library, "Head", streams=2, **options)
    x, variables = streams(5, n=2), away_from_initial(built.variables)
    program = jax.jit(built.call).lower(variables, x).compile()
    assert len(custom_calls(program.as_text())) == (implementation is None)
    by_function = jax.jit(lambda values, x: mhc.head(x, mhc.HeadParams(**values), **options))
    np.testing.assert_array_equal(program(variables, x), by_function(named(variables), x))


@pytest.mark.parametrize("library", LIBRARIES)
def test_starts_as_the_plain_residual(library):
    built, u = build(library, "MHC"), streams(5)[:, 0]
    head = build(library, "Head")
    out = head.call(head.variables, built.call(built.variables, mhc.expand(u, streams=N)))
    plain = u + apply_layer(named(built.variables)["w"], u)
    np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_arguments_of_the_layer_and_what_else_it_returns(library):
    built, x = build(library, "MHC"), streams(5)
    alone = built.call(built.variables, x, 2.0)
    assert np.any(alone != built.call(built.variables, x))
    x_new, aux, cache = built.call(built.variables, x, scale=2.0, rest=True)
    assert_equal(x_new, alone)
    np.testing.assert_allclose(jnp.sum(cache["cache"]), aux, rtol=1e-5)


SEEDS = {"0": ((0,), {}), "params=0": ((), {"params": 0}), "0, mhc=1": ((0,), {"mhc": 1})}


@pytest.mark.parametrize("seeds", SEEDS)
def test_keys_of_nnx_connections(seeds):
    """Each has its own, and layers draw what they do without connections, in transforms too."""
    args, kwargs = SEEDS[seeds]

    def make(rngs):
        layers = [NNXLayer(rngs) for _ in range(2)]
        modules = [mhc_nnx.MHC(layer, C, rngs=rngs) for layer in layers]  # between them, no draw
        return nnx.List([*modules, mhc_nnx.MHC(NNXLayer(rngs), C, rngs=rngs)])

    def biases(modules):
        return {tuple(row[:N]) for m in modules for row in m.bias[...].reshape(-1, 24).tolist()}

    def drawn(modules):
        return [module.layer.w[...] for module in modules]

    rngs = nnx.Rngs(*args, **kwargs).fork()
    structure, plain = jax.tree.structure(nnx.split(rngs)), nnx.clone(rngs)
    jitted, again = nnx.jit(make)(nnx.clone(rngs)), make(nnx.clone(rngs))
    modules = make(rngs)
    heads = {tuple(mhc_nnx.Head(C, rngs=rngs).bias[...].tolist()) for _ in range(2)}
    assert len(biases(modules) | heads) == 5
    assert biases(modules) == biases(again)
    assert_equal(drawn(modules), [initial_w(plain.params()) for _ in range(3)])
    for one, other in zip(modules, jitted, strict=True):
        np.testing.assert_allclose(one.bias[...], other.bias[...], rtol=1e-5, atol=1e-6)
    assert rngs.params() == plain.params()
    stacked = nnx.split_rngs(splits=2)(nnx.vmap(make))(rngs)
    assert len(biases(stacked) | biases(modules) | heads) == 11
    assert jax.tree.structure(nnx.split(rngs)) == structure
    abstract = nnx.eval_shape(make, rngs)
    assert [m.bias.shape for m in abstract] == [m.bias.shape for m in modules]


# ---- errors -------------------------------------------------------------------------------------

OPS = {"nnx": "flax.nnx", "linen": "flax.linen", "eqx": "equinox"}


@pytest.mark.parametrize("shape", [(5, N, C + 1), (5, N + 1, C), (20, 5, C), (C,)])
@pytest.mark.parametrize("kind", ["MHC", "Head"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_not_its_streams(library, kind, shape):
    built = build(library, kind)
    with pytest.raises(ValueError) as error:
        built.call(built.variables, jnp.ones(shape, jnp.float32))
    assert str(error.value) == (
        f"jax_mhc.{OPS[library]}.{kind}: x: expected streams [..., {N}, {C}], got {list(shape)}. "
        f"Make streams from a hidden state [..., {C}] with jax_mhc.expand(u, streams={N}), "
        "once, in front of the first layer."
    )


@pytest.mark.parametrize(
    "layer, error, got",
    [
        (lambda u: u[..., :2], ValueError, r"expected shape \[5, 8\] .*, got \[5, 2\]"),
        (lambda u: u.astype(jnp.bfloat16), TypeError, "expected .*float32, got bfloat16"),
        (lambda u: ([u], 0), TypeError, "expected an array, got list"),
        (lambda u: (), TypeError, "expected an array, got tuple"),
    ],
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_layers_that_do_not_fit(library, layer, error, got):
    if library == "linen":
        module = mhc_linen.MHC(layer, C)
        call = functools.partial(module.init, jax.random.key(0))
    else:
        built = build(library, "MHC", layer, C)
        call = functools.partial(built.call, built.variables)
    with pytest.raises(error, match=rf"^jax_mhc.{OPS[library]}.MHC: the layer's result: {got}\. "):
        call(streams(5))


@pytest.mark.parametrize(
    "name, package, message",
    [
        ("jax_mhc.flax.nnx", "flax", "jax_mhc.flax: flax"),
        ("jax_mhc.flax.linen", "flax", "jax_mhc.flax: flax"),
        ("jax_mhc.equinox", "equinox", "jax_mhc.equinox: equinox"),
    ],
)
def test_missing_packages(monkeypatch, name, package, message):
    for loaded in [module for module in sys.modules if module.startswith(f"jax_mhc.{package}")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as error:
        importlib.import_module(name)
    assert str(error.value) == (
        f"{message}: expected an installed package, got none. "
        f"Install it: pip install 'jax-mhc[{package}]'."
    )


# ---- h_res ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_h_res_of_the_call_that_computes_it(library):
    """It is that of `pre`, and no call more than without it."""
    built, x = build(library, "MHC", norm=True), streams(5)
    variables = away_from_initial(built.variables)
    run = jax.jit(functools.partial(built.call, method="with_h_res")).lower(variables, x).compile()
    out, h_res = run(variables, x)
    p = named(variables)
    params = mhc.MHCParams(p["phi"], p["alpha"], p["bias"])
    _, ctx = jax.jit(mhc.pre)(x, params, norm_scale=p["norm_scale"])
    np.testing.assert_array_equal(h_res, ctx.h_res)
    np.testing.assert_array_equal(out, jax.jit(built.call)(variables, x))
    assert sorted(custom_calls(run.as_text())) == ["post_fwd", "pre_fwd"]

    def loop(variables, x):
        x, found = mhc.as_streams(x), []
        for _ in range(3):
            x, h_res = built.call(variables, x, method="with_h_res")
            found.append(h_res)
        return x.array(), jnp.stack(found)

    calls = custom_calls(jax.jit(loop).lower(variables, x).compile().as_text())
    assert calls == {"pre_fwd": 1, "post_pre_fwd": 2, "post_fwd": 1}


# ---- dtypes -------------------------------------------------------------------------------------


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize("library", LIBRARIES)
def test_parameters_of_half_precision(library):
    """Their values enter exactly; gradients are rounded once."""
    built = build(library, "MHC", norm=True, param_dtype=jnp.bfloat16)
    kept = {name: leaf.dtype.name for name, leaf in named(built.variables).items()}
    assert kept.pop("w") == "float32" and set(kept.values()) == {"bfloat16"} and len(kept) == 4
    variables, x = away_from_initial(built.variables), streams(5)
    run = value_and_grads(built.call)
    value, (d, d_x) = run(variables, x)
    expected, (d_wide, d_x_expected) = run(cast(variables, jnp.float32), x)
    assert_equal((value, d_x), (expected, d_x_expected))
    d, d_wide = named(d), named(d_wide)
    assert_equal(d, {name: leaf.astype(d[name].dtype) for name, leaf in d_wide.items()})

    head = build(library, "Head", param_dtype="bfloat16")
    variables = away_from_initial(head.variables)
    expected = head.call(cast(variables, jnp.float32), x)
    np.testing.assert_array_equal(head.call(variables, x), expected)


@pytest.mark.parametrize("kind", ["MHC", "Head"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_model_that_is_cast_whole(library, kind):
    """It is refused where values were rounded, and runs where they are exact."""
    built = build(library, kind)
    for dtype, stored in (("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16")):
        built = build(library, kind, param_dtype=dtype)
        half = cast(built.variables, stored)
        with pytest.raises(TypeError) as error:
            built.call(half, streams(5).astype(stored))
        assert str(error.value).startswith(
            f"jax_mhc.{OPS[library]}.{kind}: phi: expected the module's param_dtype, {dtype}, or "
            f"more precision, got {stored}. Where a model is cast whole, cast only what "
            "jax_mhc.param_labels calls 'other', as docs/dtypes.md shows."
        )
    built = build(library, kind, norm=True) if kind == "MHC" else built
    x, wide = streams(5).astype(jnp.float64), cast(built.variables, jnp.float64)
    out = built.call(wide, x)
    assert out.dtype == jnp.float64
    expected = built.call(built.variables, x.astype(jnp.float32))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


# ---- Flax NNX -----------------------------------------------------------------------------------


class NNXBlock(nnx.Module):
    def __init__(self, layer, rngs):
        options = {"config": mhc.MHCConfig(sinkhorn_iters=2), "norm_scale_eps": 0.1, "rngs": rngs}
        self.attention = mhc_nnx.MHC(layer(rngs), C, norm=True, **options)
        self.mlp = mhc_nnx.MHC(layer(rngs), C, **options)

    def __call__(self, x, scale=1.0):
        return self.mlp(self.attention(x, scale))


@functools.cache
def nnx_blocks(layer):
    """Three blocks, as a function that makes them again."""

    @nnx.jit
    def make():
        init = nnx.vmap(functools.partial(NNXBlock, layer))
        return nnx.split_rngs(splits=3)(init)(nnx.Rngs(0))

    blocks = make()
    graphdef, params, others = nnx.split(blocks, nnx.Param, ...)
    params = away_from_initial(params)
    return lambda: nnx.merge(graphdef, params, others, copy=True)


def in_scan(blocks, x, scale=1.0, block=NNXBlock.__call__):
    run = nnx.scan(block, in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
    return run(blocks, x, scale)


def in_scan_with_remat(blocks, x, scale=1.0):
    return in_scan(blocks, x, scale, nnx.remat(NNXBlock.__call__))


def in_a_row(blocks, x, scale=1.0):
    graphdef, state = nnx.split(blocks)
    for i in range(3):
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        x = block(x, scale)
    return x


def in_stack(blocks, x, scale=1.0, **options):
    return mhc_nnx.stack(blocks, x, {"attention": {"scale": scale}, "mlp": {}}, **options)


@functools.cache
def nnx_value_and_grads(run, **options):
    """With respect to all variables, x, and an argument of a layer."""

    def loss(blocks, x, scale):
        return jnp.sum(jnp.sin(run(blocks, x, scale, **options)))

    operands = nnx_blocks(NNXLayer)(), streams(5), jnp.float32(0.7)
    step = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1, 2))).lower(*operands).compile()
    value, (d_blocks, *d) = step(*operands)
    return (value, nnx.to_pure_dict(d_blocks), d), custom_calls(step.as_text())


@pytest.mark.parametrize(
    "run, options",
    [
        (in_scan, {}),
        (in_scan_with_remat, {}),
        (in_stack, {}),
        (in_stack, {"recompute": mhc.Recompute(every=2)}),
    ],
)
def test_nnx_blocks_in_a_loop(run, options):
    expected, _ = nnx_value_and_grads(in_a_row)
    got, _ = nnx_value_and_grads(run, **options)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert np.all(np.isfinite(one)) and np.any(one != 0)


def test_an_nnx_stack_is_made_of_seams():
    _, calls = nnx_value_and_grads(in_stack)
    assert set(calls) == {"post_pre_fwd", "post_fwd", "post_pre_bwd", "post_bwd"}
    blocks = nnx_blocks(NNXLayer)()
    blocks.attention.implementation = blocks.mlp.implementation = "reference"
    assert "jax_mhc" not in nnx.jit(in_stack).lower(blocks, streams(5)).as_text()


def test_an_nnx_stack_of_half_precision():
    module = mhc_nnx.MHC(jnp.sin, C, norm=True, param_dtype="bfloat16", rngs=nnx.Rngs(0))
    nnx.update(module, away_from_initial(nnx.state(module)))
    blocks = nnx.Dict(only=jax.tree.map(lambda leaf: leaf[None], module))
    got = mhc_nnx.stack(blocks, streams(5), ["only"])
    np.testing.assert_allclose(got, module(streams(5)), rtol=1e-5, atol=1e-5)


def test_h_res_of_nnx_blocks_in_a_scan():
    def block(block, x):
        x, first = block.attention.with_h_res(x)
        x, second = block.mlp.with_h_res(x)
        samples = [mhc.diagnostics.sample_tokens(h_res, 5) for h_res in (first, second)]
        return x, jnp.stack(samples)

    run = nnx.jit(nnx.scan(block, in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0)))
    blocks, x = nnx_blocks(NNXLayer)(), streams(5)
    out, h_res = run(blocks, x)
    expected, sample = mhc_nnx.stack_with_samples(blocks, x, ["attention", "mlp"], sample_tokens=5)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(h_res.reshape(sample.shape), sample, rtol=1e-4, atol=1e-5)


# ---- Flax Linen ---------------------------------------------------------------------------------


def test_a_linen_module_hands_out_h_res():
    """The module sows h_res where it is asked to, from the same call."""
    module, x = mhc_linen.MHC(LinenLayer(), C, norm=True), streams(5)
    variables = module.init(jax.random.key(0), x)
    assert list(variables) == ["params"]
    variables = away_from_initial(variables)
    run = jax.jit(functools.partial(module.apply, mutable="intermediates"))
    out, found = run(variables, x)
    (h_res,) = found["intermediates"]["h_res"]
    p = named(variables)
    params = mhc.MHCParams(p["phi"], p["alpha"], p["bias"])
    _, ctx = jax.jit(mhc.pre)(x, params, norm_scale=p["norm_scale"])
    np.testing.assert_array_equal(h_res, ctx.h_res)
    np.testing.assert_array_equal(out, jax.jit(module.apply)(variables, x))
    calls = custom_calls(run.lower(variables, x).compile().as_text())
    assert sorted(calls) == ["post_fwd", "pre_fwd"]


class LinenCounting(nn.Module):
    """A layer with dropout, and a variable that every call changes."""

    @nn.compact
    def __call__(self, u):
        count = self.variable("batch_stats", "count", lambda: jnp.int32(0))
        if not self.is_initializing():
            count.value += 1
        self.sow("intermediates", "mean", jnp.mean(u))
        return nn.Dropout(0.5, deterministic=False)(LinenLayer()(u))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = mhc_linen.MHC(LinenCounting(), C, norm=True)(x)
        return mhc_linen.MHC(LinenCounting(), C)(x), None


def test_linen_blocks_in_a_scan():
    """With remat; dropout and the collections of a layer are as without a hyper-connection."""
    blocks = nn.scan(
        nn.remat(LinenBlock),
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=3,
    )()
    x, rngs = streams(5), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.jit(blocks.init)(rngs, x, None)

    def loss(params, seed):
        rest = {"batch_stats": variables["batch_stats"]}
        (out, _), changed = blocks.apply(
            {"params": params, **rest}, x, None, rngs={"dropout": jax.random.key(seed)},
            mutable=["batch_stats", "intermediates"],
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)), changed

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (first, changed), grads = run(away_from_initial(variables["params"]), 0)
    assert first != run(away_from_initial(variables["params"]), 1)[0][0]
    assert sorted(grads) == ["LinenCounting_0", "LinenCounting_1", "MHC_0", "MHC_1"]
    assert sorted(grads["MHC_0"]) == ["alpha", "bias", "norm_scale", "phi"]
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    counts = changed["batch_stats"]
    np.testing.assert_array_equal(counts["LinenCounting_1"]["count"], [1, 1, 1])
    assert changed["intermediates"]["LinenCounting_0"]["mean"][0].shape == (3,)
    (h_res,) = changed["intermediates"]["MHC_1"]["h_res"]
    assert h_res.shape == (3, 5, 4, 4)
    np.testing.assert_allclose(h_res.sum(-1), np.ones((3, 5, 4)), atol=1e-6)


# ---- Equinox ------------------------------------------------------------------------------------


def test_equinox_blocks_in_a_scan():
    """One example of a batch under filter_vmap, and a layer for single tokens likewise."""

    @eqx.filter_vmap
    def make(key):
        layer, connection = jax.random.split(key)
        layer = eqx.filter_vmap(EqxLayer(initial_w(layer)))
        return mhc_eqx.MHC(layer, C, norm=True, key=connection)

    arrays, static = eqx.partition(make(jax.random.split(jax.random.key(0), 3)), eqx.is_array)
    arrays, x = away_from_initial(arrays), streams(2, 5)

    def run(arrays, x):
        return jax.lax.scan(lambda x, block: (eqx.combine(block, static)(x), None), x, arrays)[0]

    def by_function(arrays, x):
        for i in range(3):
            p = named(jax.tree.map(lambda leaf, i=i: leaf[i], arrays))
            layer, scale = functools.partial(apply_layer, p.pop("w")), p.pop("norm_scale")
            x = mhc.mhc_residual(layer, x, mhc.MHCParams(**p), norm_scale=scale)
        return x

    got = value_and_grads(lambda a, x: jax.vmap(run, (None, 0))(a, x))(arrays, x)
    expected = value_and_grads(by_function)(arrays, x)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert np.any(one != 0)
