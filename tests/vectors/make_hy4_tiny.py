"""Write hy4_tiny/: a whole small Hy4 by transformers, and what it computes.

Run by hand when the vectors shall change, in an environment of its own (the tests only read the
files):

    pip install "torch==2.15.0" "transformers==5.24.0"
    python tests/vectors/make_hy4_tiny.py

The model has every kind of layer: a dense one and those of experts, attention with an indexer of
its own and with the choice of the layer before. `save` is that of make_deepseek_v4_tiny.py, and so
are weights and files.
"""

from pathlib import Path

from make_deepseek_v4_tiny import save
from transformers import HYV4Config, HYV4ForCausalLM

CONFIG = HYV4Config(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=4,
    num_attention_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    index_n_heads=8,
    index_head_dim=16,
    index_topk=5,
    indexer_types=["full", "shared", "full", "shared"],
    hc_magnitude=1.5,
    max_position_embeddings=64,
    swiglu_limit=1.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)

if __name__ == "__main__":
    save(HYV4ForCausalLM, CONFIG, Path(__file__).with_name("hy4_tiny"))
