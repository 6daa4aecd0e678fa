"""Published variants of mHC, as settings of one config.

- `PAPER`: arXiv 2512.24880; the defaults of `MHCConfig`.
- `HYPER_CONNECTIONS`: hyper-connections as published, arXiv 2409.19606, whose h_res has no
  constraint; in plain JAX.
- `DEEPSEEK_V4`: DeepSeek-V4 and what follows its kernels. Its `comb` is the transpose of our h_res,
  so that its softmax over rows followed by columns is column_row here.
- `DEEPSEEK_V41`: DeepSeek-V4.1, `DEEPSEEK_V4` with the delayed schedule. Its parameters have the
  names and shapes of V4's, and compute another function.
- `GLM5`: GLM-5.3, `DEEPSEEK_V4` with its own norm_eps. It leaves the streams by their plain mean,
  `reduce(x)`.
- `HY4`: Tencent's Hy4, whose streams do not mix (H_res = I).
- `MAXTEXT`: MaxText, `DEEPSEEK_V4` with a learned weight of the norm, which `convert.from_maxtext`
  folds into phi; and `MAXTEXT_LITE`, its mHC-lite. Their norm_eps is its
  `normalization_layer_epsilon`, here that of its models with hyper-connections.
- `MEGATRON`: the hyper-connections of Megatron Core's branch main, as of August 2026; and
  `MEGATRON_DEV`, those of its branch dev, which has taken over DeepSeek-V4's convention. Its head
  has norm_eps inside, as `DEEPSEEK_V4`. `jax_mhc.convert.from_megatron` says how to tell.
- `LIGER`: the defaults of Liger-Kernel's `LigerMHC`.
- `TRANSFORMER_ENGINE`: TransformerEngine, whose streams are `[..., C, n]`.
"""

import dataclasses

from jax_mhc._types import MHCConfig

__all__ = [
    "DEEPSEEK_V4",
    "DEEPSEEK_V41",
    "GLM5",
    "HY4",
    "HYPER_CONNECTIONS",
    "LIGER",
    "MAXTEXT",
    "MAXTEXT_LITE",
    "MEGATRON",
    "MEGATRON_DEV",
    "PAPER",
    "TRANSFORMER_ENGINE",
]

PAPER = MHCConfig()

HYPER_CONNECTIONS = MHCConfig(form="hyper_connections", constraint="none")

DEEPSEEK_V4 = MHCConfig(norm_eps=1e-6, pre_eps=1e-6, sinkhorn_eps=1e-6, sinkhorn_eps_mode="add")

DEEPSEEK_V41 = dataclasses.replace(DEEPSEEK_V4, schedule="delayed")

GLM5 = dataclasses.replace(DEEPSEEK_V4, norm_eps=1e-5)

HY4 = MHCConfig(constraint="identity", norm_eps=1e-5, pre_eps=1e-6, post_eps=1e-6)

MAXTEXT = DEEPSEEK_V4

MAXTEXT_LITE = MHCConfig(constraint="permutations", norm_eps=1e-6, pre_eps=1e-6)

MEGATRON = MHCConfig(
    norm_eps=1e-6,
    norm_eps_mode="outside",
    sinkhorn_eps=1e-6,
    sinkhorn_eps_mode="clamp",
    order="row_column",
)

MEGATRON_DEV = dataclasses.replace(DEEPSEEK_V4, norm_eps_mode="outside")

LIGER = dataclasses.replace(DEEPSEEK_V4, pre_eps=0.0, order="row_column")

# 2⁻²³, the eps of float32 that it takes from PyTorch.
TRANSFORMER_ENGINE = MHCConfig(norm_eps=2.0**-23)
