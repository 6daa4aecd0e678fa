"""How a call runs on many devices: each on the tokens, or the channels, that it has.

A mesh has three kinds of axes, and may have several of them:

- **Explicit** (`explicit.py`): the types of the operands tell how they lie on it. `jax.shard_map`.
- **Auto** (`auto.py`): XLA decides that, later. `custom_partitioning`, with a rule for Shardy.
- **Manual**, inside `jax.shard_map`: this is one device's program already. Types tell over which
  axes values vary, but not whether C is split over them: `Spread.hidden_axes` does.

Each way ends on one device. Where tokens are split, that needs nothing of the others but for
gradients: that of an operand is summed up over the axes over which others vary and the operand does
not. Where C is split, see `split.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.sharding import AxisType

from jax_mhc._axes import axes_of
from jax_mhc._mesh.auto import run_auto
from jax_mhc._mesh.explicit import run_explicit
from jax_mhc._mesh.manual import run_manual
from jax_mhc._mesh.spread import Spread, map_batch

__all__ = ["Spread", "map_batch", "run"]


def run(spread: Spread, *operands: Any) -> Sequence[Any]:
    """Runs a call on all devices. Gradients have the types of what they are gradients of."""
    if axes_of(operands[0], AxisType.Explicit):
        return run_explicit(spread, *operands)
    return run_manual(run_auto, spread, *operands)
