"""Parameters and whole checkpoints of other implementations, and back.

`load` reads all hyper-connections of a checkpoint by their names and `save` writes them back; the
functions below turn the arrays of one hyper-connection, in an implementation's own layout, into
`MHCParams` (`from_*`) and back (`to_*`), bit for bit. What differs between implementations is the
layout of the projection, which index of the n x n matrix meets the old streams, and the settings:
each function names those to use, since parameters do not carry them.

Arrays may be NumPy's, JAX's or PyTorch's, of float32, bfloat16, float16 or float64, of one
hyper-connection or of L of them stacked, `[L, ...]`; results are float32 (float64 where the input
is, while JAX's 64-bit types are on), so that nothing is rounded on the way there and back. All
functions but `load` and `save` can be traced and differentiated.
"""

from jax_mhc.convert._checkpoint import Checkpoint, load, save
from jax_mhc.convert._deepseek_v4 import (
    from_deepseek_v4,
    head_from_deepseek_v4,
    head_to_deepseek_v4,
    to_deepseek_v4,
)
from jax_mhc.convert._hy4 import from_hy4, to_hy4
from jax_mhc.convert._liger import from_liger, to_liger
from jax_mhc.convert._maxtext import (
    from_maxtext,
    head_from_maxtext,
    head_to_maxtext,
    to_maxtext,
)
from jax_mhc.convert._megatron import from_megatron, to_megatron
from jax_mhc.convert._transformer_engine import from_transformer_engine, to_transformer_engine

__all__ = [
    "Checkpoint",
    "from_deepseek_v4",
    "from_hy4",
    "from_liger",
    "from_maxtext",
    "from_megatron",
    "from_transformer_engine",
    "head_from_deepseek_v4",
    "head_from_maxtext",
    "head_to_deepseek_v4",
    "head_to_maxtext",
    "load",
    "save",
    "to_deepseek_v4",
    "to_hy4",
    "to_liger",
    "to_maxtext",
    "to_megatron",
    "to_transformer_engine",
]
