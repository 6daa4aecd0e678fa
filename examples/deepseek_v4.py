"""A whole DeepSeek-V4 in JAX: its checkpoint loaded by name, its logits those of transformers.

    python examples/deepseek_v4.py FOLDER [TOKEN ...]

FOLDER is what `save_pretrained` of Hugging Face transformers leaves: config.json and safetensors
files, of a model in float32 or bfloat16 that fits into memory. It runs in float32. The
hyper-connections and the head come from `jax_mhc.convert.load`, all other tensors from safetensors.

Attention of a layer sees the last tokens, and beyond them entries that stand for a window of tokens
each; in every other layer an indexer chooses the best of these. Experts of the first layers are
chosen by the token. Positions are plain rotations (rope_type "default"); there is no cache.
"""

import sys

import jax
import jax.numpy as jnp
from decoder_parts import angles, best, experts, mlp, probabilities, rms_norm, run, under

import jax_mhc as mhc


def rotate(x, positions, config, kind, sign=1.0):
    """Turns pairs of the last channels of x [S, ..., D] by the angles of their positions [S]."""
    rope = config["rope_parameters"][kind]
    width = int(config["head_dim"] * rope["partial_rotary_factor"])
    angle = angles(positions, rope, width)
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
    entries = rms_norm(entries, weights["norm.weight"], config["rms_norm_eps"])
    return rotate(entries, positions, config, "compress")


def chosen(u, queries, weights, visible, rate, config):
    """The entries that the indexer chooses among those that a token sees, [S, W]."""
    keys = compress(u, under(weights, "compressor."), rate, config)
    heads, width = config["index_n_heads"], config["index_head_dim"]
    q = (queries @ weights["wq_b.weight"].T).reshape(-1, heads, width)
    q = rotate(q, jnp.arange(len(u)), config, "compress")
    scores = jax.nn.relu(jnp.einsum("shd,wd->shw", q, keys)) * width**-0.5
    gates = (u @ weights["weights_proj.weight"].T) * heads**-0.5
    return best(jnp.einsum("shw,sh->sw", scores, gates), visible, config["index_topk"])


def attention(u, weights, kind, config):
    """u [S, C] -> [S, C]; keys and values are one, of a single head."""
    positions = jnp.arange(len(u))
    rope = "main" if kind == "sliding_attention" else "compress"
    heads, width, eps = (config[key] for key in ("num_attention_heads", "head_dim", "rms_norm_eps"))
    queries = rms_norm(u @ weights["wq_a.weight"].T, weights["q_norm.weight"], eps)
    q = (queries @ weights["wq_b.weight"].T).reshape(-1, heads, width)
    q = rotate(rms_norm(q, 1, eps), positions, config, rope)
    entries = rms_norm(u @ weights["wkv.weight"].T, weights["norm.weight"], eps)
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
    scores = jnp.einsum("shd,kd->shk", q, entries) * width**-0.5
    scores = probabilities(scores, seen, weights["attn_sink"])
    out = jnp.einsum("shk,kd->shd", scores, entries)
    out = rotate(out, positions, config, rope, sign=-1.0)
    groups = config["o_groups"]
    grouped, down = out.reshape(len(u), groups, -1), weights["wo_a.weight"]
    mixed = jnp.einsum("sgd,grd->sgr", grouped, down.reshape(groups, -1, grouped.shape[-1]))
    return mixed.reshape(len(u), -1) @ weights["wo_b.weight"].T


def feed_forward(u, weights, tokens, config):
    """u [S, C] -> [S, C]: the shared expert and some of the others."""

    def expert(name, u):
        names = (f"{name}.{part}.weight" for part in ("w1", "w3", "w2"))
        return mlp(u, *(weights[name] for name in names), config["swiglu_limit"])

    scores = jnp.sqrt(jax.nn.softplus(u @ weights["gate.weight"].T))
    if "gate.tid2eid" in weights:
        taken = weights["gate.tid2eid"][tokens]
    else:
        taken = jax.lax.top_k(scores + weights["gate.bias"], config["num_experts_per_tok"])[1]
    routed = experts(u, scores, taken, lambda e, u: expert(f"experts.{e}", u), config)
    return expert("shared_experts", u) + routed


def logits(checkpoint, tensors, config, tokens):
    """Logits [S, vocabulary] of one sequence of tokens [S]."""
    x = mhc.expand(tensors["embed_tokens.weight"][tokens], streams=checkpoint.streams)
    eps = config["rms_norm_eps"]
    for i, connections in enumerate(checkpoint.layers):
        weights, kind = under(tensors, f"layers.{i}."), config["layer_types"][i]
        sublayers = {
            "attn": lambda u, w=weights, k=kind: attention(u, under(w, "attn."), k, config),
            "ffn": lambda u, w=weights: feed_forward(u, under(w, "ffn."), tokens, config),
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
    return rms_norm(u, tensors["norm.weight"], eps) @ tensors["head.weight"].T


if __name__ == "__main__":
    run(logits, *sys.argv[1:])
