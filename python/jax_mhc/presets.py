"""Published variants of mHC, as settings of one config.

- `PAPER`: arXiv 2512.24880; the defaults of `MHCConfig`.
- `DEEPSEEK_V4`: DeepSeek-V4 and what follows its kernels. Its `comb` is the transpose of our h_res,
  so that its softmax over rows followed by columns is column_row here.
- `HY4`: Tencent's Hy4, whose streams do not mix (H_res = I).
- `HYPER_CONNECTIONS`: hyper-connections as published, arXiv 2409.19606, whose h_res has no
  constraint; in plain JAX.
- `MEGATRON`: the hyper-connections of Megatron Core's branch main, as of August 2026. Its branch
  dev has taken over DeepSeek-V4's convention; `jax_mhc.convert.from_megatron` says how to tell.
"""

from jax_mhc._types import MHCConfig

__all__ = ["DEEPSEEK_V4", "HY4", "HYPER_CONNECTIONS", "MEGATRON", "PAPER"]

PAPER = MHCConfig()

DEEPSEEK_V4 = MHCConfig(norm_eps=1e-6, pre_eps=1e-6, sinkhorn_eps=1e-6, sinkhorn_eps_mode="add")

HY4 = MHCConfig(constraint="identity", norm_eps=1e-5, pre_eps=1e-6, post_eps=1e-6)

HYPER_CONNECTIONS = MHCConfig(form="hyper_connections", constraint="none")

MEGATRON = MHCConfig(
    norm_eps=1e-6,
    norm_eps_mode="outside",
    sinkhorn_eps=1e-6,
    sinkhorn_eps_mode="clamp",
    order="row_column",
)
