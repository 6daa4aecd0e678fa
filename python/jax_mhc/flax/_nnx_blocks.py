"""Modules of NNX as functions of their variables, for stacks."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jax_mhc import _errors
from jax_mhc._blocks import Opened
from jax_mhc._types import Tree


def open_modules(op: str, modules: list[Any]) -> list[Opened]:
    """Blocks, or the layers of each by their names.

    Each layer runs by itself, so that a variable that several have would keep the change of one.
    """
    owners: collections.Counter[int] = collections.Counter()
    for each in modules:
        for layer in each.values() if isinstance(each, Mapping) else ():
            owners.update({id(variable) for _, variable in _variables(layer)})
    return [_open(op, each, owners) for each in modules]


def _variables(layer: Any) -> list[tuple[tuple[Any, ...], Any]]:
    if not isinstance(layer, nnx.Pytree):
        return []
    return [(path, v) for path, v in nnx.iter_graph(layer) if isinstance(v, nnx.Variable)]


def _open(op: str, module: Any, owners: collections.Counter[int]) -> Opened:
    layers = module if isinstance(module, Mapping) else {}
    shared = {
        (name, *path)
        for name, layer in layers.items()
        for path, variable in _variables(layer)
        if owners[id(variable)] > 1
    }
    graphdef, state = nnx.split(module)

    def run(state: Any, use: Callable[[Any], Any]) -> tuple[Any, Tree]:
        # Variables of this trace: those of a loop cannot be assigned in a stretch inside of it.
        state = jax.tree.map(lambda leaf: leaf, state)
        before = {path: _parts(variable) for path, variable in nnx.to_flat_state(state)}
        merged = nnx.merge(graphdef, state)
        out = use(merged)
        changed = []
        for path, variable in nnx.to_flat_state(nnx.state(merged)):
            if path in before and _is_same(before[path], _parts(variable)):
                continue
            if path in shared:
                name, *rest = map(str, path)
                raise _errors.Refusal(
                    ValueError, op, ".".join(["blocks", name, "layer", *rest])
                ).expected(
                    "a variable that does not change in the call, since several layers have it",
                    f"a {type(variable).__name__} that does",
                    "Leave the names of sublayers out, or give each layer its own.",
                )
            changed.append((path, variable))
        return out, nnx.from_flat_state(changed)

    return Opened(state, run)


def _parts(variable: Any) -> tuple[list[Any], Any]:
    """The arrays of a variable; those that a call assigns are others, even if they are equal.

    There may be several: `nnx.capture` has a dict that a call fills.
    """
    return jax.tree.flatten(variable.get_raw_value())


def _is_same(one: tuple[list[Any], Any], other: tuple[list[Any], Any]) -> bool:
    return one[1] == other[1] and all(a is b for a, b in zip(one[0], other[0], strict=True))


def update(modules: Any, changes: list[dict[str, Any]]) -> None:
    """Gives the layers of blocks, by name, the new values of the variables that they changed."""
    for module, by_name in zip(modules, changes, strict=True):
        for name, state in by_name.items():
            # The layer is an attribute of its hyper-connection.
            flat = [((name, "layer", *path[1:]), v) for path, v in nnx.to_flat_state(state)]
            nnx.update(module, nnx.from_flat_state(flat))
