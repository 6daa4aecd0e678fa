"""A decoder layer in the shape of MaxText's, with mHC in place of its two residual additions.

As in MaxText: the attributes of the layer and the arguments of its call, `(output, None)` as its
result under `scan_layers`, attention that takes `(inputs_q, inputs_kv, ...)` and returns a pair
with the cache, experts that return `(y, load balancing loss, bias updates)`, the loss sown as
"moe_lb_loss", and `nn.scan` over `nn.remat` of the layer with the hidden state as its carry, which
here is the streams.

Stand-ins, since MaxText is not needed to run this: `Config`, `Attention` and `RoutedMoE`, made of
what Flax has (causal attention without a cache; every expert sees every token). Quantisation and
the constraints on shardings are left out. MaxText's own mHC, of its DeepSeek layers, is not used.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jax_mhc as mhc
from jax_mhc.flax.linen import MHC


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of MaxText's config that are used here, by its names."""

    emb_dim: int = 32
    num_query_heads: int = 4
    mlp_dim: int = 64
    num_experts: int = 4
    num_decoder_layers: int = 3
    vocab_size: int = 64
    dropout_rate: float = 0.1
    load_balance_loss_weight: float = 0.01
    mhc_expansion_rate: int = 4
    dtype: Any = jnp.float32


class Attention(nn.Module):
    """Stand-in."""

    config: Config

    @nn.compact
    def __call__(
        self, inputs_q, inputs_kv, inputs_positions, decoder_segment_ids=None, *,
        deterministic=False, model_mode="train", kv_cache=None,
    ):  # fmt: skip
        cfg = self.config
        same = nn.make_attention_mask(decoder_segment_ids, decoder_segment_ids, jnp.equal)
        causal = nn.make_attention_mask(inputs_positions, inputs_positions, jnp.greater_equal)
        attention = nn.MultiHeadDotProductAttention(
            cfg.num_query_heads, dropout_rate=cfg.dropout_rate, dtype=cfg.dtype
        )
        mask = nn.combine_masks(same, causal)
        return attention(inputs_q, inputs_kv, mask=mask, deterministic=deterministic), kv_cache


class RoutedMoE(nn.Module):
    """Stand-in."""

    config: Config

    @nn.compact
    def __call__(self, inputs):
        cfg = self.config
        gates = jax.nn.softmax(nn.Dense(cfg.num_experts, name="gate")(inputs).astype(jnp.float32))
        up = nn.DenseGeneral((cfg.num_experts, cfg.mlp_dim), dtype=cfg.dtype, name="wi")(inputs)
        weighted = nn.silu(up) * gates[..., None].astype(up.dtype)
        y = nn.DenseGeneral(cfg.emb_dim, axis=(-2, -1), dtype=cfg.dtype, name="wo")(weighted)
        load = gates.reshape(-1, cfg.num_experts).mean(0)
        return y, cfg.load_balance_loss_weight * cfg.num_experts * jnp.sum(load**2), None


class DecoderLayer(nn.Module):
    config: Config
    mesh: Any
    model_mode: str
    quant: Any = None

    @nn.compact
    def __call__(self, inputs, decoder_segment_ids, decoder_positions, deterministic, model_mode):
        cfg = self.config
        # norm=True is pre_self_attention_layer_norm, and post_self_attention_layer_norm below.
        connection = dict(
            hidden=cfg.emb_dim, streams=cfg.mhc_expansion_rate, norm=True, norm_scale_eps=1e-6
        )
        self_attention = Attention(cfg, name="self_attention")
        x, _ = MHC(lambda u, *args, **kw: self_attention(u, u, *args, **kw), **connection)(
            inputs,
            decoder_positions,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=deterministic,
            model_mode=model_mode,
        )  # in place of inputs + attention_lnx
        x, load_balance_loss, _ = MHC(RoutedMoE(cfg, name="MoeBlock_0"), **connection)(x)
        self.sow("intermediates", "moe_lb_loss", load_balance_loss)
        return x, None


class Decoder(nn.Module):
    config: Config
    mesh: Any = None
    quant: Any = None
    model_mode: str = "train"

    @nn.compact
    def __call__(self, tokens, positions, segment_ids, deterministic=False):
        cfg = self.config
        embed = nn.Embed(cfg.vocab_size, cfg.emb_dim, dtype=cfg.dtype, name="token_embedder")
        layers = nn.scan(
            nn.remat(DecoderLayer, prevent_cse=False, static_argnums=(4, 5)),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * 4,
            length=cfg.num_decoder_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.mesh, self.model_mode, self.quant, name="layers")
        x = mhc.expand(embed(tokens), streams=cfg.mhc_expansion_rate)
        x, _ = layers(x, segment_ids, positions, deterministic, self.model_mode)
        return embed.attend(nn.RMSNorm(dtype=cfg.dtype, name="decoder_norm")(mhc.reduce(x)))


def loss_fn(params, model, tokens, dropout_key):
    """Cross entropy and the layers' load balancing losses, as MaxText adds them up."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, sown = model.apply(
        {"params": params}, tokens, positions, jnp.ones_like(tokens),
        rngs={"dropout": dropout_key}, mutable=["intermediates"],
    )  # fmt: skip
    (balance,) = sown["intermediates"]["layers"]["moe_lb_loss"]  # one for each layer
    logits = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    nll = -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
    return jnp.mean(nll) + jnp.mean(balance), jnp.mean(balance)


def main():
    model, tokens = Decoder(Config()), jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
    rngs = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    params = jax.jit(model.init)(rngs, tokens, tokens, tokens)["params"]
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), static_argnums=1)
    for key in jax.random.split(jax.random.key(3), 2):
        (loss, balance), grads = step(params, model, tokens, key)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        print(f"loss {loss:.4f}, of which load balancing {balance:.4f}")


if __name__ == "__main__":
    main()
