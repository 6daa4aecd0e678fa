"""Layers of MaxText's trees, of which some are scanned: one array for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_mhc._errors import Refusal
from jax_mhc.convert._names import Place

# MaxText's default of `param_scan_axis`.
AXIS = 1
# Layers of a block of deepseek4, which scans blocks.
_BLOCK = 2

# Stacks with the numbers in their names: of a layer, or the first and the last of some that are
# scanned. Those with engrams among them count all layers, others the layers of their kind.
_STACK = re.compile(
    r"(?P<kind>scanned_blocks\.layers|layers|dense_layers|moe_layers)"
    r"(?P<engram>_engram)?(?:_(?P<first>\d+))?(?:_(?P<last>\d+))?"
)


class Source(NamedTuple):
    """A stored tensor, or a layer of one that is scanned.

    Attributes:
        name: the tensor's name.
        layer: along `AXIS`; None: the whole tensor.
    """

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        """The tensor in a message."""
        return self.name if self.layer is None else f"{self.name}[:, {self.layer}]"

    def of(self, tensor: Any) -> Any:
        """The layer of the tensor."""
        return tensor if self.layer is None else np.asarray(tensor).take(self.layer, AXIS)


def in_one_stack(
    op: str, places: Mapping[Place, Mapping[str, str]], tensors: Mapping[str, Any]
) -> dict[Place, dict[str, Source]]:
    """Places of MaxText as layers of one stack, the first of which is 0, and their tensors.

    Args:
        op: what an error names.
        places: names of tensors by their ends, of each place as its name has it.
        tensors: by name.
    """
    stacks = {place.stack: found for place in places if (found := _STACK.fullmatch(place.stack))}
    names: dict[str, list[str]] = {stack: [] for stack in stacks}
    for place, parts in places.items():
        names.get(place.stack, []).extend(parts.values())
    layers = _layers_of(
        stacks,
        {
            stack: _length(op, names[stack], tensors)
            for stack, found in stacks.items()
            if found["kind"].startswith("scanned") or found["last"] or not found["first"]
        },
    )
    whole: dict[Place, dict[str, Source]] = {}
    for place, parts in places.items():
        if place.stack not in stacks:  # a head
            whole |= as_named({place: parts})
            continue
        for layer, at in layers[place.stack]:
            there = whole.setdefault(Place("layers", layer, place.site), {})
            for part, name in parts.items():
                if part in there:
                    raise Refusal(ValueError, op, name).expected(
                        f"one tensor for {part} of layers[{layer}].{place.site}",
                        f"{there[part]}, too",
                        "Pass the tensors of one model, scanned or not.",
                    )
                there[part] = Source(name, at)
    return dict(sorted(whole.items()))


def as_named(places: Mapping[Place, Mapping[str, str]]) -> dict[Place, dict[str, Source]]:
    """Places whose tensors are of one layer each."""
    return {
        place: {part: Source(name) for part, name in parts.items()}
        for place, parts in places.items()
    }


def joined(tensors: Mapping[Source, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by name, of which scanned ones are put together again."""
    whole = {source.name: value for source, value in tensors.items() if source.layer is None}
    scanned: dict[str, dict[int, np.ndarray]] = {}
    for source, value in tensors.items():
        if source.layer is not None:
            scanned.setdefault(source.name, {})[source.layer] = value
    return whole | {
        name: np.stack([values[layer] for layer in sorted(values)], AXIS)
        for name, values in scanned.items()
    }


def _layers_of(
    stacks: Mapping[str, re.Match[str]], lengths: Mapping[str, int]
) -> dict[str, list[tuple[int, int | None]]]:
    """Of each stack the numbers of its layers, and where each is along `AXIS`."""

    def end(kind: str) -> int:
        """The number of layers of a kind that is counted from 0."""
        ends = [
            lengths.get(stack, 1) + int(found["first"] or 0)
            for stack, found in stacks.items()
            if found["kind"] == kind
        ]
        return max(ends, default=0)

    counts_all = any(found["engram"] or found["last"] for found in stacks.values())
    layers: dict[str, list[tuple[int, int | None]]] = {}
    for stack, found in stacks.items():
        first, step = int(found["first"] or 0), 1
        if found["kind"] == "scanned_blocks.layers":
            first, step = first + end("layers"), _BLOCK
        elif found["kind"] == "moe_layers" and not counts_all:
            first += end("dense_layers")
        length = lengths.get(stack)
        layers[stack] = (
            [(first, None)] if length is None else [(first + step * at, at) for at in range(length)]
        )
    return layers


def _length(op: str, names: Iterable[str], tensors: Mapping[str, Any]) -> int:
    """The number of layers of scanned tensors, which is the same for all."""
    length = None
    for name in names:
        shape = tensors[name].shape
        here = shape[AXIS] if len(shape) > AXIS else 0
        if not here or here != (length := length or here):
            raise Refusal(ValueError, op, name).expected(
                f"{length or 'scanned'} layers along the second axis",
                f"shape {list(shape)}",
                "It is MaxText's param_scan_axis by default: with another one, move the axis there "
                "by jnp.moveaxis.",
            )
    return length or 0
