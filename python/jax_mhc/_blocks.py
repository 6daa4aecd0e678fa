"""Stacks of blocks that are modules; what the libraries of modules have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

import jax_mhc
from jax_mhc import _check, _errors, _module
from jax_mhc._ops.streams import Streams, first_streams
from jax_mhc._scan import public as scan
from jax_mhc._stack import checks
from jax_mhc._types import Tree

# Keyword arguments of a block, or of each sublayer by its name.
Arguments: TypeAlias = Mapping[str, Any]
HasAux: TypeAlias = bool | Literal["sum"]


class Opened(NamedTuple):
    """A module, or layers by their names, as a function of arrays.

    Attributes:
        arrays: the arrays.
        run: the function of arrays and of what is done with the module; it returns the result of
            that, and what it changed, a pytree of arrays.
    """

    arrays: Tree
    run: Callable[[Tree, Callable[[Any], Any]], tuple[Any, Tree]]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of a library of modules.

    Attributes:
        op: the name for errors.
        kind: the class of the library's hyper-connections.
        modules: the blocks; where their arrays are stacked the one module that they make up.
        is_stacked: whether they are.
        open: from modules, each a block or its layers by their names, to functions.
    """

    op: str
    kind: type
    modules: Sequence[Any]
    is_stacked: bool
    open: Callable[[list[Any]], list[Opened]]


def run_blocks(
    blocks: Blocks,
    x: jax.Array | Streams,
    arguments: Arguments | None,
    xs: Arguments | None,
    has_aux: HasAux,
    options: Mapping[str, Any],
    loop: Callable[..., Any] | None = None,
) -> tuple[Any, Tree]:
    """`x = block(x, **arguments)` for each block; and the changes of stacked ones.

    loop: what runs stacked ones in place of `jax_mhc.scan`.
    """
    for name in options:
        if name != "unroll":
            raise _errors.Refusal(TypeError, blocks.op, name).expected(
                "names of sublayers beside it",
                "none",
                "Name the blocks' sublayers in their order: ['attention', 'mlp'].",
            )
    arguments, xs = _mapping(blocks, "arguments", arguments), _mapping(blocks, "xs", xs)
    checks.has_aux(blocks.op, has_aux)
    checks.unroll(blocks.op, options.get("unroll", 1), has_loop=blocks.is_stacked)
    for module in blocks.modules:
        remedy = "Give blocks that return the new streams, or the names of their sublayers."
        _errors.function(blocks.op, "blocks", module, "blocks to call with streams", remedy)
    before = x
    if not isinstance(x, Streams):
        before = first_streams(blocks.op, _check.streams(blocks.op, "x", x), None, None)
    aux, changes = None, None
    if blocks.is_stacked:
        ((arrays, run),) = blocks.open([blocks.modules[0]])

        def body(x: Streams, slices: Tree) -> tuple[Any, Tree]:
            of_block, own = slices
            out, changes = run(of_block, lambda block: _called(blocks, block, x, arguments, own))
            after, aux = _parted(blocks, out, x, has_aux)
            return after, (aux, changes)

        loop = loop or partial(scan.run, blocks.op)
        after, (aux, changes) = loop(body, before, (arrays, xs), **options)
        aux = checks.total(blocks.op, [aux], of_blocks=True) if has_aux == "sum" else aux
    else:
        told, after = [], before
        for i, block in enumerate(blocks.modules):
            own = _slice(blocks, xs, i)
            out = _called(blocks, block, after, arguments, own)
            after, of_block = _parted(blocks, out, after, has_aux)
            told.append(of_block)
        aux = checks.total(blocks.op, told, of_blocks=False) if has_aux == "sum" else tuple(told)
    if not isinstance(x, Streams):
        after = after.array()
    return ((after, aux) if has_aux else after), changes


def _called(blocks: Blocks, block: Any, x: Any, arguments: Arguments, own: Arguments) -> Any:
    what = "streams and the keyword arguments given"
    return _check.call(blocks.op, "blocks", what, block, x, **arguments, **own)


def _parted(blocks: Blocks, out: Any, x: Any, has_aux: HasAux) -> tuple[Any, Tree]:
    """The streams and the aux that a block returned."""
    after, aux = parted(out)
    if not isinstance(after, Streams):
        raise _errors.Refusal(TypeError, blocks.op, "the result of a block").expected(
            f"the new streams, {x!r}, or a tuple that begins with them",
            _errors.typed(after),
            "Return what the last MHC of the block returns; jax_mhc.reduce comes after all blocks.",
        )
    if not has_aux and jax.tree.leaves(aux):
        raise _errors.Refusal(TypeError, blocks.op, "the result of a block").expected(
            "streams alone",
            f"a tuple of {len(out)}",
            "Set has_aux=True, or 'sum', for blocks that return (x, aux).",
        )
    return after, aux


def parted(out: Any) -> tuple[Any, Tree]:
    """The first of a tuple, and the rest: one value, or the tuple of several; else None."""
    if not isinstance(out, tuple) or not out:
        return out, None
    first, *rest = out
    return first, rest[0] if len(rest) == 1 else tuple(rest) if rest else None


def _mapping(blocks: Blocks, argument: str, value: Arguments | None) -> Arguments:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _errors.Refusal(TypeError, blocks.op, argument).expected(
            "a mapping of names to keyword arguments of a block",
            _errors.typed(value),
            f"Name each: {argument}={{'mask': mask}}.",
        )
    return value


def _slice(blocks: Blocks, xs: Arguments, i: int) -> Arguments:
    """The slice of xs that block i has."""
    num = len(blocks.modules)
    for path, leaf in jax.tree.leaves_with_path(xs):
        name = "xs" + jax.tree_util.keystr(path)
        shape = _check.shape(blocks.op, name, leaf)
        if shape[:1] != (num,):
            raise _errors.Refusal(ValueError, blocks.op, name).expected(
                f"a leading axis of {num}, the number of blocks",
                f"shape {list(shape)}",
                "Stack what differs from block to block; the rest belongs into arguments.",
            )
    return jax.tree.map(lambda leaf: leaf[i], xs)


# ---- the sublayers of blocks by their names -----------------------------------------------------

# Settings that `jax_mhc.stack` takes once, for all sublayers.
_SETTINGS = ("config", "norm_scale_eps", "implementation")


def run_sublayers(
    blocks: Blocks,
    x: jax.Array | Streams,
    sublayers: Sequence[str] | Mapping[str, Arguments],
    arguments: Arguments | None,
    xs: Mapping[str, Arguments] | None,
    has_aux: HasAux,
    options: dict[str, Any],
) -> tuple[Any, list[dict[str, Tree]]]:
    """All sublayers of all blocks by `jax_mhc.stack`; and the changes, by block and name.

    options: those of `jax_mhc.stack`; with sample_tokens those of `stack_with_samples`.
    """
    named = _names(blocks, sublayers)
    names = list(named)
    if arguments is not None:
        raise _errors.Refusal(TypeError, blocks.op, "arguments").expected(
            "none beside names of sublayers",
            _errors.typed(arguments),
            "Give each sublayer its own: sublayers={'attention': {'mask': mask}, 'mlp': {}}.",
        )
    own_xs = _of_names(blocks, names, xs)
    checks.has_aux(blocks.op, has_aux)
    for name in (*_SETTINGS, "params", "norm_scale"):
        if name in options:
            raise _errors.Refusal(TypeError, blocks.op, name).expected(
                "no such option, since the sublayers have it",
                _errors.typed(options[name]),
                "Give it to each MHC instead.",
            )
    modules = [{name: _sublayer(blocks, block, name) for name in names} for block in blocks.modules]
    settings = _settings(blocks, modules)
    opened = blocks.open([{n: module.layer for n, module in each.items()} for each in modules])

    def layer(i: int, name: str) -> Callable[..., Any]:
        def of_block(u: jax.Array, slices: tuple[Tree, Mapping[str, Arguments]]) -> Any:
            arrays, own = slices
            what = "u and the arguments given"

            def call(layers: Mapping[str, Any]) -> Any:
                at, kwargs = f"blocks.{name}.layer", {**named[name], **own.get(name, {})}
                return _check.call(blocks.op, at, what, layers[name], u, **kwargs)

            out, changes = opened[i].run(arrays, call)
            y, aux = parted(out)
            if not has_aux and jax.tree.leaves(aux):
                raise _errors.Refusal(
                    TypeError, blocks.op, f"the result of blocks.{name}.layer"
                ).expected(
                    "one array",
                    f"a tuple of {len(out)}",
                    "Set has_aux=True, or 'sum', for layers that return (y, aux).",
                )
            return y, (aux, changes)

        if blocks.is_stacked:
            return of_block
        return lambda u: of_block(u, (opened[i].arrays, _slice(blocks, own_xs, i)))

    each = [(i, name) for i in range(len(modules)) for name in names]
    if each:
        first = modules[0][names[0]]
        x = _module.streams(blocks.op, x, first.streams, first.hidden)
    run = jax_mhc.stack_with_samples if "sample_tokens" in options else jax_mhc.stack
    after, told, *samples = run(
        [layer(i, name) for i, name in each],
        x,
        [modules[i][name].params for i, name in each],
        xs=(opened[0].arrays, own_xs) if blocks.is_stacked else None,
        norm_scale=[modules[i][name]._scale for i, name in each],
        has_aux=True,
        **settings,
        **options,
    )
    auxes: list[dict[str, Tree]] = [{} for _ in modules]
    changes: list[dict[str, Tree]] = [{} for _ in modules]
    for (i, name), (of_layer, changed) in zip(each, told, strict=True):
        auxes[i][name], changes[i][name] = of_layer, changed
    if has_aux == "sum":
        summed = [aux for of_block in auxes for aux in of_block.values()]
        aux: Any = checks.total(blocks.op, summed, of_blocks=blocks.is_stacked)
    else:
        aux = auxes[0] if blocks.is_stacked else tuple(auxes)
    results = (after, *([aux] if has_aux else []), *samples)
    return (results if len(results) > 1 else after), changes


def _names(blocks: Blocks, sublayers: Any) -> Mapping[str, Arguments]:
    """The arguments of each sublayer by its name."""
    names: tuple[Any, ...] = ()
    if isinstance(sublayers, Iterable) and not isinstance(sublayers, str):
        names = tuple(sublayers)
    of_layers = sublayers.values() if isinstance(sublayers, Mapping) else ()
    if (
        not names
        or not all(isinstance(name, str) for name in names)
        or not all(isinstance(arguments, Mapping) for arguments in of_layers)
    ):
        raise _errors.Refusal(ValueError, blocks.op, "sublayers").expected(
            "a sequence of names of attributes of blocks, or a mapping of them to arguments",
            _errors.shown(sublayers),
            "Name the sublayers in their order: ['attention', 'mlp'].",
        )
    return sublayers if isinstance(sublayers, Mapping) else {name: {} for name in names}


def _of_names(blocks: Blocks, names: list[str], xs: Any) -> Mapping[str, Arguments]:
    if xs is None:
        return {}
    if not isinstance(xs, Mapping) or not all(
        name in names and isinstance(own, Mapping) for name, own in xs.items()
    ):
        raise _errors.Refusal(TypeError, blocks.op, "xs").expected(
            f"a mapping of the sublayers {names} to arguments that are stacked over the blocks",
            _errors.typed(xs),
            f"Give xs={{'{names[0]}': {{'key': jax.random.split(key, num_blocks)}}}}.",
        )
    return xs


def _sublayer(blocks: Blocks, block: Any, name: str) -> Any:
    module = getattr(block, name, None)
    if not isinstance(module, blocks.kind):
        raise _errors.Refusal(TypeError, blocks.op, f"blocks.{name}").expected(
            f"a {blocks.kind.__module__}.MHC",
            type(module).__name__,
            "Wrap each sublayer of a block in MHC.",
        )
    return module


def _settings(blocks: Blocks, modules: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all sublayers have in common."""
    first = next(iter(modules[0].values())) if modules else None
    settings = {name: getattr(first, name) for name in _SETTINGS} if modules else {}
    for name, module in ((n, m) for each in modules for n, m in each.items()):
        for setting, value in settings.items():
            if (got := getattr(module, setting)) != value:
                raise _errors.Refusal(ValueError, blocks.op, f"blocks.{name}.{setting}").expected(
                    f"that of the other sublayers, {value!r}",
                    repr(got),
                    "Make all sublayers of a stack alike, or leave the names out.",
                )
    return settings
