"""A whole DeepSeek-V4 in JAX: its checkpoint loaded by name, its logits those of transformers.

    python examples/deepseek_v4.py FOLDER [TOKEN ...]

FOLDER is what `save_pretrained` of Hugging Face transformers leaves: config.json and safetensors
files, of a model in float32 or bfloat16 that fits into memory. It runs in float32. The
hyper-connections and the head come from `jax_mhc.convert.load`, all other tensors from safetensors.

Attention of a layer sees the last tokens, and beyond them entries that stand for a window of tokens
each; in every other layer an indexer chooses the best of these. Experts of the first layers are
chosen by the token. Positions are plain rotations (rope_type "default"); there is no cache.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors.flax

import jax_mhc as mhc


def load(folder):
    """The hyper-connections, the other tensors by name in float32, and the config."""
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


def under(tensors, prefix):
    """The tensors below a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def rms_norm(x, weight, config):
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return weight * (x * jax.lax.rsqrt(mean + config["rms_norm_eps"]))


def rotate(x, positions, config, kind, sign=1.0):
    """Turns pairs of the last channels of x [S, ..., D] by the angles of their positions [S]."""
    rope = config["rope_parameters"][kind]
    if rope["rope_type"] != "default":
        raise SystemExit(f"rope_type: expected default, got {rope['rope_type']}")
    width = int(config["head_dim"] * rope["partial_rotary_factor"])
    frequency = 1 / rope["rope_theta"] ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[:, None] * frequency
    angle = angle.reshape(len(positions), *(1,) * (x.ndim - 2), width // 2)
    cos, sin = jnp.cos(angle), sign * jnp.sin(angle)
    even, odd = x[..., -width::2], x[..., -width + 1 :: 2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([x[..., :-width], turned.reshape(*x.shape[:-1], width)], axis=-1)


def compress(u, weights, rate, config):
    """One entry for each whole window of tokens, [W, D]; the indexer's are the same.

    A softmax over a window weighs its tokens, channel by channel. With two channels for each one of
    the entries, the first half is of the window before.
    """
    num = u.shape[0] // rate
    values = (u @ weights["wkv.weight"].T)[: num * rate].reshape(num, rate, -1)
    logits = (u @ weights["wgate.weight"].T)[: num * rate].reshape(num, rate, -1) + weights["ape"]
    width = weights["norm.weight"].size
    if values.shape[-1] == 2 * width:
        before = jnp.pad(values[:-1, :, :width], ((1, 0), (0, 0), (0, 0)))
        none = ((1, 0), (0, 0), (0, 0))
        logits_before = jnp.pad(logits[:-1, :, :width], none, constant_values=-jnp.inf)
        values = jnp.concatenate([before, values[..., width:]], axis=1)
        logits = jnp.concatenate([logits_before, logits[..., width:]], axis=1)
    entries = jnp.sum(values * jax.nn.softmax(logits, axis=1), axis=1)
    positions = jnp.arange(num) * rate
    return rotate(rms_norm(entries, weights["norm.weight"], config), positions, config, "compress")


def chosen(u, queries, weights, visible, rate, config):
    """The entries that the indexer chooses among those that a token sees, [S, W]."""
    keys = compress(u, under(weights, "compressor."), rate, config)
    heads, width = config["index_n_heads"], config["index_head_dim"]
    q = (queries @ weights["wq_b.weight"].T).reshape(-1, heads, width)
    q = rotate(q, jnp.arange(len(u)), config, "compress")
    scores = jax.nn.relu(jnp.einsum("shd,wd->shw", q, keys)) * width**-0.5
    gates = (u @ weights["weights_proj.weight"].T) * heads**-0.5
    scores = jnp.where(visible, jnp.einsum("shw,sh->sw", scores, gates), -jnp.inf)
    best = jax.lax.top_k(scores, min(config["index_topk"], scores.shape[-1]))[1]
    return visible & jnp.any(jax.nn.one_hot(best, scores.shape[-1], dtype=bool), axis=-2)


def attention(u, weights, kind, config):
    """u [S, C] -> [S, C]; keys and values are one, of a single head."""
    positions = jnp.arange(len(u))
    rope = "main" if kind == "sliding_attention" else "compress"
    heads, width = config["num_attention_heads"], config["head_dim"]
    queries = rms_norm(u @ weights["wq_a.weight"].T, weights["q_norm.weight"], config)
    q = (queries @ weights["wq_b.weight"].T).reshape(-1, heads, width)
    q = rotate(rms_norm(q, 1, config), positions, config, rope)
    entries = rms_norm(u @ weights["wkv.weight"].T, weights["norm.weight"], config)
    entries = rotate(entries, positions, config, rope)
    back = positions[:, None] - positions
    seen = (back >= 0) & (back < config["sliding_window"])
    if kind != "sliding_attention":
        rate = config["compress_rates"][kind]
        far = compress(u, under(weights, "compressor."), rate, config)
        visible = jnp.arange(len(far)) < (positions[:, None] + 1) // rate
        if kind == "compressed_sparse_attention":
            visible = chosen(u, queries, under(weights, "indexer."), visible, rate, config)
        entries = jnp.concatenate([entries, far])
        seen = jnp.concatenate([seen, visible], axis=-1)
    logits = jnp.einsum("shd,kd->shk", q, entries) * width**-0.5
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    sinks = jnp.broadcast_to(weights["attn_sink"][:, None], (len(u), heads, 1))
    probabilities = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1), axis=-1)[..., :-1]
    out = jnp.einsum("shk,kd->shd", probabilities, entries)
    out = rotate(out, positions, config, rope, sign=-1.0)
    groups = config["o_groups"]
    grouped, down = out.reshape(len(u), groups, -1), weights["wo_a.weight"]
    mixed = jnp.einsum("sgd,grd->sgr", grouped, down.reshape(groups, -1, grouped.shape[-1]))
    return mixed.reshape(len(u), -1) @ weights["wo_b.weight"].T


def mlp(u, weights, config):
    limit = config["swiglu_limit"]
    gate = jnp.minimum(u @ weights["w1.weight"].T, limit)
    up = jnp.clip(u @ weights["w3.weight"].T, -limit, limit)
    return (jax.nn.silu(gate) * up) @ weights["w2.weight"].T


def experts(u, weights, tokens, config):
    """u [S, C] -> [S, C]: the shared expert and some of the others, of which all are computed."""
    num, count = config["n_routed_experts"], config["num_experts_per_tok"]
    scores = jnp.sqrt(jax.nn.softplus(u @ weights["gate.weight"].T))
    if "gate.tid2eid" in weights:
        taken = weights["gate.tid2eid"][tokens]
    else:
        taken = jax.lax.top_k(scores + weights["gate.bias"], count)[1]
    gates = jnp.take_along_axis(scores, taken, axis=-1)
    gates = config["routed_scaling_factor"] * gates / jnp.sum(gates, axis=-1, keepdims=True)
    gates = jnp.einsum("sk,ske->se", gates, jax.nn.one_hot(taken, num))
    out = mlp(u, under(weights, "shared_experts."), config)
    for e in range(num):
        out += gates[:, e : e + 1] * mlp(u, under(weights, f"experts.{e}."), config)
    return out


def logits(checkpoint, tensors, config, tokens):
    """Logits [S, vocabulary] of one sequence of tokens [S]."""
    x = mhc.expand(tensors["embed_tokens.weight"][tokens], streams=checkpoint.streams)
    eps = config["rms_norm_eps"]
    for i, connections in enumerate(checkpoint.layers):
        weights, kind = under(tensors, f"layers.{i}."), config["layer_types"][i]
        sublayers = {
            "attn": lambda u, w=weights, k=kind: attention(u, under(w, "attn."), k, config),
            "ffn": lambda u, w=weights: experts(u, under(w, "ffn."), tokens, config),
        }
        for site, layer in sublayers.items():
            x = mhc.mhc_residual(
                layer,
                x,
                connections[site],
                config=checkpoint.config,
                norm_scale=weights[f"{site}_norm.weight"],
                norm_scale_eps=eps,
            )
    u = mhc.head(x, checkpoint.head, config=checkpoint.head_config)
    return rms_norm(u, tensors["norm.weight"], config) @ tensors["head.weight"].T


def main(folder, *tokens):
    checkpoint, tensors, config = load(folder)
    num = config["vocab_size"]
    ids = jnp.array([int(token) for token in tokens] or [k * k % num for k in range(24)])
    # Layers read their weights from the closure; a training step would take them as an argument.
    result = jax.jit(lambda ids: logits(checkpoint, tensors, config, ids))(ids)
    print(f"{len(checkpoint.layers)} layers, {checkpoint.streams} streams, {checkpoint.config}")
    print(f"logits {list(result.shape)}; the likeliest next token is {int(result[-1].argmax())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
