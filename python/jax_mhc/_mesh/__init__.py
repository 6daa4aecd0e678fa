"""Calls on many devices: each device has its part of the tokens, or of the channels.

A mesh has three kinds of axes, and may have several of them:

- **Explicit** (`explicit.py`): the types of the operands say how they are sharded over them.
  `jax.shard_map`.
- **Auto** (`auto.py`): XLA decides that, later. `custom_partitioning`, with a rule for Shardy.
- **Manual** (`manual.py`), inside `jax.shard_map`: this is one device's program already. Types say
  over which axes values vary, but not whether C is sharded over them: `Spread.hidden_axes` does.

Each way ends on one device. Where tokens are sharded, that needs nothing of the others but for
gradients: each device has a partial sum, and an all-reduce adds those up over the axes over which
other operands vary and the operand of the gradient does not. Where C is sharded, see `split.py`.
Under `jax.vmap`, see `batching.py`.
"""

from jax_mhc._mesh.batching import batched
from jax_mhc._mesh.spread import Spread

__all__ = ["Spread", "batched"]
