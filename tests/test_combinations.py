"""Sublayers of several forms and schedules in one model, and a bias of post in the delayed one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error

import jax_mhc
from jax_mhc import MHCConfig, MHCParams, presets

N, C, TOKENS = 3, 5, (2, 3)
PUBLISHED, CHANNELS = presets.HYPER_CONNECTIONS, MHCConfig(form="channels")
DELAYED, PAPER = presets.DEEPSEEK_V41, presets.PAPER
UNMIXED = MHCConfig(constraint="identity", schedule="delayed", post_eps=0.1)


def problem(*configs):
    """Streams, and parameters of each config whose logits are of size 1, in float64."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape))

    def of(config):
        num = config.num_coefficients(N, hidden=C)
        if config.form == "channels":
            return MHCParams(None, None, normal(num))
        shape = (C, N + 2) if config.form == "hyper_connections" else (N * C, num)
        return MHCParams(normal(*shape) / 4, normal(config.num_gates()), normal(num))

    return normal(*TOKENS, N, C), [of(config) for config in configs]


def evaluate(run, *operands):
    """The result of a function of operands, and all gradients."""

    def loss(operands):
        out = run(*operands)
        return jnp.sum(jnp.sin(out.astype(jnp.float64))), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(operands)
    return out, gradients


def assert_same(value, wanted, largest=1e-11):
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) <= largest


@pytest.mark.parametrize("config", [PUBLISHED, CHANNELS], ids=lambda config: config.form)
@pytest.mark.parametrize("norm", [False, True])
def test_every_form_takes_given_weights(config, norm):
    """u is of these; the context is that without them."""
    x, (params,) = problem(config)
    h_pre, scale = jnp.cos(x[..., 0]), jnp.arange(1.0, C + 1) if norm else None
    options = {"config": config, "norm_scale": scale}

    def ours(start, x, params, h_pre):
        u, ctx = jax_mhc.pre(start(x), params, h_pre=h_pre, **options)
        return jnp.stack([u, *jnp.moveaxis(jax_mhc.post(jnp.tanh(u), ctx), -2, 0)])

    def plain(x, params, h_pre):
        u = jnp.einsum("...i,...ic->...c", h_pre, x)
        if norm:
            u = scale[None, None] * u / jnp.sqrt(jnp.mean(u**2, -1, keepdims=True) + 1e-6)
        _, ctx = jax_mhc.reference.pre(x, params, config=config)
        new = jax_mhc.reference.post(jnp.tanh(u), ctx)
        return jnp.stack([u, *jnp.moveaxis(new, -2, 0)])

    wanted = evaluate(plain, x, params, h_pre)
    for start in (lambda x: x, jax_mhc.as_streams):
        assert_same(evaluate(functools.partial(ours, start), x, params, h_pre), wanted)


def test_schedules_and_forms_follow_each_other():
    """A delayed sublayer reads the h_pre of the one before, which may be of another kind."""
    configs = [PUBLISHED, DELAYED, UNMIXED, PAPER, DELAYED, CHANNELS, PUBLISHED]
    x, params = problem(*configs)

    def plain(x, *params):
        h_pre = None
        for config, p in zip(configs, params, strict=True):
            given = h_pre if config.schedule == "delayed" else None
            u, ctx = jax_mhc.reference.pre(x, p, config=config, h_pre=given)
            x, h_pre = jax_mhc.reference.post(jnp.tanh(u), ctx), ctx.h_pre
        return jnp.einsum("...i,...ic->...c", h_pre, x)

    def residuals(x, *params):
        for config, p in zip(configs, params, strict=True):
            x = jax_mhc.mhc_residual(jnp.tanh, x, p, config=config)
        return jax_mhc.collapse(x)

    def streams(x, *params):
        return residuals(jax_mhc.as_streams(x), *params)

    def scanned(x, *params):
        """All of them in the body of one loop, where the streams begin as any others."""

        def step(x, params):
            for config, p in zip(configs, params, strict=True):
                x = jax_mhc.mhc_residual(jnp.tanh, x, p, config=config)
            return x, None

        once = jax.tree.map(lambda leaf: leaf[None], params)
        return jax_mhc.collapse(jax_mhc.scan(step, jax_mhc.as_streams(x), once)[0])

    def pieces(x, *params):
        u, ctx = jax_mhc.pre(x, params[0], config=configs[0])
        for config, p in zip(configs[1:], params[1:], strict=True):
            u, ctx = jax_mhc.post_pre(jnp.tanh(u), ctx, p, config=config)
        return jax_mhc.collapse(jax_mhc.post(jnp.tanh(u), ctx), ctx.h_pre)

    wanted = evaluate(plain, x, *params)
    for run in (streams, scanned, pieces):
        assert_same(evaluate(run, x, *params), wanted)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("config", [DELAYED, UNMIXED], ids=lambda config: config.constraint)
def test_a_bias_of_post_in_the_delayed_schedule(config, dtype):
    """Whose pre makes u with given weights, and takes the cotangent of its streams deferred."""
    x, params = problem(config, config)
    bias = jnp.linspace(-1, 1, C)
    wide = "float64" if dtype == "float64" else "float32"
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(wide))
    x, params, bias = x.astype(dtype), cast(params), cast(bias)

    def run(implementation, x, params, bias):
        options = {"config": config, "implementation": implementation}
        first = jax_mhc.as_streams(x).h_pre
        u, ctx = jax_mhc.pre(x, params[0], h_pre=first, **options)
        x = jax_mhc.post(jnp.tanh(u), ctx, bias=bias, implementation=implementation)
        u, ctx = jax_mhc.pre(x, params[1], h_pre=ctx.h_pre, **options)
        x = jax_mhc.post(jnp.tanh(u), ctx, bias=bias, implementation=implementation)
        return jax_mhc.collapse(x, ctx.h_pre, implementation=implementation)

    out, gradients = evaluate(functools.partial(run, None), x, params, bias)
    operands = x, params, bias
    if dtype != "bfloat16":  # beside which roundings of streams and of u show in the gradients
        operands = jax.tree.map(lambda leaf: leaf.astype("float64"), operands)
    wanted, of_wanted = evaluate(functools.partial(run, "reference"), *operands)
    largest, of_gradients = {
        "float64": (1e-13, 1e-12), "float32": (1e-6, 1e-5), "bfloat16": (2.0**-7, 2.0**-6)
    }[dtype]  # fmt: skip
    assert relative_error(out, wanted) <= largest
    for value, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(of_wanted), strict=True):
        assert relative_error(value, other) <= of_gradients
