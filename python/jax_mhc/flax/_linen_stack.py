"""Blocks of Flax Linen, one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import flax.core
import flax.linen as nn
import jax
from flax.core import meta

from jax_mhc import _errors
from jax_mhc._blocks import Blocks, Opened, run_blocks
from jax_mhc._ops.streams import Streams
from jax_mhc._types import Tree

if TYPE_CHECKING:
    from jaxtyping import Float

_OP = "flax.linen.stack"


def stack(
    block: nn.Module,
    x: Float[jax.Array, "*tokens n C"] | Streams,
    num_blocks: int,
    *,
    arguments: Mapping[str, Any] | None = None,
    xs: Mapping[str, Any] | None = None,
    has_aux: bool | Literal["sum"] = False,
    unroll: int | bool = 1,
    metadata_params: Mapping[Any, Any] | None = None,
) -> Any:
    """Runs num_blocks blocks like this one, each with variables of its own, in `jax_mhc.scan`.

        @nn.compact
        def __call__(self, tokens):
            ...
            x = stack(Block(self.config, name="blocks"), x, self.num_blocks)

    The variables are those of `nn.scan` with `variable_axes={True: 0}, split_rngs={True: True}`
    and a module of the same name: stacked over the blocks, with the same initial values. All
    collections are stacked, and those that are mutable come back changed: batch statistics,
    caches, intermediates. Each block has random numbers of its own. Differentiable with respect to
    the variables, to x and to the arguments.

    Args:
        block: a module that is called with streams and returns the new ones, made inside of the
            module whose call this is, which has its variables.
        x: the streams `[..., n, C]`, or `Streams`.
        num_blocks: the number of blocks.
        arguments: keyword arguments of each block's call, the same for all blocks.
        xs: keyword arguments that are stacked over the blocks, each `[num_blocks, ...]`.
        has_aux: blocks return `(x, aux)`, such as the loss of experts, or several values after x.
            "sum": aux is summed over the blocks.
        unroll: as for `jax.lax.scan`, which runs the loop where it is not 1.
        metadata_params: as for `nn.scan`, `{nn.PARTITION_NAME: "layers"}` where variables have
            names of axes.

    Returns:
        The new streams `[..., n, C]`, or `Streams` where x is. With has_aux `(streams, aux)`: aux
        stacked over the blocks, or its sum.

    Raises:
        ValueError, TypeError: x that is not streams of the modules' n and C; a block that returns
            anything but streams; a module that is not made inside of another; what
            `jax_mhc.scan` raises.
    """
    if not isinstance(block, nn.Module) or block.scope is None:
        raise _errors.Refusal(TypeError, _OP, "block").expected(
            "a module made in the call or the setup of another",
            f"a {type(block).__name__} outside of one"
            if isinstance(block, nn.Module)
            else _errors.typed(block),
            "Call stack there, which then has the variables of all blocks.",
        )
    remedy = "It is that of the model's layers; a block has several sublayers."
    num_blocks = _errors.integer(_OP, "num_blocks", num_blocks, 1, None, remedy)
    boxes = dict(metadata_params or {})
    if block.is_initializing():
        opened, loop = _initializing(block, num_blocks, boxes)
    else:
        opened, loop = _bound(block, num_blocks, boxes), None
    blocks = Blocks(_OP, nn.Module, [block], True, lambda _: [opened])
    options = {"unroll": unroll}
    out, changes = run_blocks(blocks, x, arguments, xs, has_aux, options, loop)
    for collection, variables in meta.add_axis(changes or {}, 0, boxes).items():
        for name, value in variables.items():
            block.put_variable(collection, name, value)
    return out


def _initializing(
    block: nn.Module, num_blocks: int, boxes: dict[Any, Any]
) -> tuple[Opened, Callable[..., Any]]:
    """The block in `nn.scan`, whose keys for initial values nothing else has; and that loop."""

    def loop(body: Callable[..., Any], init: Any, slices: Tree, unroll: int | bool) -> Any:
        def step(module: nn.Module, x: Any, own: Tree) -> Any:
            inside[:] = [module]
            return body(x, (None, own))

        run = nn.scan(
            step,
            variable_axes={True: 0},
            split_rngs={True: True},
            length=num_blocks,
            unroll=unroll,
            metadata_params=boxes,
        )
        return run(block, init, slices[1])

    inside: list[nn.Module] = []
    return Opened(None, lambda _, use: (use(inside[0]), None)), loop


class _Arrays(NamedTuple):
    """Arrays of all blocks, or of one.

    Attributes:
        variables: the collections.
        rngs: keys for random numbers by name.
    """

    variables: Any
    rngs: dict[str, Any]


def _bound(block: nn.Module, num_blocks: int, boxes: dict[Any, Any]) -> Opened:
    """The block as a function of its variables and of keys for random numbers."""
    scope = block.scope
    assert scope is not None
    unbound, variables = block.unbind()
    rngs = {name: jax.random.split(block.make_rng(name), num_blocks) for name in scope.rngs}

    def run(arrays: _Arrays, use: Callable[[Any], Any]) -> tuple[Any, Tree]:
        def call(x: Any, **kwargs: Any) -> Any:
            apply = functools.partial(unbound.apply, arrays.variables, x, rngs=arrays.rngs)
            if scope.mutable is False:
                return apply(**kwargs)
            out, changed = apply(mutable=scope.mutable, **kwargs)
            changes.update(changed)
            return out

        changes: dict[str, Tree] = {}
        return use(call), changes

    return Opened(
        _Arrays(meta.remove_axis(flax.core.unfreeze(dict(variables)), 0, boxes), rngs), run
    )
