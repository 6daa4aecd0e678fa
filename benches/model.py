"""The language model whose training step is timed, with each residual connection.

12 layers of attention (cuDNN) and SwiGLU in one scan, bfloat16 over float32 parameters: 751 million
of them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from common import STREAMS
from modules import run_modules

import jax_mhc as mhc
from jax_mhc._measure import plain

Connection = Literal[
    "residual", "plain", "plain-checkpoint", "mhc", "seams", "seams-norms", "seams-checkpoint",
    "seams-delayed", "mhc-streams", "mhc-scan", "residual-loop", "mhc-streams-loop", "seams-loop",
    "nnx-loop", "linen-loop", "equinox-loop",
    "residual-layers", "mhc-layers", "seams-auto", "seams-auto-mhc", "seams-told", "seams-watched",
]  # fmt: skip

LABELS: dict[Connection, str] = {
    "residual": "plain residual",
    "plain": "mHC, plain JAX",
    "plain-checkpoint": "mHC, plain JAX, recomputed",
    "mhc": "mHC, fused",
    "seams": "mHC, fused with seams",
    "seams-norms": "mHC, fused with seams and the layers' norms",
    "seams-checkpoint": "mHC, fused with seams, recomputed",
    "seams-delayed": "mHC, fused with seams, delayed schedule",
    "mhc-streams": "mHC, fused, streams carry their post",
    "mhc-scan": "mHC, fused, streams carry their post, mhc.scan",
    "residual-loop": "plain residual, Python loop",
    "mhc-streams-loop": "mHC, fused, streams carry their post, Python loop",
    "seams-loop": "mHC, fused with seams, mhc.stack without a scan",
    "nnx-loop": "mHC, fused, modules of Flax NNX, Python loop",
    "linen-loop": "mHC, fused, modules of Flax Linen, Python loop",
    "equinox-loop": "mHC, fused, modules of Equinox, Python loop",
    # The connections of recompute.py and of diagnostics_step.py.
    "residual-layers": "plain residual, jax.checkpoint",
    "mhc-layers": "mHC, fused, jax.checkpoint",
    "seams-auto": "mHC, fused with seams, streams recomputed",
    "seams-auto-mhc": "mHC, fused with seams, all of mHC recomputed",
    "seams-told": "mHC, fused with seams, composite gain out of the step",
    "seams-watched": "mHC, fused with seams, composite gain watched in the step",
}
# The schedule of DeepSeek-V4.1.
DELAYED = dataclasses.replace(mhc.presets.PAPER, schedule="delayed")
# The connections that run in mhc.stack, with its options.
STACKS: dict[Connection, dict[str, Any]] = {
    "seams": {},
    "seams-norms": {},
    "seams-checkpoint": {"recompute": mhc.Recompute(every=2)},
    "seams-delayed": {"config": DELAYED},
    "seams-auto": {"recompute": mhc.Recompute(every="auto")},
    "seams-auto-mhc": {"recompute": mhc.Recompute(every="auto", policy="mhc")},
    "seams-told": {},
    "seams-watched": {},
}
# The connections that run in mhc.stack_with_samples, for the composite gain.
SAMPLED = ("seams-told", "seams-watched")
SAMPLE_TOKENS = 64
# The connections whose streams carry the post of their last sublayer (mhc.Streams).
CARRIED = ("mhc-streams", "mhc-scan", "mhc-streams-loop")
# The connections of modules (modules.py), and where these come from.
MODULES: dict[Connection, str] = {
    "nnx-loop": "jax_mhc.flax.nnx",
    "linen-loop": "jax_mhc.flax.linen",
    "equinox-loop": "jax_mhc.equinox",
}
FUSED = ("mhc", "mhc-layers", "seams-loop", *CARRIED, *STACKS, *MODULES)
# The connections of layers in a Python loop, in place of a scan.
LOOPS = ("residual-loop", "mhc-streams-loop", "seams-loop", *MODULES)
# The connections with jax.checkpoint around the whole of each layer of the model.
RUN_AGAIN = ("residual-layers", "mhc-layers")


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of the language model."""

    layers: int = 12
    hidden: int = 2048
    heads: int = 16
    mlp: int = 5632
    batch: int = 4
    length: int = 2048
    vocabulary: int = 32768
    attention: Literal["cudnn", "xla"] = "cudnn"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


# The model at other widths, with fewer layers where they are larger.
WIDTHS = {
    768: Model(hidden=768, heads=12, mlp=2048, batch=16, length=1024),
    1024: Model(hidden=1024, heads=16, mlp=2816, batch=16, length=1024),
    2048: Model(),
    4096: Model(layers=4, hidden=4096, heads=32, mlp=11008),
    8192: Model(layers=2, hidden=8192, heads=64, mlp=22016, batch=2),
}

TINY = Model(
    layers=4, hidden=64, heads=2, mlp=176, batch=2, length=32, vocabulary=128, attention="xla"
)


def init(key: jax.Array, model: Model, connection: Connection) -> dict[str, Any]:
    """Parameters, those of the layers stacked or, for a Python loop, in a list.

    They are the same with all connections.
    """
    keys = iter(jax.random.split(key, 10))

    def normal(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    num, hidden = model.layers, model.hidden
    params: dict[str, Any] = {
        "embedding": normal(model.vocabulary, hidden),
        "logits": normal(hidden, model.vocabulary),
        "norm": jnp.ones(hidden),
        "layers": {
            "attention": {
                "norm": jnp.ones((num, hidden)),
                "qkv": normal(num, hidden, 3 * hidden),
                "out": normal(num, hidden, hidden),
            },
            "mlp": {
                "norm": jnp.ones((num, hidden)),
                "gate": normal(num, hidden, model.mlp),
                "up": normal(num, hidden, model.mlp),
                "down": normal(num, model.mlp, hidden),
            },
        },
    }
    if has_streams(connection):
        make = functools.partial(mhc.init_params, streams=STREAMS, hidden=hidden)
        params["connections"] = {
            layer: jax.vmap(make)(jax.random.split(next(keys), num)) for layer in params["layers"]
        }
    if connection in LOOPS:
        for name in params.keys() & {"layers", "connections"}:
            stacked = params[name]
            params[name] = [jax.tree.map(operator.itemgetter(i), stacked) for i in range(num)]
    return params


def kind(connection: Connection) -> tuple[bool, bool]:
    """The facts on which the form of a connection's parameters depends."""
    return has_streams(connection), connection in LOOPS


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    # Not jnp.square, whose derivative keeps an array of its own.
    mean_square = jnp.mean(wide * wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(x.dtype)


def attention(model: Model, u: jax.Array, params: Any) -> jax.Array:
    qkv = u @ params["qkv"].astype(u.dtype)
    q, k, v = jnp.split(qkv.reshape(model.batch, model.length, 3 * model.heads, -1), 3, axis=2)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=model.attention)
    return mixed.reshape(u.shape) @ params["out"].astype(u.dtype)


def mlp(u: jax.Array, params: Any) -> jax.Array:
    gate, up = (u @ params[name].astype(u.dtype) for name in ("gate", "up"))
    return (jax.nn.silu(gate) * up) @ params["down"].astype(u.dtype)


def has_streams(connection: Connection) -> bool:
    return not connection.startswith("residual")


def anywhere(array: jax.Array, name: str) -> jax.Array:
    """Where a value lies, on one device; mesh_step.py has others."""
    return array


def run_each(connection: Connection, body: Any, x: Any, *of_layers: Any) -> Any:
    """A body `(x, of layer) -> (x, None)` for each layer, in a scan or in a Python loop."""
    if connection not in LOOPS:
        scan = mhc.scan if connection == "mhc-scan" else jax.lax.scan
        return scan(body, x, of_layers)[0]
    for of_layer in zip(*of_layers, strict=True):
        x, _ = body(x, of_layer)
    return x


def run_layers(
    connection: Connection, model: Model, x: jax.Array, params: Any, place: Any = anywhere
) -> tuple[jax.Array, Any]:
    """The layers on hidden states `[tokens, C]`; and what of their mixing the step tells, if so."""
    behind_norms = {"attention": functools.partial(attention, model), "mlp": mlp}

    def with_norm(name: str, u: jax.Array, params: Any) -> jax.Array:
        u = place(rms_norm(u, params["norm"]), "layer_input")
        return place(behind_norms[name](u, params), "layer_output")

    layers = {name: functools.partial(with_norm, name) for name in behind_norms}
    again = jax.checkpoint if connection in RUN_AGAIN else lambda layer: layer
    if not has_streams(connection):
        x = place(x, "hidden")

        @again
        def residual(x: jax.Array, of_layer: Any) -> Any:
            (params,) = of_layer
            for name, layer in layers.items():
                x = x + layer(x, params[name])
            return x, None

        return run_each(connection, residual, x, params["layers"]), ()

    x = place(jnp.repeat(x[..., None, :], STREAMS, axis=-2), "streams")
    if connection in STACKS:
        norm_scale = None
        if connection == "seams-norms":
            layers, norm_scale = behind_norms, [params["layers"][name]["norm"] for name in layers]
        run = mhc.stack
        if connection in SAMPLED:
            run = functools.partial(mhc.stack_with_samples, sample_tokens=SAMPLE_TOKENS)
        is_delayed = connection == "seams-delayed"
        results = run(
            [lambda u, p, name=name: layers[name](u, params=p[name]) for name in layers],
            mhc.as_streams(x, implementation="fused") if is_delayed else x,
            [params["connections"][name] for name in layers],
            xs=params["layers"],
            norm_scale=norm_scale,
            implementation="fused",
            **STACKS[connection],
        )
        if is_delayed:
            return mhc.collapse(results), ()
        if connection not in SAMPLED:
            return mhc.reduce(results), ()
        x, h_res = results
        gain = mhc.diagnostics.amax_gain(mhc.diagnostics.composite(h_res))
        if connection == "seams-watched":
            mhc.diagnostics.watch_gain(gain)
            return mhc.reduce(x), ()
        mixing = mhc.diagnostics.mixing(h_res)
        told = jax.tree.map(jnp.max, gain), jax.tree.map(jnp.mean, mixing)
        return mhc.reduce(x), told
    pre, post = plain.pre, plain.post
    if connection == "plain-checkpoint":
        pre, post = jax.checkpoint(pre), jax.checkpoint(post)

    @again
    def streams(x: jax.Array, params: Any) -> Any:
        layer_params, connections = params
        for name, layer in layers.items():
            call = functools.partial(layer, params=layer_params[name])
            if connection in FUSED:
                x = mhc.mhc_residual(call, x, connections[name], implementation="fused")
            else:
                u, ctx = pre(x, connections[name])
                x = post(call(u), ctx)
        return x, None

    if connection == "seams-loop":
        each = list(zip(params["layers"], params["connections"], strict=True))
        x = mhc.stack(
            [functools.partial(layers[name], params=p[name]) for p, _ in each for name in layers],
            x,
            [connections[name] for _, connections in each for name in layers],
            implementation="fused",
        )
        return mhc.reduce(x), ()
    if connection in (*CARRIED, *MODULES):
        x = mhc.as_streams(x, implementation="fused")
    if connection in MODULES:
        of_blocks = params["layers"], params["connections"]
        return mhc.reduce(run_modules(MODULES[connection], layers, x, *of_blocks)), ()
    x = run_each(connection, streams, x, params["layers"], params["connections"])
    return mhc.reduce(x), ()


def loss(
    connection: Connection, model: Model, params: Any, tokens: jax.Array, place: Any = anywhere
) -> tuple[jax.Array, Any]:
    """Mean cross entropy of the next of tokens `[batch, length]`; and what `run_layers` tells."""
    x = params["embedding"].astype(jnp.bfloat16)[tokens.reshape(-1)]
    x, told = run_layers(connection, model, x, params, place)
    x = rms_norm(x, params["norm"])
    logits = (x @ params["logits"].astype(x.dtype)).astype(jnp.float32)
    next_tokens = jnp.roll(tokens, -1, 1).reshape(-1)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, next_tokens).mean()
    return value, jax.lax.stop_gradient(told)
