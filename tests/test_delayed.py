"""The delayed schedule of DeepSeek-V4.1: the public forms of a model against its formulas."""

import collections
import functools
import operator
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import accumulation, assert_close
from flax import nnx
from hlo import compiled_text, custom_calls

import jax_mhc as mhc
import jax_mhc.equinox as mhc_eqx
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

N, C, SITES, TOKENS = 4, 32, 6, (2, 5)
K = N * (N + 2)
CONFIG = mhc.presets.DEEPSEEK_V41


def layer(w, u):
    return jnp.tanh(jnp.matmul(u, w, precision="highest"))


def operands(dtype):
    """x, and of each site w and what a checkpoint of DeepSeek-V4.1 has: fn, base and scale."""
    rng = np.random.default_rng(0)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    sites = {
        "w": jnp.asarray(rng.normal(size=(SITES, C, C)) / np.sqrt(C), dtype),
        "fn": jnp.asarray(rng.normal(size=(SITES, K, N * C)) / np.sqrt(N * C), wide),
        "base": jnp.asarray(rng.normal(size=(SITES, K)), wide),
        "scale": jnp.asarray(rng.uniform(0.5, 1, (SITES, 3)), wide),
    }
    return jnp.asarray(rng.normal(size=(*TOKENS, N, C)), dtype), sites


def from_formulas(x, sites):
    """The model, from its equations and in its own orientation: comb's first index is contracted.

    u of a site is taken with the weights of the site before, and of the first site is stream 0.
    """
    weights = jnp.zeros(x.shape[:-1], x.dtype).at[..., 0].set(1)
    for i in range(SITES):
        w, fn, base, scale = (sites[name][i] for name in ("w", "fn", "base", "scale"))
        flat = x.reshape(*TOKENS, N * C)
        flat = flat / jnp.sqrt(jnp.mean(flat**2, -1, keepdims=True) + 1e-6)
        mixes = jnp.einsum("...d,kd->...k", flat, fn, precision="highest")
        mixes = mixes * jnp.repeat(scale, np.array([N, N, N * N]))[None, None] + base[None, None]
        pre, post, comb = jnp.split(mixes, (N, 2 * N), -1)
        pre, post = jax.nn.sigmoid(pre) + 1e-6, 2 * jax.nn.sigmoid(post)
        comb = comb.reshape(*TOKENS, N, N)
        comb = jax.nn.softmax(comb, -1) + 1e-6
        comb = comb / (comb.sum(-2, keepdims=True) + 1e-6)
        for _ in range(19):
            comb = comb / (comb.sum(-1, keepdims=True) + 1e-6)
            comb = comb / (comb.sum(-2, keepdims=True) + 1e-6)
        y = layer(w, jnp.einsum("...i,...ic->...c", weights, x))
        x = jnp.einsum("...ji,...jc->...ic", comb, x) + post[..., None] * y[..., None, :]
        weights = pre
    return jnp.einsum("...i,...ic->...c", weights, x)


def read(sites):
    """Weights and parameters of every site."""
    params = [
        mhc.convert.from_deepseek_v4(fn, base, scale)
        for fn, base, scale in zip(sites["fn"], sites["base"], sites["scale"], strict=True)
    ]
    return sites["w"], params


def loop(x, sites, start=mhc.as_streams, **options):
    x = start(x)
    for w, params in zip(*read(sites), strict=True):
        x = mhc.mhc_residual(functools.partial(layer, w), x, params, config=CONFIG, **options)
    return mhc.collapse(x)


def as_plain(x):
    return mhc.as_streams(x, implementation="reference")


def interrupted(x, sites):
    """The streams leave as an array amid the sites, as from one stage of a pipeline to another."""
    x = mhc.as_streams(x)
    for w, params in zip(*read(sites), strict=True):
        x = mhc.as_streams(x.array(), h_pre=x.h_pre)
        x = mhc.mhc_residual(functools.partial(layer, w), x, params, config=CONFIG)
    return mhc.collapse(x)


def pieces(x, sites, **options):
    ws, params = read(sites)
    first = mhc.as_streams(x).h_pre
    u, ctx = mhc.pre(x, params[0], config=CONFIG, h_pre=first, **options)
    for w, p in zip(ws, params[1:], strict=False):
        u, ctx = mhc.post_pre(layer(w, u), ctx, p, config=CONFIG, **options)
    x = mhc.post(layer(ws[-1], u), ctx, **options)
    return mhc.collapse(x, ctx.h_pre, **options)


def given(x, sites):
    """The same where every site is of the usual schedule, and is given the weights."""
    config, (ws, params) = mhc.presets.DEEPSEEK_V4, read(sites)
    first = mhc.as_streams(x).h_pre
    u, ctx = mhc.pre(mhc.as_streams(x), params[0], config=config, h_pre=first)
    for w, p in zip(ws, params[1:], strict=False):
        u, ctx = mhc.post_pre(layer(w, u), ctx, p, config=config, h_pre=ctx.h_pre)
    return mhc.collapse(mhc.post(layer(ws[-1], u), ctx), ctx.h_pre)


def by_block(tree):
    """Of two sites a block, stacked over the blocks."""
    return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree[i::2]) for i in range(2)]


def stack(x, sites, **options):
    ws, params = read(sites)
    layers = [lambda u, s: layer(s[0], u), lambda u, s: layer(s[1], u)]
    xs = by_block(list(ws))
    return mhc.collapse(
        mhc.stack(layers, mhc.as_streams(x), by_block(params), xs=xs, config=CONFIG, **options)
    )


def stack_in_a_row(x, sites):
    ws, params = read(sites)
    layers = [functools.partial(layer, w) for w in ws]
    recompute = mhc.Recompute(every=2, policy="mhc")
    x = mhc.stack(layers, mhc.as_streams(x), params, config=CONFIG, recompute=recompute)
    return mhc.collapse(x)


def scan_of_checkpoints(x, sites):
    """JAX's scan over blocks that are computed again."""
    ws, params = read(sites)

    @functools.partial(jax.checkpoint, policy=mhc.remat_policy(streams=N, hidden=C))
    def block(x, slices):
        for w, p in zip(*slices, strict=True):
            x = mhc.mhc_residual(functools.partial(layer, w), x, p, config=CONFIG)
        return x, None

    x, _ = jax.lax.scan(block, mhc.as_streams(x), (by_block(list(ws)), by_block(params)))
    return mhc.collapse(x)


FORMS = {
    "loop": loop,
    "loop in plain JAX": functools.partial(loop, start=as_plain, implementation="reference"),
    "loop of both": functools.partial(loop, start=as_plain),
    "interrupted loop": interrupted,
    "pieces": pieces,
    "given": given,
    "stack": stack,
    "recomputed stack": functools.partial(stack, recompute=mhc.Recompute(every=2)),
    "stack in one stretch": functools.partial(
        stack, recompute=mhc.Recompute(every=SITES, policy="mhc")
    ),
    "stack in a row": stack_in_a_row,
    "scan of checkpoints": scan_of_checkpoints,
}


def value_and_gradients(form, arrays):
    def loss(arrays):
        out = form(*arrays)
        wide = out.astype(accumulation(out.dtype))
        cotangent = jnp.cos(jnp.arange(out.size, dtype=wide.dtype)).reshape(out.shape)
        return jnp.sum(wide * cotangent), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return out, gradients


@functools.cache
def expected(dtype):
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), operands(jnp.dtype(dtype)))
    return value_and_gradients(from_formulas, wide)


@pytest.mark.parametrize("form", FORMS)
def test_forms_agree_with_the_formulas(form):
    out, gradients = value_and_gradients(FORMS[form], operands(jnp.float32))
    exact, of_exact = expected("float32")
    assert_close(out, exact, 1e-6)
    for (path, leaf), wanted in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(of_exact), strict=True
    ):
        assert_close(leaf, wanted, 1e-5, jax.tree_util.keystr(path))


def test_half_precision_agrees_within_rounding():
    """Six sites round streams, u and y; a stack as a loop, to the bit but for d_x.

    The first site of a loop is pre, which rounds d_x twice, that of a stack post_pre.
    """
    exact, of_exact = expected("bfloat16")
    out, gradients = value_and_gradients(loop, operands(jnp.bfloat16))
    largest = 2 * SITES * float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert_close(out, exact, largest)
    jax.tree.map(functools.partial(assert_close, limit=3 * largest), gradients, of_exact)
    same = value_and_gradients(stack, operands(jnp.bfloat16))
    (of_loop, *others), (of_stack, *same_others) = gradients, same[1]
    jax.tree.map(np.testing.assert_array_equal, (same[0], same_others), (out, others))
    assert_close(of_stack, of_loop, float(jnp.finfo(jnp.bfloat16).eps))


def test_seams_are_one_call_each_way():
    """u beside pre's call is another of the first site and of the exit alone."""
    arrays = operands(jnp.float32)
    text = compiled_text(loop, *arrays)
    forward = {"pre_fwd": 1, "post_pre_fwd": SITES - 1, "post_fwd": 1, "collapse_fwd": 2}
    assert custom_calls(text) == forward
    assert _given(text) == collections.Counter({("post_pre_fwd", "1"): SITES - 1})
    text = compiled_text(jax.grad(lambda arrays: jnp.sum(jnp.sin(loop(*arrays)))), arrays)
    # The weights of the first site are constants; the cotangent of its streams has the form of a
    # post.
    backward = {"pre_bwd": 1, "post_pre_bwd": SITES - 1, "post_bwd": 1, "collapse_bwd": 1}
    assert custom_calls(text) == forward | backward | {"post_fwd": 2}
    calls = [("post_pre_fwd", "1"), ("post_pre_bwd", "1")] * (SITES - 1)
    assert _given(text) == collections.Counter(calls)


def test_a_stack_makes_u_in_its_seams():
    """In the loop of a stack no call but post_pre's makes u, or the gradient of its weights."""
    arrays = operands(jnp.float32)
    text = compiled_text(jax.grad(lambda arrays: jnp.sum(jnp.sin(stack(*arrays)))), arrays)
    calls = custom_calls(text)
    # Those of the exit.
    assert calls["collapse_fwd"] == calls["collapse_bwd"] == 1
    assert _given(text).keys() == {("post_pre_fwd", "1"), ("post_pre_bwd", "1")}


def _given(text):
    """The attribute `given` of the calls that have it, each with its number."""
    called = r'custom_call_target="jax_mhc_(\w+)_v\d+".*?\bgiven = (\d)'
    return collections.Counter(re.findall(called, text))


# ---- the way in and out -------------------------------------------------------------------------


def test_streams_before_the_first_site_collapse_to_stream_0():
    x, _ = operands(jnp.bfloat16)
    np.testing.assert_array_equal(mhc.collapse(mhc.as_streams(x)), x[..., 0, :])
    u = x[..., 1, :]
    np.testing.assert_array_equal(mhc.collapse(mhc.expand(u, streams=N)), u)


def test_initial_values_compute_the_plain_model():
    x, sites = operands(jnp.float32)
    x = mhc.expand(x[..., 0, :], streams=N)
    plain = mhc.collapse(x)
    for w, key in zip(sites["w"], jax.random.split(jax.random.key(0), SITES), strict=True):
        params = mhc.init_params(key, streams=N, hidden=C, config=CONFIG)
        x = mhc.mhc_residual(functools.partial(layer, w), x, params, config=CONFIG)
        plain = plain + layer(w, plain)
    # To rounding, and to the eps of the preset.
    assert_close(mhc.collapse(x), plain, 1e-4)


# ---- modules ------------------------------------------------------------------------------------


class NNXLayer(nnx.Module):
    def __init__(self, w):
        self.w = nnx.Param(w)

    def __call__(self, u):
        return layer(self.w[...], u)


def nnx_model(ws, params):
    """A module of every site, in a loop; and their stack."""
    modules = []
    for w, p in zip(ws, params, strict=True):
        module = mhc_nnx.MHC(NNXLayer(w), C, streams=N, config=CONFIG, rngs=nnx.Rngs(0))
        module.phi[...], module.alpha[...], module.bias[...] = p.phi, p.alpha, p.bias
        modules.append(module)
    graphdef, _ = nnx.split(modules[0])
    states = [nnx.split(module)[1] for module in modules]
    stacked = nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))

    def in_a_loop(x):
        return functools.reduce(lambda x, module: module(x), modules, x)

    return in_a_loop, functools.partial(mhc_nnx.stack, stacked)


class EqxLayer(eqx.Module):
    w: jax.Array

    def __call__(self, u):
        return layer(self.w, u)


def eqx_model(ws, params):
    def module(w, p):
        new = mhc_eqx.MHC(EqxLayer(w), C, streams=N, config=CONFIG, key=jax.random.key(0))
        parts = operator.attrgetter("phi", "alpha", "bias")
        return eqx.tree_at(parts, new, parts(p))

    modules = [module(w, p) for w, p in zip(ws, params, strict=True)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *modules)

    def in_a_loop(x):
        return functools.reduce(lambda x, module: module(x), modules, x)

    return in_a_loop, functools.partial(mhc_eqx.stack, stacked)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, u):
        return layer(self.param("w", nn.initializers.zeros, (C, C)), u)


def linen_model(ws, params):
    of_site = [
        {"layer": {"w": w}, "phi": p.phi, "alpha": p.alpha, "bias": p.bias}
        for w, p in zip(ws, params, strict=True)
    ]

    def module():
        return mhc_linen.MHC(LinenLayer(), C, streams=N, config=CONFIG, name="blocks")

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mhc_linen.stack(module(), x, SITES)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_site)

    def in_a_loop(x):
        return functools.reduce(
            lambda x, site: mhc_linen.MHC(LinenLayer(), C, streams=N, config=CONFIG).apply(
                {"params": site}, x
            ),
            of_site,
            x,
        )

    def in_a_stack(x):
        return Stack().apply({"params": {"blocks": stacked}}, x)

    return in_a_loop, in_a_stack


@pytest.mark.parametrize("model", [nnx_model, linen_model, eqx_model])
def test_modules_agree_with_the_formulas(model):
    x, sites = operands(jnp.float32)
    exact, (d_x, _) = expected("float32")
    for run in model(*read(sites)):

        def form(x, run=run):
            return mhc.collapse(run(mhc.as_streams(x)))

        out, (gradient,) = value_and_gradients(form, (x,))
        assert_close(out, exact, 1e-6)
        assert_close(gradient, d_x, 1e-5)
