"""A whole Hy4 in JAX: its checkpoint loaded by name, its logits those of transformers.

    python examples/hy4.py FOLDER [TOKEN ...]

FOLDER is what `save_pretrained` of Hugging Face transformers leaves: config.json and safetensors
files, of a model in float32 or bfloat16 that fits into memory. It runs in float32. The
hyper-connections, whose streams do not mix, and the head come from `jax_mhc.convert.load`, all
other tensors from safetensors.

Keys and values are made of a narrow latent. A token attends to those that an indexer chooses, which
some layers have; the others take the choice of the layer before. Positions are plain rotations
(rope_type "default"); there is no cache.
"""

import sys

import jax
import jax.numpy as jnp
from decoder_parts import angles, best, expect, experts, mlp, probabilities, rms_norm, run, under

import jax_mhc as mhc

# Norms of latents have an eps of their own, which is not in config.json.
LATENT_EPS = 1e-6


def rotate(x, config):
    """Turns the last channels of x [S, heads, D], whose first half makes pairs with the second."""
    width = config["qk_rope_head_dim"]
    angle = angles(jnp.arange(len(x)), config["rope_parameters"], width)[:, None]
    kept, first, second = jnp.split(x, [x.shape[-1] - width, x.shape[-1] - width // 2], axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([kept, first * cos - second * sin, second * cos + first * sin], axis=-1)


def chosen(u, queries, weights, config):
    """A mask [S, S] of the tokens that the indexer chooses among those that a token sees."""
    heads, width = config["index_n_heads"], config["index_head_dim"]
    q = rotate((queries @ weights["wq_b.weight"].T).reshape(-1, heads, width), config)
    keys = jax.nn.standardize(u @ weights["wk.weight"].T, epsilon=config["rms_norm_eps"])
    keys = keys * weights["k_norm.weight"] + weights["k_norm.bias"]
    keys = rotate(keys[:, None], config)[:, 0]
    gates = (u @ weights["weights_proj.weight"].T) * (heads * width) ** -0.5
    scores = jax.nn.relu(jnp.einsum("shd,kd->shk", q, keys))
    visible = jnp.tri(len(u), dtype=bool)
    return best(jnp.einsum("shk,sh->sk", scores, gates), visible, config["index_topk"])


def attention(u, weights, seen, config):
    """u [S, C] -> [S, C], and the mask [S, S] of what is seen; without an indexer it is given."""
    heads, rank, value = (
        config[key] for key in ("num_attention_heads", "kv_lora_rank", "v_head_dim")
    )
    queries = rms_norm(
        u @ weights["q_a_proj.weight"].T, weights["q_a_layernorm.weight"], LATENT_EPS
    )
    q = rotate((queries @ weights["q_b_proj.weight"].T).reshape(len(u), heads, -1), config)
    latent, turned = jnp.split(u @ weights["kv_a_proj_with_mqa.weight"].T, [rank], axis=-1)
    latent = rms_norm(latent, weights["kv_a_layernorm.weight"], LATENT_EPS)
    pairs = (latent @ weights["kv_b_proj.weight"].T).reshape(len(u), heads, -1)
    keys, values = jnp.split(pairs, [pairs.shape[-1] - value], axis=-1)
    turned = rotate(turned[:, None], config).repeat(heads, axis=1)
    keys = jnp.concatenate([keys, turned], axis=-1)
    if "indexer.wk.weight" in weights:
        seen = chosen(u, queries, under(weights, "indexer."), config)
    scores = jnp.einsum("shd,khd->shk", q, keys) * q.shape[-1] ** -0.5
    scores = probabilities(scores, seen, weights["learnable_sink_param"])
    out = jnp.einsum("shk,khd->shd", scores, values).reshape(len(u), -1)
    gates = jax.nn.sigmoid(u @ weights["linear_gate.weight"].T)
    return (out * gates) @ weights["o_proj.weight"].T, seen


def dense(u, weights):
    return mlp(u, *(weights[f"{name}.weight"] for name in ("linear_gate", "up_proj", "down_proj")))


def feed_forward(u, weights, config):
    """u [S, C] -> [S, C]: an MLP, or the shared expert and some of the others."""
    if "gate.weight" not in weights:
        return dense(u, weights)
    scores = jax.nn.sigmoid(u @ weights["gate.weight"].T)
    chosen_by = scores + weights["gate.e_score_correction_bias"]
    taken = jax.lax.top_k(chosen_by, config["num_experts_per_tok"])[1]

    def expert(e, u):
        gate, up = jnp.split(weights["experts.gate_up_proj"][e], 2)
        return mlp(u, gate, up, weights["experts.down_proj"][e], config["swiglu_limit"])

    routed = experts(u, scores, taken, expert, config)
    return dense(u, under(weights, "shared_experts.")) + routed


def logits(checkpoint, tensors, config, tokens):
    """Logits [S, vocabulary] of one sequence of tokens [S]."""
    for key, value in {"n_group": 1, "norm_topk_prob": True, "attention_bias": False}.items():
        expect(config, key, value)
    x = mhc.expand(tensors["embed_tokens.weight"][tokens], streams=checkpoint.streams)
    options = {"config": checkpoint.config, "norm_scale_eps": config["rms_norm_eps"]}
    seen = None
    for i, connections in enumerate(checkpoint.layers):
        weights = under(tensors, f"layers.{i}.")
        x, seen = mhc.mhc_residual(
            lambda u, w=weights, s=seen: attention(u, under(w, "self_attn."), s, config),
            x,
            connections["attn"],
            norm_scale=weights["input_layernorm.weight"],
            has_aux=True,
            **options,
        )
        x = mhc.mhc_residual(
            lambda u, w=weights: feed_forward(u, under(w, "mlp."), config),
            x,
            connections["ffn"],
            norm_scale=weights["post_attention_layernorm.weight"],
            **options,
        )
    u = mhc.head(x, checkpoint.head, config=checkpoint.head_config)
    u = rms_norm(u, tensors["norm.weight"], config["rms_norm_eps"])
    return u @ tensors["lm_head.weight"].T


if __name__ == "__main__":
    run(logits, *sys.argv[1:])
