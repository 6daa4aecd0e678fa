"""Calls that are refused while tracing: the type, op, argument and `got` of each error."""

import functools
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

import jax_mhc as mhc
import jax_mhc.equinox as mhc_eqx
from jax_mhc import MHCConfig, _errors, info
from jax_mhc._errors import shown
from jax_mhc._types import Context
from jax_mhc.flax import linen as mhc_linen
from jax_mhc.flax import nnx as mhc_nnx

KEY = jax.random.key(0)
N, C = 2, 3
PARAMS = mhc.init_params(KEY, streams=N, hidden=C)
HEAD = mhc.init_head(KEY, streams=N, hidden=C)
PERMUTED = MHCConfig(constraint="permutations")
CHANNELS = MHCConfig(form="channels")
DELAYED = MHCConfig(schedule="delayed")
X = jnp.ones((5, N, C), jnp.float32)
Y = jnp.ones((5, C), jnp.float32)
Z = jnp.ones((5, N, N), jnp.float32)
H = jnp.ones((5, N), jnp.float32)
STREAMS = mhc.as_streams(X)
SLICED = jnp.ones((2, 1))
CTX = Context(x=X, h_pre=H, h_post=H, h_res=Z)


def with_(record, **fields):
    """A copy with other fields."""
    return type(record)(**{**vars(record), **fields})


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def deleted(*shape):
    array = zeros(*shape)
    array.delete()
    return array


def deepseek(fn=(8, 6), base=(8,), scale=(3,), dtype=jnp.float32):
    return mhc.convert.from_deepseek_v4(*(zeros(*s, dtype=dtype) for s in (fn, base, scale)))


MAXTEXT = mhc.convert.to_maxtext(PARAMS, streams=N)
TENSORS = {
    f"layers.0.hc_{site}_{part}": np.asarray(array)
    for site in ("attn", "ffn")
    for part, array in zip(
        ("fn", "base", "scale"), mhc.convert.to_deepseek_v4(PARAMS, streams=N), strict=True
    )
}


def load(tensors, model="deepseek_v4"):
    return mhc.convert.load(tensors, model)


def of_files(files):
    """A call that loads the checkpoint in a folder with these files."""

    def call():
        with tempfile.TemporaryDirectory() as folder:
            for name, contents in files.items():
                if isinstance(contents, dict):
                    contents = safetensors.numpy.save(contents)
                (Path(folder) / name).write_bytes(contents)
            load(folder, "glm5")

    return call


def sublayer(layer, **options):
    return mhc.mhc_residual(layer, X, PARAMS, **options)


def residual_of_reference(x):
    """Plain JAX over streams that are made for the fused ops."""
    options = {"implementation": "reference"}
    return jnp.sum(
        mhc.mhc_residual(jnp.tanh, mhc.as_streams(x), PARAMS, **options).array(**options)
    )


def of_channels():
    return mhc.init_params(KEY, streams=N, hidden=C, config=CHANNELS, static=True)


def after_channels():
    return mhc.mhc_residual(jnp.sin, mhc.as_streams(X), of_channels(), config=CHANNELS)


def stack(layers=(jnp.tanh,), params=(PARAMS,), **options):
    return lambda: mhc.stack(layers, X, params, **options)


def stack_in_scan(num_params=4, num_xs=4, params=PARAMS, layers=(lambda u, s: s * u,), **options):
    stacked = jax.tree.map(lambda leaf: jnp.stack(num_params * [leaf]), params)
    return stack(layers, len(layers) * [stacked], xs={"w": zeros(num_xs)}, **options)


def remat_policy(*names, **options):
    return lambda: mhc.remat_policy(*names, **{"streams": N, "hidden": C, **options})


def module(layer=jnp.tanh, **options):
    return mhc_nnx.MHC(layer, C, streams=N, **options, rngs=nnx.Rngs(0))


def scan(body=lambda x, s: (x, None), init=STREAMS, xs=SLICED, **options):
    return lambda: mhc.scan(body, init, xs, **options)


def nnx_stack(*sublayers, options=None, **modules):
    """Of one block."""
    stacked = nnx.Dict(jax.tree.map(lambda leaf: leaf[None], modules))
    return lambda: mhc_nnx.stack(stacked, X, sublayers, **(options or {}))


def eqx_stack(*results, **options):
    """Of two functions as blocks, which return streams and something more."""

    def block(x, **arguments):
        return (x, *results) if results else 0.0

    return lambda: mhc_eqx.stack([block, block], X, **options)


def from_plain(plain=None, model=None, **options):
    """Of a product and its twin; what stands for them replaces them."""
    layer = nnx.Linear(C, C, use_bias=False, rngs=nnx.Rngs(0))
    plain = nnx.Dict(mlp=layer) if plain is None else plain
    model = nnx.Dict(mlp=module(layer)) if model is None else model
    return lambda: mhc_nnx.from_plain(plain, model, **options)


def kernel(*shape, name="kernel", **options):
    """A plain model with one weight."""
    return nnx.Dict(mlp=nnx.Dict({name: nnx.Param(zeros(*shape, **options))}))


class Counter(nnx.Module):
    """A layer whose variable changes."""

    def __init__(self):
        self.count = nnx.Variable(jnp.int32(0))

    def __call__(self, u):
        self.count[...] += 1
        return u


def shared_counter():
    counter = Counter()
    blocks = [nnx.Dict(a=module(counter)), nnx.Dict(a=module(counter))]
    return mhc_nnx.stack(blocks, X, ["a"])


def config(**settings):
    return lambda: MHCConfig(**settings)


def pre(x=X, params=PARAMS, **options):
    return lambda: mhc.pre(x, params, **options)


def post(y=Y, ctx=CTX, **options):
    return lambda: mhc.post(y, ctx, **options)


GAIN = mhc.diagnostics.Gain(H, H)


def watch(gain=GAIN, **options):
    return lambda: mhc.diagnostics.watch_gain(gain, **options)


def plot(gains, **options):
    return lambda: mhc.diagnostics.plot_gain(gains, **options)


def plot_mixing(h_res, **options):
    return lambda: mhc.diagnostics.plot_mixing(h_res, **options)


# Call, type of the error, and what the message says of: op, argument, what was got.
estimate = functools.partial(mhc.estimate, hidden=64, layers=2, tokens=8)

ERRORS = [
    # Settings.
    (config(constraint="simplex"), ValueError, "MHCConfig", "constraint", "'simplex'"),
    (config(constraint=None), ValueError, "MHCConfig", "constraint", "None"),
    (config(order="rows"), ValueError, "MHCConfig", "order", "'rows'"),
    (config(sinkhorn_eps_mode="max"), ValueError, "MHCConfig", "sinkhorn_eps_mode", "'max'"),
    (config(norm_eps_mode="in"), ValueError, "MHCConfig", "norm_eps_mode", "'in'"),
    (config(sinkhorn_iters=-1), ValueError, "MHCConfig", "sinkhorn_iters", "-1"),
    (config(sinkhorn_iters=10_001), ValueError, "MHCConfig", "sinkhorn_iters", "10001"),
    (config(sinkhorn_iters=True), TypeError, "MHCConfig", "sinkhorn_iters", "True (bool)"),
    (config(sinkhorn_iters=2.0), TypeError, "MHCConfig", "sinkhorn_iters", "2.0 (float)"),
    (config(sinkhorn_eps=-1e-6), ValueError, "MHCConfig", "sinkhorn_eps", "-1e-06"),
    (config(sinkhorn_eps=np.nan), ValueError, "MHCConfig", "sinkhorn_eps", "nan"),
    (config(norm_eps=-1), ValueError, "MHCConfig", "norm_eps", "-1.0"),
    (config(norm_eps=np.inf), ValueError, "MHCConfig", "norm_eps", "inf"),
    (config(norm_eps=False), TypeError, "MHCConfig", "norm_eps", "False (bool)"),
    (config(pre_eps="0"), TypeError, "MHCConfig", "pre_eps", "'0' (str)"),
    (config(pre_eps=-0.5), ValueError, "MHCConfig", "pre_eps", "-0.5"),
    (config(form="hc"), ValueError, "MHCConfig", "form", "'hc'"),
    (config(form="hyper_connections"), ValueError, "MHCConfig", "constraint", "'birkhoff'"),
    (
        config(form="hyper_connections", constraint="none", schedule="delayed"),
        ValueError, "MHCConfig", "schedule", "'delayed'",
    ),
    (
        config(form="channels", schedule="delayed"),
        ValueError, "MHCConfig", "schedule", "'delayed'",
    ),
    (config(post_eps=-0.5), ValueError, "MHCConfig", "post_eps", "-0.5"),
    (config(post_scale=0), ValueError, "MHCConfig", "post_scale", "0.0"),
    (config(post_scale=1j), TypeError, "MHCConfig", "post_scale", "1j (complex)"),
    # Streams.
    (pre([[1.0]]), TypeError, "pre", "x", "list"),
    (pre(zeros(5, N, C, dtype=jnp.int32)), TypeError, "pre", "x", "int32"),
    (pre(zeros(5, N, C, dtype=jnp.complex64)), TypeError, "pre", "x", "complex64"),
    (pre(zeros(5, N, C, dtype=bool)), TypeError, "pre", "x", "bool"),
    (pre(jax.random.split(KEY, (N, C))), TypeError, "pre", "x", "key<fry>"),
    (pre(zeros(C)), ValueError, "pre", "x", "[3]"),
    (pre(zeros(5, 17, C)), ValueError, "pre", "x", "[5, 17, 3]"),
    (pre(zeros(5, 0, C)), ValueError, "pre", "x", "[5, 0, 3]"),
    (pre(zeros(5, N, 0)), ValueError, "pre", "x", "[5, 2, 0]"),
    (lambda: mhc.head(zeros(C), HEAD), ValueError, "head", "x", "[3]"),
    (pre(zeros(5, N, C), hidden_axis_name="a"), ValueError, "pre", "hidden_axis_name", "'a'"),
    (pre(zeros(5, N, C), hidden_axis_name=3), TypeError, "pre", "hidden_axis_name", "3 (int)"),
    (lambda: mhc.reduce(zeros(C)), ValueError, "reduce", "x", "[3]"),
    (lambda: mhc.reduce(X, method="max"), ValueError, "reduce", "method", "'max'"),
    (lambda: mhc.expand(zeros(C), streams=0), ValueError, "expand", "streams", "0"),
    (lambda: mhc.expand(zeros(C), streams=17), ValueError, "expand", "streams", "17"),
    (lambda: mhc.expand(zeros(C), streams=2.0), TypeError, "expand", "streams", "2.0 (float)"),
    (lambda: mhc.expand(zeros(), streams=N), ValueError, "expand", "u", "[]"),
    (
        lambda: mhc.expand(zeros(C, dtype=jnp.int8), streams=N),
        TypeError, "expand", "u", "int8",
    ),
    # Parameters.
    (pre(params=HEAD), TypeError, "pre", "params", "HeadParams"),
    (pre(config="paper"), TypeError, "pre", "config", "str"),
    (pre(params=with_(PARAMS, phi=None)), ValueError, "pre", "params", "phi=None"),
    (pre(params=with_(PARAMS, alpha=None)), ValueError, "pre", "params", "alpha=None"),
    (pre(params=with_(PARAMS, phi=zeros(8, 6))), ValueError, "pre", "params.phi", "[8, 6]"),
    (pre(params=with_(PARAMS, alpha=zeros(1))), ValueError, "pre", "params.alpha", "[1]"),
    (pre(params=with_(PARAMS, bias=zeros(4))), ValueError, "pre", "params.bias", "[4]"),
    (pre(config=CHANNELS), ValueError, "pre", "params.bias", "[8]"),
    (
        pre(config=CHANNELS, params=with_(PARAMS, bias=zeros(16))),
        ValueError, "pre", "params.phi", "an array",
    ),
    (pre(config=mhc.presets.HYPER_CONNECTIONS), ValueError, "pre", "params.phi", "[6, 8]"),
    (
        pre(config=CHANNELS, params=of_channels(), implementation="fused"),
        ValueError, "pre", "implementation='fused'", "'channels'",
    ),
    (
        lambda: mhc.post(
            zeros(5, C), mhc.pre(X, of_channels(), config=CHANNELS)[1], implementation="fused"
        ),
        ValueError, "post", "implementation='fused'", "one of channels, [1, 2, 3]",
    ),
    (pre(zeros(5, N, 4)), ValueError, "pre", "params.phi", "[6, 8]"),
    (pre(zeros(5, 3, 2)), ValueError, "pre", "params.bias", "[8]"),
    (
        pre(config=MHCConfig(constraint="identity")),
        ValueError, "pre", "params.bias", "[8]",
    ),
    (
        pre(zeros(5, 5, C), config=PERMUTED),
        ValueError, "pre", "config.constraint", "'permutations'",
    ),
    (
        pre(params=with_(PARAMS, phi=zeros(6, 8, dtype=jnp.bfloat16))),
        TypeError, "pre", "params.phi", "bfloat16",
    ),
    (
        pre(params=with_(PARAMS, bias=zeros(8, dtype=jnp.float64))),
        TypeError, "pre", "params.bias", "float64",
    ),
    (pre(X.astype(jnp.float64)), TypeError, "pre", "params.bias", "float32"),
    (lambda: mhc.head(X, PARAMS), TypeError, "head", "params", "MHCParams"),
    (
        lambda: mhc.head(X, with_(HEAD, phi=zeros(2, 6))),
        ValueError, "head", "params.phi", "[2, 6]",
    ),
    (
        lambda: mhc.head(X, with_(HEAD, alpha=zeros())),
        ValueError, "head", "params.alpha", "[]",
    ),
    (
        lambda: mhc.head(X, with_(HEAD, bias=zeros(2, dtype=jnp.float16))),
        TypeError, "head", "params.bias", "float16",
    ),
    # The norm of the layer's input.
    (pre(norm_scale=zeros(4)), ValueError, "pre", "norm_scale", "[4]"),
    (pre(norm_scale=[1.0] * C), TypeError, "pre", "norm_scale", "list"),
    (pre(norm_scale=zeros(C, dtype=jnp.bfloat16)), TypeError, "pre", "norm_scale", "bfloat16"),
    (pre(norm_scale_eps=-1.0), ValueError, "pre", "norm_scale_eps", "-1.0"),
    (pre(norm_scale_eps="0"), TypeError, "pre", "norm_scale_eps", "'0' (str)"),
    (
        lambda: mhc.post_pre(Y, CTX, PARAMS, norm_scale=X),
        ValueError, "post_pre", "norm_scale", "[5, 2, 3]",
    ),
    (
        lambda: mhc.stack([jnp.sin], X, [PARAMS], norm_scale=[]),
        ValueError, "stack", "norm_scale", "0",
    ),
    (
        lambda: mhc.stack([jnp.sin], X, [PARAMS], norm_scale=[zeros(4)]),
        ValueError, "stack", "norm_scale[0]", "[4]",
    ),
    # The delayed schedule: arrays do not carry the h_pre of the sublayer before.
    (pre(config=DELAYED), ValueError, "pre", "x", "an array [5, 2, 3] alone"),
    (
        lambda: sublayer(jnp.sin, config=DELAYED),
        ValueError, "pre", "x", "an array [5, 2, 3] alone",
    ),
    (stack(config=DELAYED), ValueError, "stack", "x", "an array [5, 2, 3] alone"),
    (
        lambda: module(config=DELAYED)(X),
        ValueError, "pre", "x", "an array [5, 2, 3] alone",
    ),
    (lambda: mhc.collapse(X), ValueError, "collapse", "x", "an array [5, 2, 3] alone"),
    (
        lambda: mhc.reference.pre(X, PARAMS, config=DELAYED),
        ValueError, "reference.pre", "x", "an array [5, 2, 3] alone",
    ),
    (lambda: mhc.collapse(X, H[:4]), ValueError, "collapse", "h_pre", "[4, 2]"),
    (
        lambda: mhc.as_streams(STREAMS, h_pre=H),
        ValueError, "as_streams", "h_pre", shown(H) + " (ArrayImpl)",
    ),
    # A sublayer of form "channels", whose h_pre is none of streams, before one that reads it.
    *(
        (
            lambda then=then: then(after_channels()),
            ValueError, "Streams", "h_pre", "one of form 'channels'",
        )
        for then in (
            mhc.collapse,
            lambda x: mhc.collapse(x.reshape(-1)),
            lambda x: mhc.pre(x, PARAMS, config=DELAYED),
            lambda x: mhc.mhc_residual(jnp.sin, x, PARAMS, config=DELAYED),
            lambda x: mhc.stack([jnp.sin], x, [PARAMS], config=DELAYED),
        )
    ),
    (
        lambda: mhc.post_pre(
            Y, mhc.pre(X, of_channels(), config=CHANNELS)[1], PARAMS, config=DELAYED
        ),
        ValueError, "post_pre", "ctx.h_pre", "[1, 2, 3]",
    ),
    # Layer outputs and contexts.
    (post(Y.astype(jnp.bfloat16)), TypeError, "post", "y", "bfloat16"),
    (post(zeros(4, C)), ValueError, "post", "y", "[4, 3]"),
    (post(X), ValueError, "post", "y", "[5, 2, 3]"),
    (lambda: mhc.post(Y, CTX, bias=zeros(N)), ValueError, "post", "bias", "[2]"),
    (
        post(ctx=Context._of(X, X[:4], H, H, Z)),
        ValueError, "post", "ctx", "one for float32[4, 2, 3]",
    ),
    (post(ctx=X), TypeError, "post", "ctx", type(X).__name__),
    (post(ctx=with_(CTX, x=zeros(5, 3, C))), ValueError, "post", "ctx.h_pre", "[5, 2]"),
    (post(ctx=with_(CTX, h_post=zeros(4, N))), ValueError, "post", "ctx.h_post", "[4, 2]"),
    (post(ctx=with_(CTX, h_res=zeros(5, N, 3))), ValueError, "post", "ctx.h_res", "[5, 2, 3]"),
    (
        post(ctx=with_(CTX, h_res=Z.astype(jnp.bfloat16))),
        TypeError, "post", "ctx.h_res", "bfloat16",
    ),
    (
        post(ctx=with_(CTX, x=X.astype(jnp.int32))),
        TypeError, "post", "ctx.x", "int32",
    ),
    (
        lambda: mhc.post_pre(zeros(4, C), CTX, PARAMS),
        ValueError, "post_pre", "y", "[4, 3]",
    ),
    (
        lambda: mhc.post_pre(Y, CTX, with_(PARAMS, phi=zeros(4, 8))),
        ValueError, "post_pre", "params.phi", "[4, 8]",
    ),
    # A whole sublayer.
    (lambda: sublayer(PARAMS), TypeError, "mhc_residual", "layer", "MHCParams"),
    (lambda: sublayer(lambda u: u[0]), ValueError, "mhc_residual", "layer's result", "[3]"),
    (
        lambda: sublayer(lambda u: u.astype(jnp.float16)),
        TypeError, "mhc_residual", "layer's result", "float16",
    ),
    (
        lambda: sublayer(lambda u: None),
        TypeError, "mhc_residual", "layer's result", "NoneType",
    ),
    (
        lambda: sublayer(lambda u: (u, 1)),
        TypeError, "mhc_residual", "layer's result", "a tuple of 2",
    ),
    (
        lambda: sublayer(lambda u, s: u),
        TypeError, "mhc_residual", "layer",
        "one that is not: <lambda>.<locals>.<lambda>() missing 1 required positional argument: 's'",
    ),
    (
        lambda: sublayer(lambda u: u, has_aux=True),
        TypeError, "mhc_residual", "layer's result", type(X).__name__,
    ),
    (
        lambda: sublayer(lambda u: (u, 1, 2), has_aux=True),
        TypeError, "mhc_residual", "layer's result", "a tuple of 3",
    ),
    # Sinkhorn.
    (
        lambda: mhc.sinkhorn(Z.astype(jnp.bfloat16)),
        TypeError, "sinkhorn", "logits", "bfloat16",
    ),
    (lambda: mhc.sinkhorn(zeros(4)), ValueError, "sinkhorn", "logits", "[4]"),
    (lambda: mhc.sinkhorn(zeros(2, 3)), ValueError, "sinkhorn", "logits", "[2, 3]"),
    (lambda: mhc.sinkhorn(zeros(17, 17)), ValueError, "sinkhorn", "logits", "[17, 17]"),
    (
        lambda: mhc.sinkhorn(Z, config=MHCConfig(constraint="none")),
        ValueError, "sinkhorn", "config.constraint", "'none'",
    ),
    # Settings that only float64 holds.
    (pre(config=MHCConfig(post_scale=1e300)), ValueError, "pre", "config.post_scale", "1e+300"),
    (pre(config=MHCConfig(norm_eps=1e-60)), ValueError, "pre", "config.norm_eps", "1e-60"),
    (pre(norm_scale_eps=1e39), ValueError, "pre", "norm_scale_eps", "1e+39"),
    # Values that are no array, or no longer.
    (pre(np.array([None])), TypeError, "pre", "x", "array([None], dtype=object) (ndarray)"),
    (pre(deleted(5, N, C)), ValueError, "pre", "x", "a deleted one, float32[5, 2, 3]"),
    # Implementations.
    (pre(implementation="cuda"), ValueError, "pre", "implementation", "'cuda'"),
    # Initial values.
    (
        lambda: mhc.init_params(3, streams=N, hidden=C),
        TypeError, "init_params", "key", "3 (int)",
    ),
    (
        lambda: mhc.init_params(jax.random.split(KEY, 3), streams=N, hidden=C),
        TypeError, "init_params", "key", "key<fry>[3]",
    ),
    (
        lambda: mhc.init_params(KEY, streams=N, hidden=C, static="yes"),
        TypeError, "init_params", "static", "'yes' (str)",
    ),
    (
        lambda: mhc.init_params(KEY, streams=N, hidden=2**31),
        ValueError, "init_params", "hidden", "2147483648",
    ),
    (
        lambda: mhc.init_params(KEY, streams=17, hidden=C),
        ValueError, "init_params", "streams", "17",
    ),
    (
        lambda: mhc.init_params(KEY, streams=N, hidden=0),
        ValueError, "init_params", "hidden", "0",
    ),
    (
        lambda: mhc.init_params(KEY, streams=N, hidden=C, dtype=jnp.bfloat16),
        TypeError, "init_params", "dtype", "bfloat16",
    ),
    (
        lambda: mhc.init_params(KEY, streams=N, hidden=C, config=None),
        TypeError, "init_params", "config", "NoneType",
    ),
    (
        lambda: mhc.init_params(KEY, streams=N, hidden=C, config=MHCConfig(post_scale=0.5)),
        ValueError, "init_params", "config.post_scale", "0.5",
    ),
    (
        lambda: mhc.init_params(KEY, streams=N, hidden=C, config=CHANNELS),
        ValueError, "init_params", "static", "False",
    ),
    (
        lambda: CHANNELS.num_coefficients(2),
        TypeError, "MHCConfig.num_coefficients", "hidden", "None (NoneType)",
    ),
    (
        lambda: mhc.init_params(KEY, streams=N, hidden=C, config=MHCConfig(post_eps=1)),
        ValueError, "init_params", "config.post_eps", "1.0",
    ),
    (
        lambda: mhc.init_head(KEY, streams=N, hidden=C, config=MHCConfig(pre_eps=0.5)),
        ValueError, "init_head", "config.pre_eps", "0.5",
    ),
    (
        lambda: mhc.init_params(KEY, streams=5, hidden=C, config=PERMUTED),
        ValueError, "init_params", "config.constraint", "'permutations'",
    ),
    (
        lambda: PERMUTED.num_coefficients(5),
        ValueError, "MHCConfig.num_coefficients", "config.constraint", "'permutations'",
    ),
    # Conversion.
    (
        lambda: deepseek(fn=(8,)),
        ValueError, "convert.from_deepseek_v4", "fn", "[8]",
    ),
    (
        lambda: deepseek(fn=(9, 6)),
        ValueError, "convert.from_deepseek_v4", "fn", "[9, 6]",
    ),
    (
        lambda: deepseek(fn=(8, 7)),
        ValueError, "convert.from_deepseek_v4", "fn", "[8, 7]",
    ),
    (
        lambda: deepseek(base=(6,)),
        ValueError, "convert.from_deepseek_v4", "base", "[6]",
    ),
    (
        lambda: deepseek(scale=(1,)),
        ValueError, "convert.from_deepseek_v4", "scale", "[1]",
    ),
    (
        lambda: deepseek(dtype=jnp.int8),
        TypeError, "convert.from_deepseek_v4", "fn", "int8",
    ),
    (
        lambda: mhc.convert.from_deepseek_v4(None, None, None),
        TypeError, "convert.from_deepseek_v4", "fn", "NoneType",
    ),
    (
        lambda: mhc.convert.from_hy4(zeros(9, 6), zeros(9), zeros(2)),
        ValueError, "convert.from_hy4", "fn", "[9, 6]",
    ),
    (
        lambda: mhc.convert.from_hy4(zeros(4, 6), zeros(4), zeros(3)),
        ValueError, "convert.from_hy4", "scale", "[3]",
    ),
    (
        lambda: mhc.convert.to_hy4(PARAMS),
        ValueError, "convert.to_hy4", "params.phi", "[6, 8]",
    ),
    (
        lambda: mhc.convert.from_megatron(zeros(8, 6), zeros(3), zeros(4)),
        ValueError, "convert.from_megatron", "bias", "[4]",
    ),
    (
        lambda: mhc.convert.head_from_deepseek_v4(zeros(2, 7), zeros(2), zeros(1)),
        ValueError, "convert.head_from_deepseek_v4", "hc_fn", "[2, 7]",
    ),
    (
        lambda: mhc.convert.head_from_deepseek_v4(zeros(2, 6), zeros(2), zeros()),
        ValueError, "convert.head_from_deepseek_v4", "hc_scale", "[]",
    ),
    (
        lambda: mhc.convert.to_deepseek_v4(HEAD),
        TypeError, "convert.to_deepseek_v4", "params", "HeadParams",
    ),
    (
        lambda: mhc.convert.to_deepseek_v4(with_(PARAMS, phi=None, alpha=None)),
        ValueError, "convert.to_deepseek_v4", "params.phi", "None",
    ),
    (
        lambda: mhc.convert.to_deepseek_v4(
            mhc.init_params(KEY, streams=3, hidden=C, config=MHCConfig(constraint="identity"))
        ),
        ValueError, "convert.to_deepseek_v4", "params.phi", "[9, 6]",
    ),
    (
        # As many columns as those of 2 streams, but two gates.
        lambda: mhc.convert.to_deepseek_v4(
            mhc.init_params(KEY, streams=4, hidden=C, config=MHCConfig(constraint="identity"))
        ),
        ValueError, "convert.to_deepseek_v4", "params.alpha", "[2]",
    ),
    (
        lambda: mhc.convert.to_deepseek_v4(PARAMS, streams=3),
        ValueError, "convert.to_deepseek_v4", "params.phi", "[6, 8]",
    ),
    (
        lambda: mhc.convert.head_to_deepseek_v4(PARAMS),
        TypeError, "convert.head_to_deepseek_v4", "params", "MHCParams",
    ),
    (
        lambda: mhc.convert.from_maxtext(None),
        TypeError, "convert.from_maxtext", "tensors", "None (NoneType)",
    ),
    (
        lambda: mhc.convert.from_maxtext({**MAXTEXT, "post_beta": None, "gate": None}),
        ValueError, "convert.from_maxtext", "tensors", "besides gate",
    ),
    (
        lambda: mhc.convert.from_maxtext({**MAXTEXT, "pre_alpha": zeros(7, 2)}),
        ValueError, "convert.from_maxtext", "tensors['pre_alpha']", "[7, 2]",
    ),
    (
        lambda: mhc.convert.to_maxtext(
            mhc.init_params(KEY, streams=3, hidden=C), like=MAXTEXT
        ),
        ValueError, "convert.to_maxtext", "like", "those of one [6, 8]",
    ),
    (lambda: load(None), TypeError, "convert.load", "path_or_mapping", "None (NoneType)"),
    (
        lambda: load("/no/such"),
        ValueError, "convert.load", "path_or_mapping", "'/no/such'",
    ),
    (lambda: load({}), ValueError, "convert.load", "path_or_mapping", "names of 0 kinds of models"),
    (
        lambda: load({**TENSORS, "layers.0.hc_attn_fn_scale_inv": X}),
        ValueError, "convert.load", "path_or_mapping", "layers.0.hc_attn_fn_scale_inv",
    ),
    (
        lambda: load({**TENSORS, "model.layers.0.attn_hc.fn": X}),
        ValueError, "convert.load", "model.layers.0.attn_hc.fn", "layers.0.hc_attn_fn, too",
    ),
    (lambda: load(TENSORS, None), ValueError, "convert.load", "model", "None and no config.json"),
    (lambda: load(TENSORS, "megatron"), ValueError, "convert.load", "model", "'megatron'"),
    (
        lambda: load({**TENSORS, "hc_head_fn": X}, "deepseek_v41"),
        ValueError, "convert.load", "path_or_mapping", "besides head.fn",
    ),
    (
        lambda: load(TENSORS),
        ValueError, "convert.load", "path_or_mapping", "none of head.fn, head.base, head.scale",
    ),
    (
        lambda: load(TENSORS, {"model_type": "glm5_next", "hidden_size": 7}),
        ValueError, "convert.load", "layers.0.hc_attn_fn", "shape [8, 6]",
    ),
    (
        lambda: load({**TENSORS, "layers.0.hc_ffn_base": zeros(9)}, "glm5"),
        ValueError, "convert.load", "layers.0.hc_ffn_base", "[9]",
    ),
    (
        lambda: load(TENSORS, {"model_type": "glm5_next", "hc_mult": "2"}),
        ValueError, "convert.load", "hc_mult of config.json", "'2' (str)",
    ),
    (
        lambda: load({f"moe_layers.mhc_mlp.{k}": v for k, v in MAXTEXT.items()}, "maxtext"),
        ValueError, "convert.load", "moe_layers.mhc_mlp.mhc_norm.scale", "shape [6]",
    ),
    (
        lambda: load(
            {f"{layer}.mhc_mlp.{k}": v[:, None] if layer == "layers" else v
             for k, v in MAXTEXT.items() for layer in ("layers", "layers_0")},
            "maxtext",
        ),
        ValueError, "convert.load", "layers_0.mhc_mlp.mhc_norm.scale",
        "layers.mhc_mlp.mhc_norm.scale[:, 0], too",
    ),
    (
        of_files({"a.safetensors": b"short"}),
        ValueError, "convert.load", "path_or_mapping", "something else",
    ),
    (of_files({}), ValueError, "convert.load", "path_or_mapping", "one with 0 files and 0 indices"),
    (
        of_files({"a.safetensors": TENSORS, "b.safetensors": TENSORS}),
        ValueError, "convert.load", "layers.0.hc_attn_base",
        "one in a.safetensors and in b.safetensors",
    ),
    (
        of_files({"a.safetensors": {n: t.astype(np.int8) for n, t in TENSORS.items()}}),
        TypeError, "convert.load", "layers.0.hc_attn_base", "I8",
    ),
    (
        lambda: mhc.convert.save({}, {}),
        TypeError, "convert.save", "checkpoint", "{} (dict)",
    ),
    (
        lambda: mhc.convert.save(load(TENSORS, "glm5"), "/"),
        ValueError, "convert.save", "path_or_mapping", "'/'",
    ),
    (
        lambda: mhc.convert.save(with_(load(TENSORS, "glm5"), head=HEAD), {}),
        ValueError, "convert.save", "checkpoint", "besides head",
    ),
    # Stacks.
    (lambda: mhc.stack([], Y[0], []), ValueError, "stack", "x", "[3]"),
    (stack(config={}), TypeError, "stack", "config", "dict"),
    (stack(lambda u: u), TypeError, "stack", "layers", "function"),
    (stack(params=PARAMS), TypeError, "stack", "params", "MHCParams"),
    (stack([jnp.tanh, 3], 2 * [PARAMS]), TypeError, "stack", "layers[1]", "int"),
    (stack(2 * [jnp.tanh]), ValueError, "stack", "params", "1"),
    (stack(2 * [jnp.tanh], [PARAMS, HEAD]), TypeError, "stack", "params[1]", "HeadParams"),
    (
        stack(params=[with_(PARAMS, phi=zeros(6, 7))]),
        ValueError, "stack", "params[0].phi", "[6, 7]",
    ),
    (stack([lambda u: u[:4]]), ValueError, "stack", "the result of layers[0]", "[4, 3]"),
    (stack([lambda u: (u, 0)]), TypeError, "stack", "the result of layers[0]", "a tuple of 2"),
    (
        stack([lambda u: (u, 0.0, 1.0)], has_aux=True),
        TypeError, "stack", "the result of layers[0]", "a tuple of 3",
    ),
    (stack(has_aux="mean"), TypeError, "stack", "has_aux", "'mean' (str)"),
    (
        stack([lambda u: (u, 0.0), lambda u: (u, {"loss": 0.0})], 2 * [PARAMS], has_aux="sum"),
        ValueError, "stack", "the aux of layers", "PyTreeDef({'loss': *})",
    ),
    (stack(recompute="auto"), TypeError, "stack", "recompute", "'auto' (str)"),
    (lambda: mhc.Recompute(every=0), ValueError, "Recompute", "every", "0"),
    (stack(unroll=2), ValueError, "stack", "unroll", "2"),
    (stack_in_scan(unroll=0), ValueError, "stack", "unroll", "0"),
    (stack(xs=[object]), TypeError, "stack", "xs[0]", "<class 'object'> (type)"),
    (stack_in_scan(num_xs=3), ValueError, "stack", "params[0].phi", "shape [4, 6, 8]"),
    (stack(xs=[zeros(2), zeros(3)]), ValueError, "stack", "xs[1]", "shape [3]"),
    (stack([], [], xs=0.0), ValueError, "stack", "xs", "shape []"),
    (stack([], [], xs=()), ValueError, "stack", "xs", "none, nor any params"),
    (
        stack_in_scan(params=with_(PARAMS, alpha=zeros(2))),
        ValueError, "stack", "a slice of params[0].alpha", "[2]",
    ),
    (
        stack_in_scan(layers=2 * [lambda u, s: u], recompute=mhc.Recompute(every=3)),
        ValueError, "stack", "recompute.every", "3",
    ),
    (
        stack_in_scan(recompute=mhc.Recompute(every=3)),
        ValueError, "stack", "recompute.every", "3",
    ),
    (lambda: mhc.Recompute(every="some"), TypeError, "Recompute", "every", "'some' (str)"),
    (lambda: mhc.Recompute(policy="outputs"), ValueError, "Recompute", "policy", "'outputs'"),
    (
        lambda: mhc.stack_with_samples([jnp.tanh], X, [PARAMS], sample_tokens=0),
        ValueError, "stack_with_samples", "sample_tokens", "0",
    ),
    (remat_policy("outputs"), ValueError, "remat_policy", "recompute", "'outputs'"),
    (remat_policy(streams=17), ValueError, "remat_policy", "streams", "17"),
    (remat_policy(hidden=0), ValueError, "remat_policy", "hidden", "0"),
    (remat_policy(layers="dots"), TypeError, "remat_policy", "layers", "'dots'"),
]  # fmt: skip

ERRORS += [
    (
        lambda: mhc.diagnostics.sample_tokens(Z, 0),
        ValueError, "diagnostics.sample_tokens", "count", "0",
    ),
    (watch(Z), TypeError, "diagnostics.watch_gain", "gain", type(Z).__name__),
    (watch(band=(2, 0.5)), ValueError, "diagnostics.watch_gain", "band", "(2, 0.5)"),
    (watch(band=(1, 1)), ValueError, "diagnostics.watch_gain", "band", "(1, 1)"),
    (watch(band=(0, 2)), ValueError, "diagnostics.watch_gain", "band", "(0, 2)"),
    (watch(band=(0.5, np.nan)), ValueError, "diagnostics.watch_gain", "band", "(0.5, nan)"),
    (watch(band=0.5), ValueError, "diagnostics.watch_gain", "band", "0.5"),
    (watch(band=(1, 2, 3)), ValueError, "diagnostics.watch_gain", "band", "(1, 2, 3)"),
    (watch(step=0.5), TypeError, "diagnostics.watch_gain", "step", "0.5"),
    (watch(step="0"), TypeError, "diagnostics.watch_gain", "step", "'0'"),
    (watch(name=3), TypeError, "diagnostics.watch_gain", "name", "3 (int)"),
    (watch(callback=3), TypeError, "diagnostics.watch_gain", "callback", "int"),
    (
        watch(mhc.diagnostics.Gain(H, H > 0)),
        TypeError, "diagnostics.watch_gain", "gain.backward", "dtype bool",
    ),
    (plot(Z), TypeError, "diagnostics.plot_gain", "gains", type(Z).__name__),
    (plot({"a": H}), TypeError, "diagnostics.plot_gain", "gains", f"dict of {type(H).__name__}"),
    (
        plot(mhc.diagnostics.Gain(H[0, 0], H[0, 0])),
        ValueError, "diagnostics.plot_gain", "gains", "[]",
    ),
    (
        plot({"a": mhc.diagnostics.Gain(H[:0], H[:0])}),
        ValueError, "diagnostics.plot_gain", "gains['a']", "[0, 2]",
    ),
    (plot(GAIN, x=[1, 2]), ValueError, "diagnostics.plot_gain", "x", "[2]"),
    (plot(GAIN, x=1), ValueError, "diagnostics.plot_gain", "x", "[]"),
    (plot(GAIN, x=5 * ["a"]), TypeError, "diagnostics.plot_gain", "x", "dtype <U1"),
    (plot(GAIN, axes=3), TypeError, "diagnostics.plot_gain", "axes", "3"),
    (
        lambda: jax.eval_shape(lambda gain: plot(gain)(), GAIN),
        TypeError, "diagnostics.plot_gain", "gains", "values of a traced function",
    ),
    (plot_mixing(Z, sublayers=3), TypeError, "diagnostics.plot_mixing", "sublayers", "3 (int)"),
    (plot_mixing(zeros(4, 3)), ValueError, "diagnostics.plot_mixing", "h_res", "[4, 3]"),
    (plot_mixing(zeros(4, 4)), ValueError, "diagnostics.plot_mixing", "h_res", "[4, 4]"),
    (plot_mixing(Z, sublayers=[5]), ValueError, "diagnostics.plot_mixing", "sublayers", "5"),
    (plot_mixing(Z, axes=[]), ValueError, "diagnostics.plot_mixing", "axes", "0"),
    (
        plot_mixing(mhc.diagnostics.mixing(Z), sublayers=[0]),
        ValueError, "diagnostics.plot_mixing", "sublayers", "[0]",
    ),
]  # fmt: skip

ERRORS += [
    (
        lambda: mhc.diagnostics.amax_gain(zeros(4, 4, dtype=jnp.bfloat16)),
        TypeError, "diagnostics.amax_gain", "h_res", "bfloat16",
    ),
    (
        lambda: mhc.diagnostics.mixing(zeros(4, 3)),
        ValueError, "diagnostics.mixing", "h_res", "[4, 3]",
    ),
    (
        lambda: mhc.diagnostics.composite(zeros(4, 4)),
        ValueError, "diagnostics.composite", "h_res", "[4, 4]",
    ),
    (
        lambda: mhc.diagnostics.stream_similarity(zeros(1, 8)),
        ValueError, "diagnostics.stream_similarity", "x", "[1, 8]",
    ),
    # Modules; more of them in test_modules.py.
    (lambda: module()(Y), ValueError, "flax.nnx.MHC", "x", "[5, 3]"),
    (
        lambda: module(lambda u: u[:4])(X),
        ValueError, "flax.nnx.MHC", "the layer's result", "[4, 3]",
    ),
    (
        lambda: mhc_nnx.MHC(jnp.tanh, C, rngs=0),
        TypeError, "flax.nnx.MHC", "rngs", "0 (int)",
    ),
    (
        lambda: nnx.merge(*jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16), nnx.split(module())
        ))(X.astype(jnp.bfloat16)),
        TypeError, "flax.nnx.MHC", "phi", "bfloat16",
    ),
    (lambda: module(param_dtype="int8"), TypeError, "flax.nnx.MHC", "param_dtype", "int8"),
    (
        lambda: module(axis_names={"phi": ("embed",)}),
        ValueError, "flax.nnx.MHC", "axis_names", "{'phi': ('embed',)}",
    ),
    (
        lambda: mhc_nnx.stack(module(), X, ["mlp"], config=MHCConfig()),
        TypeError, "flax.nnx.stack", "config", f"{_errors.shown(MHCConfig())} (MHCConfig)",
    ),
    (nnx_stack(), ValueError, "flax.nnx.stack", "sublayers", "()"),
    (lambda: mhc_nnx.stack(module(), X, "mlp"), ValueError, "flax.nnx.stack", "sublayers", "'mlp'"),
    (nnx_stack("a", "b", a=module()), TypeError, "flax.nnx.stack", "blocks.b", "NoneType"),
    (
        nnx_stack("a", "b", a=module(), b=module(norm_scale_eps=0.1)),
        ValueError, "flax.nnx.stack", "blocks.b.norm_scale_eps", "0.1",
    ),
    (
        shared_counter,
        ValueError, "flax.nnx.stack", "blocks.a.layer.count", "a Variable that does",
    ),
    (
        nnx_stack("a", a=module(), options={"arguments": {"scale": 1}}),
        TypeError, "flax.nnx.stack", "arguments", "{'scale': 1} (dict)",
    ),
    (
        nnx_stack("a", a=module(), options={"xs": {"b": {}}}),
        TypeError, "flax.nnx.stack", "xs", "{'b': {}} (dict)",
    ),
    (
        nnx_stack("a", a=module(lambda u: (u, u))),
        TypeError, "flax.nnx.stack", "the result of blocks.a.layer", "a tuple of 2",
    ),
    (eqx_stack(), TypeError, "equinox.stack", "the result of a block", "0.0 (float)"),
    (eqx_stack(X), TypeError, "equinox.stack", "the result of a block", "a tuple of 2"),
    (
        eqx_stack(X, recompute=mhc.Recompute(every=2)),
        TypeError, "equinox.stack", "recompute", "none",
    ),
    (eqx_stack(X, unroll=2), ValueError, "equinox.stack", "unroll", "2"),
    (eqx_stack(X, arguments=3), TypeError, "equinox.stack", "arguments", "3 (int)"),
    (eqx_stack(X, xs={"u": zeros(3, 2)}), ValueError, "equinox.stack", "xs['u']", "shape [3, 2]"),
    (
        lambda: mhc_linen.stack(mhc_linen.MHC(jnp.tanh, C), X, 2),
        TypeError, "flax.linen.stack", "block", "a MHC outside of one",
    ),
    (lambda: mhc.param_labels("model"), TypeError, "param_labels", "params", "'model' (str)"),
    # Weights of a plain model.
    (from_plain(model=kernel(C, C)), ValueError, "flax.nnx.from_plain", "mhc_model", "none"),
    (from_plain(plain=3), TypeError, "flax.nnx.from_plain", "plain", "int"),
    (from_plain(names="mlp"), TypeError, "flax.nnx.from_plain", "names", "'mlp' (str)"),
    (from_plain(names={"up": "mlp"}), ValueError, "flax.nnx.from_plain", "names", "'up'"),
    (
        from_plain(kernel(C, C, name="w")), ValueError, "flax.nnx.from_plain",
        "mhc_model.mlp.layer.kernel", "none; left over there: mlp.w",
    ),
    (
        from_plain(model=nnx.Dict(mlp=module(norm=True)), names={"mlp.layer": "mlp"}),
        ValueError, "flax.nnx.from_plain", "names", "'mlp.layer'",
    ),
    (
        from_plain(model=nnx.Dict(mlp=module(norm=True))), ValueError, "flax.nnx.from_plain",
        "mhc_model.mlp.norm_scale", "none; left over there: mlp.kernel",
    ),
    (
        from_plain(model=nnx.Dict(mlp=module())),
        ValueError, "flax.nnx.from_plain", "plain.mlp.kernel", "none",
    ),
    (
        from_plain(kernel(C, 2)),
        ValueError, "flax.nnx.from_plain", "plain.mlp.kernel", "float32[3, 2]",
    ),
    (
        from_plain(kernel(C, C, dtype=jnp.bfloat16)),
        TypeError, "flax.nnx.from_plain", "plain.mlp.kernel", "bfloat16[3, 3]",
    ),
    (
        from_plain(nnx.eval_shape(lambda: kernel(C, C))),
        TypeError, "flax.nnx.from_plain", "plain.mlp.kernel", "ShapeDtypeStruct",
    ),
    (
        lambda: mhc_linen.from_plain(nn.Dense(C), {}),
        TypeError, "flax.linen.from_plain", "plain_variables", "Dense",
    ),
    # Scans.
    (scan(body="block"), TypeError, "scan", "body", "str"),
    (scan(lambda x, s: x), TypeError, "scan", "the result of body", shown(STREAMS)),
    (scan(xs={"w": zeros(3, 2), "v": zeros(2)}), ValueError, "scan", "xs['w']", "shape [3, 2]"),
    (scan(xs=None), ValueError, "scan", "length", "None"),
    (scan(xs=None, length=-1), ValueError, "scan", "length", "-1"),
    (
        scan(lambda x, s: (x.array(), None)),
        TypeError, "scan", "the carry that body returned", "PyTreeDef(*)",
    ),
    (
        scan(lambda x, s: (x[:2], None), X),
        TypeError, "scan", "the carry that body returned", f"float32{[2, *X.shape[1:]]}",
    ),
    # Streams that carry a post.
    (lambda: mhc.Streams(X), TypeError, "Streams", "Streams(...)", "a call of the class"),
    (lambda: STREAMS + 1, TypeError, "Streams", "x + y", shown(STREAMS)),
    (lambda: X @ STREAMS, TypeError, "Streams", "operand", shown(STREAMS)),
    (lambda: -STREAMS, TypeError, "Streams", "-x", shown(STREAMS)),
    (lambda: STREAMS == STREAMS, TypeError, "Streams", "x == y", shown(STREAMS)),  # noqa: PLR0124 - it raises
    # Without an error of its own, this would be an endless loop.
    (lambda: list(STREAMS), TypeError, "Streams", "iter(x)", shown(STREAMS)),
    (lambda: bool(STREAMS), TypeError, "Streams", "bool(x)", shown(STREAMS)),
    (lambda: STREAMS.mean(-2), AttributeError, "Streams", "x.mean", shown(STREAMS)),
    (lambda: STREAMS[0, 0], ValueError, "Streams", "index", "(0, 0) (tuple)"),
    (lambda: STREAMS.reshape(7), ValueError, "Streams.reshape", "tokens", "(7,) (tuple)"),
    (
        lambda: STREAMS.map_tokens(lambda part: part[..., :1]),
        ValueError, "Streams.map_tokens", "function",
        "parts float32[5, 2, 1], float32[5, 1], float32[5, 1], float32[5, 1], float32[5, 2, 1]",
    ),
    (
        lambda: STREAMS.map_tokens(lambda part: None),
        TypeError, "Streams.map_tokens", "function",
        f"parts {', '.join(5 * ['None (NoneType)'])}",
    ),
    (
        lambda: jax.tree.map(lambda part: part[..., :1], STREAMS).array(),
        ValueError, "Streams", "parts",
        "parts float32[5, 2, 1], float32[5, 1], float32[5, 1], float32[5, 1], float32[5, 2, 1]",
    ),
    # Streams of another n or width, and streams where there are none.
    (pre(STREAMS, with_(PARAMS, phi=zeros(4, 8))), ValueError, "pre", "params.phi", "[4, 8]"),
    (
        lambda: sublayer(lambda u: mhc.expand(u, streams=N)),
        TypeError, "mhc_residual", "layer's result", shown(STREAMS),
    ),
    (lambda: mhc.expand(STREAMS, streams=N), TypeError, "expand", "u", shown(STREAMS)),
    (
        lambda: mhc_nnx.MHC(jnp.tanh, C, streams=4, rngs=nnx.Rngs(0))(STREAMS),
        ValueError, "flax.nnx.MHC", "x", "[5, 2, 3]",
    ),
    (
        lambda: jax.jvp(residual_of_reference, (X,), (X,)),
        TypeError, "as_streams", "derivative", "forward mode (jax.jvp, jax.jacfwd, jax.linearize)",
    ),
    *(
        (
            lambda of_gradient=of_gradient: of_gradient(jax.grad(residual_of_reference))(X),
            TypeError, "as_streams", "derivative", "a derivative of the derivative",
        )
        for of_gradient in (
            lambda gradient: jax.grad(lambda x: jnp.sum(gradient(x) ** 2)),
            lambda gradient: lambda x: jax.jvp(gradient, (x,), (x,)),
        )
    ),
    # A configuration that is asked about.
    (
        lambda: info.configuration(4, 64, constraint="head", norm=True),
        ValueError, "info.configuration", "norm", "one",
    ),
    (
        lambda: info.configuration(4, 64, constraint="head", schedule="delayed"),
        ValueError, "info.configuration", "schedule", "'delayed'",
    ),
    (
        lambda: info.configuration(4, 64, capability="9"),
        ValueError, "info.configuration", "capability", "9",
    ),
    # Costs.
    (lambda: estimate(gpu="V100"), ValueError, "estimate", "gpu", "'V100'"),
    (lambda: estimate(recompute=4), TypeError, "estimate", "recompute", "4 (int)"),
    (
        lambda: estimate(recompute=mhc.Recompute(policy=jax.checkpoint_policies.dots_saveable)),
        ValueError, "estimate", "recompute.policy", "a function",
    ),
    (
        lambda: estimate(recompute=mhc.Recompute(every=3)),
        ValueError, "estimate", "recompute.every", "3",
    ),
    (
        lambda: mhc.diagnostics.summary(zeros(4, 4)),
        ValueError, "diagnostics.summary", "h_res", "[4, 4]",
    ),
    (
        lambda: mhc.bench._check_writable(Path("a.xyz")),
        ValueError, "bench", "--picture", "'a.xyz'",
    ),
    (
        lambda: mhc.bench._check_writable(Path("no_such_folder/a.svg")),
        ValueError, "bench", "--picture", "'no_such_folder/a.svg'",
    ),
    # Streams in another place than before the channels.
    (
        lambda: mhc.mhc_residual(jnp.tanh, zeros(4, 2, 16, C), PARAMS),
        ValueError, "pre", "params.bias", "[8]",
    ),
    # Optional dependencies.
    (lambda: _errors.require("op", "no_such", "some"), ImportError, "op", "no_such", "none"),
]  # fmt: skip
