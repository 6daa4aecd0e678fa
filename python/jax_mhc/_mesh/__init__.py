"""How a call runs on many devices: each on its shard of the tokens, or of the channels.

A mesh has three kinds of axes, and may have several of them:

- **Explicit** (`explicit.py`): the types of the operands say how they are sharded.
  `jax.shard_map`.
- **Auto** (`auto.py`): XLA decides that, later. `custom_partitioning`, with a rule for Shardy.
- **Manual**, inside `jax.shard_map`: this is one device's program already. Types say over which
  axes values vary, but not whether C is sharded over them: `Spread.hidden_axes` does.

Each way ends on one device. Where tokens are sharded, it needs nothing of the others but for
gradients: the gradient of an operand is summed over the axes over which others vary and the operand
does not. `split.py` is for sharded C.
"""

from __future__ import annotations

from jax.sharding import AxisType

from jax_mhc._axes import axes_of
from jax_mhc._call.table import Values
from jax_mhc._mesh.auto import run_auto
from jax_mhc._mesh.explicit import run_explicit
from jax_mhc._mesh.manual import run_manual
from jax_mhc._mesh.spread import Spread, map_batch

__all__ = ["Spread", "map_batch", "run"]


def run(spread: Spread, operands: Values) -> Values:
    """The results of a call on all devices. Gradients have the types of their operands."""
    if axes_of(operands[spread.call.operands[0]], AxisType.Explicit):
        return run_explicit(spread, operands)
    return run_manual(run_auto, spread, operands)
