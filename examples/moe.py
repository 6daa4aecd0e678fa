"""A language model whose experts are spread over devices, in streams that stay where they are.

    python examples/moe.py --help

Every device of the mesh axis `experts` has a part of the batch, with its streams, and a part of the
experts. An all-to-all brings the layer's inputs u to the experts of their tokens, and another one
brings back what these return: C numbers a token and expert, as in a plain residual model. Both are
inside the layer, so that of streams, n·C numbers a token, nothing is sent. The loss that balances
the experts leaves the layer by `has_aux`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sysconfig
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mhc as mhc

AXIS = "experts"


@dataclasses.dataclass(frozen=True)
class Settings:
    """A model with experts, and how it is trained."""

    devices: int = 2
    experts: int = 8
    """Experts of a layer, on all devices together."""
    top_k: int = 2
    """Experts that a token goes to."""
    capacity: float = 1.5
    """Tokens that an expert takes from a device, over their number if all experts had as many."""
    balance: float = 1e-2
    """Weight of the loss that balances the experts."""
    streams: int = 4
    layers: int = 2
    """Blocks of attention and experts."""
    hidden: int = 64
    heads: int = 4
    mlp: int = 128
    """Inner width of an expert."""
    batch: int = 8
    length: int = 64
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    steps: int = 10
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        """Sizes that do not fit together."""
        for what, of, size in (
            ("experts", "devices", self.devices),
            ("batch", "devices", self.devices),
            ("hidden", "heads", self.heads),
        ):
            if getattr(self, what) % size:
                raise SystemExit(
                    f"moe.py: {what}: expected a multiple of {of}, {size}, got "
                    f"{getattr(self, what)}"
                )
        if not 1 <= self.top_k <= self.experts:
            raise SystemExit(f"moe.py: top_k: expected 1 to {self.experts}, got {self.top_k}")

    @property
    def slots(self) -> int:
        """Tokens that an expert takes from a device."""
        tokens = self.batch // self.devices * self.length
        return min(tokens, math.ceil(self.capacity * self.top_k * tokens / self.experts))


# ---- layers -------------------------------------------------------------------------------------


def rms_norm(u: jax.Array) -> jax.Array:
    wide = u.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(u.dtype)


def experts(u: jax.Array, weights: Any, s: Settings) -> tuple[jax.Array, Any]:
    """One device's program: its tokens u `[..., C]` and its experts; y and what to balance by."""
    shape, u = u.shape, rms_norm(u).reshape(-1, u.shape[-1])
    probabilities = jax.nn.softmax(u.astype(jnp.float32) @ weights["router"])
    gates, choices = jax.lax.top_k(probabilities, s.top_k)
    chosen = jax.nn.one_hot(choices.T, s.experts)  # [top_k, tokens, experts]
    # First choices take their slots before second ones; who finds none left is dropped.
    in_order = chosen.reshape(-1, s.experts)
    before = jnp.cumsum(in_order, 0) - in_order
    places = jnp.sum(before * in_order, -1).reshape(s.top_k, -1)
    slots = jax.nn.one_hot(places.astype(jnp.int32), s.slots)
    taken = jnp.einsum("kte,kts->tes", chosen, slots)
    mix = jnp.einsum("kte,kts,tk->tes", chosen, slots, gates)

    sent = jnp.einsum("tes,tc->esc", taken.astype(u.dtype), u)
    received = jax.lax.all_to_all(sent, AXIS, split_axis=0, concat_axis=1, tiled=True)
    inner = jax.nn.silu(jnp.einsum("esc,ecm->esm", received, weights["up"].astype(u.dtype)))
    out = jnp.einsum("esm,emc->esc", inner, weights["down"].astype(u.dtype))
    returned = jax.lax.all_to_all(out, AXIS, split_axis=1, concat_axis=0, tiled=True)
    y = jnp.einsum("tes,esc->tc", mix.astype(u.dtype), returned)

    shares = chosen.mean((0, 1)), probabilities.mean(0), taken.sum() / chosen.sum()
    share, probability, kept = jax.lax.pmean(shares, AXIS)
    balance = s.experts * jnp.sum(share * probability)
    return y.reshape(shape), {"balance": balance, "dropped": 1 - kept}


def attention(u: jax.Array, weights: Any, s: Settings) -> tuple[jax.Array, None]:
    """Attention within the sequences of each device, which has nothing to balance."""
    qkv = jnp.einsum("...c,cid->...id", rms_norm(u), weights["qkv"].astype(u.dtype))
    q, k, v = (part.reshape(*u.shape[:-1], s.heads, -1) for part in jnp.moveaxis(qkv, -2, 0))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(u.shape)
    return out @ weights["out"].astype(u.dtype), None


# ---- the model ----------------------------------------------------------------------------------


def init(key: jax.Array, s: Settings) -> dict[str, Any]:
    """Parameters; those of the blocks are stacked."""
    keys = iter(jax.random.split(key, 9))

    def normal(*shape: int) -> jax.Array:
        return shape[-2] ** -0.5 * jax.random.normal(next(keys), shape, jnp.float32)

    num, width = s.layers, s.hidden
    make = jax.vmap(functools.partial(mhc.init_params, streams=s.streams, hidden=width))
    return {
        "embedding": normal(256, width),
        "logits": normal(width, 256),
        "attention": {
            "qkv": normal(num, width, 3 * width).reshape(num, width, 3, width),
            "out": normal(num, width, width),
        },
        "experts": {
            "router": normal(num, width, s.experts),
            "up": normal(num, s.experts, width, s.mlp),
            "down": normal(num, s.experts, s.mlp, width),
        },
        "connections": [make(jax.random.split(next(keys), num)) for _ in range(2)],
    }


def specs(params: Any) -> Any:
    """Experts over devices; all else everywhere."""

    def spec(path: Any, _: Any) -> P:
        return P(None, AXIS) if getattr(path[-1], "key", None) in ("up", "down") else P()

    return jax.tree_util.tree_map_with_path(spec, params)


def loss(params: Any, tokens: jax.Array, s: Settings, mesh: Any) -> tuple[jax.Array, Any]:
    """Cross entropy of the next of tokens `[batch, length]`, with the balance; and each alone.

    Each device has its part of the batch, here and in every layer.
    """
    layer = jax.shard_map(
        functools.partial(experts, s=s),
        mesh=mesh,
        in_specs=(P(AXIS), {"router": P(), "up": P(AXIS), "down": P(AXIS)}),
        out_specs=(P(AXIS), P()),
    )
    u = params["embedding"][tokens].astype(s.dtype)
    u = jax.lax.with_sharding_constraint(u, NamedSharding(mesh, P(AXIS)))
    x, aux = mhc.stack(
        [
            lambda u, weights: attention(u, weights["attention"], s),
            lambda u, weights: layer(u, weights["experts"]),
        ],
        mhc.expand(u, streams=s.streams),
        params["connections"],
        xs={name: params[name] for name in ("attention", "experts")},
        has_aux="sum",
    )
    u = rms_norm(mhc.reduce(x))
    logits = (u @ params["logits"].astype(u.dtype)).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    aux = jax.tree.map(lambda total: total / s.layers, aux) | {"loss": losses.mean()}
    return aux["loss"] + s.balance * aux["balance"], aux


# ---- training -----------------------------------------------------------------------------------


def make_mesh(s: Settings) -> Any:
    devices = jax.devices()[: s.devices]
    return jax.make_mesh((s.devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def load_batches(s: Settings) -> np.ndarray:
    """Batches of bytes of Python's standard library, the same every time."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - s.length, size=(s.steps, s.batch))
    return text[starts[..., None] + np.arange(s.length)].astype(np.int32)


def place(mesh: Any, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def train(s: Settings) -> None:
    """Training steps, each of which prints what it told."""
    mesh = make_mesh(s)
    optimizer = optax.adamw(s.learning_rate)
    make = functools.partial(init, s=s)
    placed = place(mesh, specs(jax.eval_shape(make, jax.random.key(0))))
    params = jax.jit(make, out_shardings=placed)(jax.random.key(0))
    state = params, jax.jit(optimizer.init)(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, tokens: jax.Array) -> Any:
        params, optimizer_state = state
        run = jax.grad(functools.partial(loss, s=s, mesh=mesh), has_aux=True)
        gradients, told = run(params, tokens)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), told

    for number, tokens in enumerate(load_batches(s)):
        state, told = step(state, jax.device_put(tokens, NamedSharding(mesh, P(AXIS))))
        told = ", ".join(f"{name} {float(told[name]):.4f}" for name in sorted(told))
        print(f"step {number}: {told}", flush=True)


def main(settings: Settings) -> None:
    if jax.config.jax_platforms == "cpu" or not jax.config.jax_platforms:
        # Simulated devices, where there are none; it has no say in how many GPUs there are.
        jax.config.update("jax_num_cpu_devices", settings.devices)
    if jax.device_count() < settings.devices:
        raise SystemExit(
            f"moe.py: expected {settings.devices} devices, got {jax.device_count()}; "
            "JAX_PLATFORMS=cpu simulates them"
        )
    train(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
