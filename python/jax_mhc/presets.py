"""Published variants of mHC, as settings of one config.

- `PAPER`: arXiv 2512.24880; the defaults of `MHCConfig`.
- `DEEPSEEK_V4`: DeepSeek-V4 and what follows its kernels. Its `comb` is the transpose of our h_res,
  so that its softmax over rows followed by columns is column_row here.
- `DEEPSEEK_V41`: DeepSeek-V4.1, `DEEPSEEK_V4` with the delayed schedule. Its parameters have the
  names and shapes of V4's, and compute another function.
- `MEGATRON`: the hyper-connections of Megatron Core's branch main, as of August 2026. Its branch
  dev has taken over DeepSeek-V4's convention; `jax_mhc.convert.from_megatron` says how to tell.
"""

import dataclasses

from jax_mhc._types import MHCConfig

__all__ = ["DEEPSEEK_V4", "DEEPSEEK_V41", "MEGATRON", "PAPER"]

PAPER = MHCConfig()

DEEPSEEK_V4 = MHCConfig(norm_eps=1e-6, pre_eps=1e-6, sinkhorn_eps=1e-6, sinkhorn_eps_mode="add")

DEEPSEEK_V41 = dataclasses.replace(DEEPSEEK_V4, schedule="delayed")

MEGATRON = MHCConfig(
    norm_eps=1e-6,
    norm_eps_mode="outside",
    sinkhorn_eps=1e-6,
    sinkhorn_eps_mode="clamp",
    order="row_column",
)
