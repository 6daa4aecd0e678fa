"""Fully sharded training: each device has a part of the batch, and of parameters and optimizer."""

import contextlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"
# Arrays of fewer numbers stay whole: a sum over devices costs less than to bring them together.
SMALL = 1024


class Devices:
    """Devices of a run; on one, arrays lie as JAX puts them."""

    def __init__(self, num: int):
        self.num, self.mesh = num, None
        if num > 1:
            kinds, devices = (AxisType.Auto,), jax.devices()[:num]
            self.mesh = jax.make_mesh((num,), (AXIS,), axis_types=kinds, devices=devices)

    def used(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which a program for these devices is traced."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def place(self, *modules: nnx.Module) -> None:
        """Placement of what modules hold where a step leaves it."""
        if self.mesh is not None:
            with self.used():
                state = nnx.state(modules)
                put = jax.tree.map(lambda a: jax.device_put(a, self._on(_spec(a))), state)
                nnx.update(modules, put)

    def batch(self, tokens: np.ndarray) -> Any:
        """Tokens, whose first dimension is split where the devices divide it."""
        return tokens if self.mesh is None else jax.device_put(tokens, self._of_batch(len(tokens)))

    def abstract_batch(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding = None if self.mesh is None else self._of_batch(shape[0])
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)

    def _of_batch(self, size: int) -> NamedSharding:
        return self._on(P() if size % self.num else P(AXIS))

    def _on(self, spec: P) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)


def split_batch(u: jax.Array) -> jax.Array:
    """Layer input, split as the batch is, so that XLA brings parameters together and not u."""
    return u if _is_whole(u.shape[0]) else jax.lax.with_sharding_constraint(u, P(AXIS))


def keep(*modules: nnx.Module) -> None:
    """Constraint in a step, which leaves what modules hold where it was."""
    if not _is_whole(0):
        state = nnx.state(modules)
        nnx.update(
            modules,
            jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, _spec(a)), state),
        )


def _is_whole(size: int) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or size % mesh.shape[AXIS] != 0


def _spec(array: jax.Array) -> P:
    """Split of the widest dimension that the devices divide, which is not that of the blocks."""
    num = jax.sharding.get_abstract_mesh().shape[AXIS]
    fitting = [axis for axis, size in enumerate(array.shape) if size % num == 0]
    if not fitting or array.size < SMALL:
        return P()
    widest = max(fitting, key=lambda axis: (array.shape[axis], axis))
    return P(*[None] * widest, AXIS)
