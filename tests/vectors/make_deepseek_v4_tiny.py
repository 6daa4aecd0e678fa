"""Write deepseek_v4_tiny/: a whole small DeepSeek-V4 by transformers, and what it computes.

Run by hand when the vectors shall change, in an environment of its own (the tests only read the
files):

    pip install "torch==2.15.0" "transformers==5.24.0"
    python tests/vectors/make_deepseek_v4_tiny.py

The model has every kind of layer: a window of tokens alone, compressed windows, and those that the
indexer chooses; experts chosen by the token, and by scores. Its weights are random numbers that
bfloat16 holds, so that the file, in bfloat16, is what float32 computes with. `config.json` and
`model.safetensors` are what `save_pretrained` writes; `logits.npz` has `tokens` [B, S] and `logits`
[B, S, vocabulary] in float32.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

CONFIG = DeepseekV4Config(
    vocab_size=48,
    hidden_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=16,
    q_lora_rank=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    o_groups=2,
    o_lora_rank=8,
    index_n_heads=8,
    index_head_dim=16,
    index_topk=3,
    sliding_window=6,
    layer_types=[
        "sliding_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    num_hash_layers=1,
    max_position_embeddings=64,
    partial_rotary_factor=0.5,
    swiglu_limit=1.0,
)


def save(make, config, folder):
    """Draws the weights of `make(config)`, and writes it and its logits of some tokens."""
    torch.manual_seed(0)
    model = make(config).eval()
    for name, value in model.state_dict().items():
        if value.dtype.is_floating_point:
            spread = 1.0 if "scale" in name or "hc.base" in name else 0.5
            value.copy_((spread * torch.randn(value.shape)).to(torch.bfloat16))
        else:  # of a token, different experts
            for row in value:
                row.copy_(torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok])
    tokens = torch.randint(config.vocab_size, (2, 30))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    np.savez_compressed(folder / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())
    for path in sorted(folder.iterdir()):
        print(path.name, path.stat().st_size)


if __name__ == "__main__":
    save(DeepseekV4ForCausalLM, CONFIG, Path(__file__).with_name("deepseek_v4_tiny"))
