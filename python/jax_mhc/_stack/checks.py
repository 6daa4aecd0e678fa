"""Checks of the arguments of `stack`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from jax_mhc import _check, _errors
from jax_mhc._mesh.types import sharded_like
from jax_mhc._scan.public import num_unrolled
from jax_mhc._stack.remat import Recompute, best_length
from jax_mhc._types import Layer, MHCParams, Tree

OP = "stack"

Element = TypeVar("Element")
# From u, and a slice of xs, to y and aux.
CheckedLayer: TypeAlias = Callable[..., tuple[jax.Array, Any]]


def sublayers(
    layers: Sequence[Layer],
    params: Sequence[MHCParams],
    norm_scale: Sequence[jax.Array | None] | None,
    x: _check.Shaped,
    *,
    has_slices: bool,
    has_aux: bool,
) -> tuple[tuple[CheckedLayer, ...], tuple[MHCParams, ...], tuple[jax.Array | None, ...]]:
    """The layers, which check themselves, and for each its parameters and a norm's scale.

    x: the streams that the layers are for.
    has_slices: whether layers take a slice of xs, too.
    has_aux: whether layers return aux; else it is None.
    """
    layers = _elements("layers", layers, "functions, one for each sublayer")
    params = _elements("params", params, "jax_mhc.MHCParams, one for each of layers")
    scales: tuple[jax.Array | None, ...] = (None,) * len(layers)
    if norm_scale is not None:
        scales = _elements("norm_scale", norm_scale, "arrays, one for each of layers")
    for i, layer in enumerate(layers):
        remedy = "Pass the sublayers themselves: stack([attention, mlp], x, params)."
        _errors.function(OP, f"layers[{i}]", layer, "a function", remedy)
    if len(params) != len(layers):
        raise _errors.Refusal(ValueError, OP, "params").expected(
            f"{len(layers)} MHCParams, one for each of layers",
            len(params),
            "Every sublayer has its own; attention and MLP are two.",
        )
    if len(scales) != len(layers):
        raise _errors.Refusal(ValueError, OP, "norm_scale").expected(
            f"{len(layers)} arrays or None, one for each of layers",
            len(scales),
            "Give None for a layer whose input is not to be normalised.",
        )
    of_what = "u and a slice of xs" if has_slices else "u"
    checked = tuple(partial(_run, i, layer, of_what, x, has_aux) for i, layer in enumerate(layers))
    return checked, params, scales


def _run(
    i: int,
    layer: Layer,
    of_what: str,
    x: _check.Shaped,
    has_aux: bool,
    u: jax.Array,
    *of_block: Tree,
) -> tuple[jax.Array, Tree]:
    """The output y of a layer that belongs to the streams x, sharded as u is; and aux.

    Loops require that sharding.
    """
    argument = f"the result of layers[{i}]"
    result = _check.call(OP, f"layers[{i}]", of_what, layer, u, *of_block)
    y, aux = _check.output_and_aux(OP, argument, result, has_aux=has_aux)
    return sharded_like(_check.layer_output(OP, argument, y, x), u), aux


def has_aux(op: str, value: bool | Literal["sum"]) -> bool | Literal["sum"]:
    """Whether layers return aux, and what is done with it."""
    if isinstance(value, str) and value == "sum":
        return "sum"
    if not isinstance(value, bool):
        raise _errors.Refusal(TypeError, op, "has_aux").expected(
            "False, True or 'sum'",
            _errors.typed(value),
            "Give True to get aux stacked over the blocks, 'sum' for its sum over all sublayers.",
        )
    return value


def total(op: str, aux: list[Tree], *, of_blocks: bool) -> Tree:
    """The sum of what the layers told, but for None; over the blocks first, where there are some.

    aux: one pytree for each layer.
    """
    told = [each for each in aux if each is not None]
    if of_blocks:
        told = [jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each) for each in told]
    for each in told[1:]:
        first, other = (str(jax.tree.structure(one)) for one in (told[0], each))
        if first != other:
            raise _errors.Refusal(ValueError, op, "the aux of layers").expected(
                f"one structure, for the sum: {first}",
                other,
                "Return None where there is nothing to add, or set has_aux=True.",
            )
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *told) if told else None


def _elements(argument: str, value: Iterable[Element], expected: str) -> tuple[Element, ...]:
    """The elements of a sequence."""
    try:
        return tuple(value)
    except TypeError as error:
        raise _errors.Refusal(TypeError, OP, argument).expected(
            f"a sequence of {expected}",
            type(value).__name__,
            f"Put it into a list; {argument} stacked over blocks are given as one for each sublayer"
            " of a block, with xs.",
        ) from error


def recompute(value: Recompute) -> None:
    """Checks what is computed again."""
    if not isinstance(value, Recompute):
        raise _errors.Refusal(TypeError, OP, "recompute").expected(
            "jax_mhc.Recompute",
            _errors.typed(value),
            "Make one, such as jax_mhc.Recompute(every='auto').",
        )


def unroll(op: str, value: int | bool, *, has_loop: bool) -> int | bool:
    """Number of steps of the loop that are unrolled; True: all of them."""
    value = num_unrolled(op, value)
    if not has_loop and value not in (False, 1):
        raise _errors.Refusal(ValueError, op, "unroll").expected(
            "1 where there is no xs", value, "Without xs there is no loop; leave unroll out."
        )
    return value


def num_blocks(
    params: tuple[MHCParams, ...], scales: tuple[jax.Array | None, ...], xs: Tree
) -> int:
    """The common length of the leading axes."""
    num_blocks, first = None, ""
    for argument, tree in (("xs", xs), ("params", params), ("norm_scale", scales)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            name = argument + jax.tree_util.keystr(path)
            shape = _check.shape(OP, name, leaf)
            if num_blocks is None and shape:
                num_blocks, first = shape[0], name
            elif shape[:1] != (num_blocks,):
                expected = "a leading axis of blocks"
                if first:
                    expected += f" of length {num_blocks}, as {first} has"
                raise _errors.Refusal(ValueError, OP, name).expected(
                    expected,
                    f"shape {list(shape)}",
                    "With xs, all leaves of params and xs are stacked over the blocks, for "
                    "example by jax.vmap(init)(keys).",
                )
    if num_blocks is None:
        raise _errors.Refusal(ValueError, OP, "xs").expected(
            "an array with a leading axis of blocks",
            "none, nor any params",
            "Leave xs out where there is nothing to loop over.",
        )
    return num_blocks


def stretch(
    every: int | Literal["auto"], streams: int, num_layers: int, num_blocks: int
) -> tuple[int, int]:
    """The sublayers of a stretch, and the blocks in a step of the scan, which is all of it."""
    if not num_layers:
        return 1, 1
    within = [length for length in range(1, num_layers + 1) if num_layers % length == 0]
    across = [b * num_layers for b in range(2, num_blocks + 1) if num_blocks % b == 0]
    if every == "auto":
        every = best_length(streams, num_layers * num_blocks, within + across)
    if every in within:
        return every, 1
    if every in across:
        return every, every // num_layers
    raise _errors.Refusal(ValueError, OP, "recompute.every").expected(
        f"a divisor of {num_layers}, the sublayers of a block, or {num_layers} times a divisor of "
        f"{num_blocks}, the blocks",
        every,
        "All stretches of a scan are of the same length; 'auto' chooses one.",
    )
