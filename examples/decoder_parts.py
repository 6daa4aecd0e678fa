"""Parts of deepseek_v4.py and hy4.py: files that transformers saved, and what layers share."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors.flax

import jax_mhc as mhc


def load(folder):
    """Hyper-connections, all other tensors by name in float32, and the config."""
    folder = Path(folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.flax.load_file(file)
    tensors = {
        name.removeprefix("model."): value.astype(
            jnp.float32 if jnp.issubdtype(value.dtype, jnp.floating) else jnp.int32
        )
        for name, value in tensors.items()
    }
    config = json.loads((folder / "config.json").read_text())
    return mhc.convert.load(folder), tensors, config


def run(logits, folder, *tokens):
    """Prints the likeliest token after some; `logits` is that of the model."""
    checkpoint, tensors, config = load(folder)
    num = config["vocab_size"]
    ids = jnp.array([int(token) for token in tokens] or [k * k % num for k in range(24)])
    # Layers read their weights from the closure; a training step would take them as an argument.
    result = jax.jit(lambda ids: logits(checkpoint, tensors, config, ids))(ids)
    print(f"{len(checkpoint.layers)} layers, {checkpoint.streams} streams, {checkpoint.config}")
    print(f"logits {list(result.shape)}; the likeliest next token is {int(result[-1].argmax())}")


def expect(config, key, value):
    if config[key] != value:
        raise SystemExit(f"{key}: expected {value}, got {config[key]}")


def under(tensors, prefix):
    """Tensors below a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def rms_norm(x, weight, eps):
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return weight * (x * jax.lax.rsqrt(mean + eps))


def angles(positions, rope, width):
    """Angles of rotation [S, width / 2] of positions [S]."""
    expect(rope, "rope_type", "default")
    frequency = 1 / rope["rope_theta"] ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return positions[:, None] * frequency


def best(scores, visible, count):
    """A mask [S, W] of the `count` entries with the highest scores among the visible ones."""
    indices = jax.lax.top_k(jnp.where(visible, scores, -jnp.inf), min(count, scores.shape[-1]))[1]
    return visible & jnp.any(jax.nn.one_hot(indices, scores.shape[-1], dtype=bool), axis=-2)


def probabilities(logits, seen, sinks):
    """A softmax of logits [S, heads, W] over what is seen [S, W] and a sink for each head."""
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    sinks = jnp.broadcast_to(sinks[:, None], (*logits.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1), axis=-1)[..., :-1]


def mlp(u, gate, up, down, limit=math.inf):
    up = jnp.clip(u @ up.T, -limit, limit)
    return (jax.nn.silu(jnp.minimum(u @ gate.T, limit)) * up) @ down.T


def experts(u, scores, taken, expert, config):
    """A sum of `expert(e, u)` over the experts taken [S, k], by their scores [S, E].

    All experts run, which is simple, and slow for many.
    """
    gates = jnp.take_along_axis(scores, taken, axis=-1)
    gates = config["routed_scaling_factor"] * gates / jnp.sum(gates, axis=-1, keepdims=True)
    gates = jnp.einsum("sk,ske->se", gates, jax.nn.one_hot(taken, scores.shape[-1]))
    return sum(gates[:, e : e + 1] * expert(e, u) for e in range(scores.shape[-1]))
