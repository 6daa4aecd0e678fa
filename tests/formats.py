"""Hyper-connections of other implementations, each in its own layout, and what converts them.

Every `theirs` is a float64 transcription of the public code's formulas with the layer tanh: from
streams and tensors in its layout to new streams, or for the delayed schedule to those that leave
two sublayers. It shares nothing with the package and is
differentiated by JAX. `ours` makes our parameters of the tensors.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_mhc import MHCConfig, convert, presets


class Format(NamedTuple):
    """A format: shapes of its tensors, its own computation, and the conversion both ways."""

    config: MHCConfig
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    theirs: Callable[..., jax.Array]
    ours: Callable[[dict], object]
    back: Callable[..., dict]


def sigmoid(z):
    return 1 / (1 + jnp.exp(-z))


def flat(x):
    """[..., n, C] -> [..., nC]."""
    return x.reshape(*x.shape[:-2], -1)


def split(h, n):
    return h[..., :n], h[..., n : 2 * n], h[..., 2 * n :]


def square(z, n):
    return z.reshape(*z.shape[:-1], n, n)


def repeat(step, value, times):
    """A loop that compiles its body once."""
    return jax.lax.scan(lambda carry, _: (step(carry), None), value, None, length=times)[0]


def softmax_sinkhorn(z, iters=20, eps=1e-6):
    """Softmax over the last axis, then columns and rows in turn, with eps added (DeepSeek)."""

    def columns(m):
        return m / (m.sum(-2, keepdims=True) + eps)

    m = columns(jax.nn.softmax(z, axis=-1) + eps)
    return repeat(lambda m: columns(m / (m.sum(-1, keepdims=True) + eps)), m, iters - 1)


# ---- DeepSeek-V4 and V4.1, GLM-5.3 and Megatron Core's branch dev --------------------------------


def deepseek_coefficients(x, fn, base, scale, norm_eps, outside=False):
    n, v = x.shape[-2], flat(x)
    mean = jnp.mean(v**2, axis=-1, keepdims=True)
    r = 1 / (jnp.sqrt(mean) + norm_eps) if outside else 1 / jnp.sqrt(mean + norm_eps)
    pre, post, comb = split(r * (v @ fn.T), n)
    b_pre, b_post, b_comb = split(base, n)
    pre = sigmoid(scale[0] * pre + b_pre) + 1e-6
    post = 2 * sigmoid(scale[1] * post + b_post)
    return pre, post, softmax_sinkhorn(square(scale[2] * comb + b_comb, n))


def deepseek_sublayer(x, weights, post, comb):
    y = jnp.tanh(jnp.sum(weights[..., None] * x, axis=-2))
    return post[..., None] * y[..., None, :] + jnp.einsum("...ij,...ic->...jc", comb, x)


def deepseek(norm_eps, outside=False):
    def theirs(x, **t):
        return deepseek_sublayer(
            x, *deepseek_coefficients(x, **t, norm_eps=norm_eps, outside=outside)
        )

    return theirs


def deepseek_v41(x, **t):
    """Two sublayers with the same tensors, and the exit: u has the weights of the one before."""
    weights = jnp.zeros(x.shape[:-1], x.dtype).at[..., 0].set(1)
    for _ in range(2):
        pre, post, comb = deepseek_coefficients(x, **t, norm_eps=1e-6)
        x, weights = deepseek_sublayer(x, weights, post, comb), pre
    return jnp.sum(weights[..., None] * x, axis=-2)


def deepseek_shapes(n, hidden):
    num = n * n + 2 * n
    return {"fn": (num, n * hidden), "base": (num,), "scale": (3,)}


def deepseek_format(config, theirs):
    return Format(
        config,
        deepseek_shapes,
        theirs,
        lambda t: convert.from_deepseek_v4(t["fn"], t["base"], t["scale"]),
        lambda params, tensors, n: dict(
            zip(tensors, convert.to_deepseek_v4(params, streams=n), strict=True)
        ),
    )


# ---- Hy4 -----------------------------------------------------------------------------------------


def hy4(x, fn, base, scale):
    n, v = x.shape[-2], flat(x)
    mixes = v @ fn.T / jnp.sqrt(jnp.mean(v**2, axis=-1, keepdims=True) + 1e-5)
    pre = sigmoid(scale[0] * mixes[..., :n] + base[:n]) + 1e-6
    post = 2 * sigmoid(scale[1] * mixes[..., n:] + base[n:]) + 1e-6
    y = jnp.tanh(jnp.sum(pre[..., None] * x, axis=-2))
    return x + post[..., None] * y[..., None, :]


# ---- Megatron Core's branch main -----------------------------------------------------------------


def megatron(x, weight, alpha, bias):
    n, v = x.shape[-2], flat(x)
    r = 1 / (jnp.linalg.norm(v, axis=-1, keepdims=True) / math.sqrt(v.shape[-1]) + 1e-6)
    gates = jnp.concatenate([jnp.full(k, alpha[g]) for g, k in enumerate((n, n, n * n))])
    pre, post, res = split(r * (v @ weight.T) * gates + bias, n)
    z = square(res, n)

    def step(m):
        m = m / jnp.maximum(m.sum(-1, keepdims=True), 1e-6)
        return m / jnp.maximum(m.sum(-2, keepdims=True), 1e-6)

    m = repeat(step, jnp.exp(z - jax.lax.stop_gradient(z.max(-1, keepdims=True))), 20)
    y = jnp.tanh(jnp.sum(sigmoid(pre)[..., None] * x, axis=-2))
    return 2 * sigmoid(post)[..., None] * y[..., None, :] + m @ x


# ---- MaxText -------------------------------------------------------------------------------------


def maxtext(x, **t):
    n, v = x.shape[-2], flat(x)
    v = v / jnp.sqrt(jnp.mean(v**2, axis=-1, keepdims=True) + 1e-6) * t["mhc_norm.scale"]
    logits = {
        group: t[f"{group}_alpha_scale"] * (v @ t[f"{group}_alpha"]) for group in ("pre", "post")
    }
    pre = sigmoid(logits["pre"] + t["pre_beta"]) + 1e-6
    post = 2 * sigmoid(logits["post"] + t["post_beta"])
    res = t["res_alpha_scale"] * (v @ t["res_alpha"])
    if t["res_beta"].ndim == 1:  # mHC-lite
        weights = jax.nn.softmax(res + t["res_beta"], axis=-1)
        matrices = np.eye(n)[np.array(list(itertools.permutations(range(n))))]
        h_res = jnp.einsum("...p,pkm->...km", weights, matrices)
    else:
        h_res = softmax_sinkhorn(square(res, n) + t["res_beta"])
    y = jnp.tanh(jnp.einsum("...k,...kd->...d", pre, x))
    mixed = jnp.einsum("...km,...kd->...md", h_res, x)
    return mixed + y[..., None, :] * post[..., None]


def maxtext_shapes(n, hidden, lite=False):
    num = math.factorial(n) if lite else n * n
    return {
        "pre_alpha": (n * hidden, n), "post_alpha": (n * hidden, n), "res_alpha": (n * hidden, num),
        "pre_beta": (n,), "post_beta": (n,), "res_beta": (num,) if lite else (n, n),
        "pre_alpha_scale": (1,), "post_alpha_scale": (1,), "res_alpha_scale": (1,),
        "mhc_norm.scale": (n * hidden,),
    }  # fmt: skip


def to_maxtext(params, tensors, n):
    return convert.to_maxtext(params, like=tensors, streams=n)


# ---- Liger-Kernel --------------------------------------------------------------------------------


def liger(x, phi, b, alpha_pre, alpha_post, alpha_res):
    n, v = x.shape[-2], flat(x)
    pre, post, res = split(v @ phi / jnp.sqrt(jnp.mean(v**2, axis=-1, keepdims=True) + 1e-6), n)
    b_pre, b_post, b_res = split(b, n)
    pre = sigmoid(pre * alpha_pre + b_pre)
    post = 2 * sigmoid(post * alpha_post + b_post)
    h_res = softmax_sinkhorn(square(res * alpha_res + b_res, n))
    y = jnp.tanh(jnp.sum(pre[..., None] * x, axis=-2))
    return jnp.einsum("...oi,...ic->...oc", h_res, x) + post[..., None] * y[..., None, :]


def liger_shapes(n, hidden):
    gates = dict.fromkeys(("alpha_pre", "alpha_post", "alpha_res"), ())
    return {"phi": (n * hidden, n * n + 2 * n), "b": (n * n + 2 * n,), **gates}


# ---- TransformerEngine ---------------------------------------------------------------------------


def transformer_engine(x, phi, alpha, beta, norm_weight):
    """Streams `[..., n, C]` here, `[..., C, n]` there."""
    x = x.swapaxes(-1, -2)
    n, v = x.shape[-1], flat(x)
    rms = jnp.sqrt(jnp.mean(v**2, axis=-1, keepdims=True) + float(np.finfo(np.float32).eps))
    pre, post, res = split(v @ (phi * norm_weight).T, n)
    b_pre, b_post, b_res = split(beta[0], n)
    pre = sigmoid(alpha[0] * pre / rms + b_pre)
    post = 2 * sigmoid(alpha[1] * post / rms + b_post)
    z = square(alpha[2] * res / rms + b_res, n)

    def step(potentials):
        f = -jax.nn.logsumexp(z + potentials[1][..., None, :], axis=-1)
        return f, -jax.nn.logsumexp(z + f[..., :, None], axis=-2)

    f, g = repeat(step, (0 * z[..., 0], 0 * z[..., 0]), 20)
    h_res = jnp.exp(f[..., :, None] + z + g[..., None, :])
    y = jnp.tanh((x @ pre[..., None])[..., 0])
    return (y[..., None] @ post[..., None, :] + x @ h_res).swapaxes(-1, -2)


def transformer_engine_shapes(n, hidden):
    num = n * n + 2 * n
    width = n * hidden
    return {"phi": (num, width), "alpha": (3,), "beta": (1, num), "norm_weight": (width,)}


def to_transformer_engine(params, tensors, n):
    phi, alpha, beta = convert.to_transformer_engine(params, streams=n)
    ones = jnp.ones_like(tensors["norm_weight"])
    return {"phi": phi, "alpha": alpha, "beta": beta, "norm_weight": ones}


FORMATS = {
    "deepseek_v4": deepseek_format(presets.DEEPSEEK_V4, deepseek(1e-6)),
    "glm5": deepseek_format(presets.GLM5, deepseek(1e-5)),
    "megatron_dev": deepseek_format(presets.MEGATRON_DEV, deepseek(1e-6, outside=True)),
    "hy4": Format(
        presets.HY4,
        lambda n, hidden: {"fn": (2 * n, n * hidden), "base": (2 * n,), "scale": (2,)},
        hy4,
        lambda t: convert.from_hy4(**t),
        lambda params, tensors, n: dict(
            zip(tensors, convert.to_hy4(params, streams=n), strict=True)
        ),
    ),
    "megatron": Format(
        presets.MEGATRON,
        lambda n, hidden: {
            "weight": (n * n + 2 * n, n * hidden), "alpha": (3,), "bias": (n * n + 2 * n,)
        },
        megatron,
        lambda t: convert.from_megatron(**t),
        lambda params, tensors, n: dict(
            zip(tensors, convert.to_megatron(params, streams=n), strict=True)
        ),
    ),
    "maxtext": Format(presets.MAXTEXT, maxtext_shapes, maxtext, convert.from_maxtext, to_maxtext),
    "maxtext_lite": Format(
        presets.MAXTEXT_LITE,
        lambda n, hidden: maxtext_shapes(n, hidden, lite=True),
        maxtext,
        convert.from_maxtext,
        to_maxtext,
    ),
    "liger": Format(
        presets.LIGER,
        liger_shapes,
        liger,
        lambda t: convert.from_liger(**t),
        lambda params, tensors, n: dict(
            zip(tensors, convert.to_liger(params, streams=n), strict=True)
        ),
    ),
    "transformer_engine": Format(
        presets.TRANSFORMER_ENGINE,
        transformer_engine_shapes,
        transformer_engine,
        lambda t: convert.from_transformer_engine(**t),
        to_transformer_engine,
    ),
    "deepseek_v41": deepseek_format(presets.DEEPSEEK_V41, deepseek_v41),
}  # fmt: skip


def tensors_of(name, n, hidden, sigma=3.0):
    """Tensors of a format by name, float32 numbers, for logits of standard deviation sigma."""
    rng = np.random.default_rng(list(FORMATS).index(name))
    tensors = {}
    for tensor, shape in FORMATS[name].shapes(n, hidden).items():
        if len(shape) == 2 and n * hidden in shape:
            value = rng.normal(size=shape) / math.sqrt(n * hidden)
        elif "norm" in tensor:
            value = rng.uniform(0.5, 1.5, shape)
        elif "scale" in tensor or "alpha" in tensor:
            value = sigma / math.sqrt(2) * rng.uniform(0.9, 1.1, shape)
        else:
            value = sigma / math.sqrt(2) * rng.normal(size=shape)
        tensors[tensor] = np.asarray(value, np.float32)
    return tensors
