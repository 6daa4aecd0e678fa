"""Sublayers one after the other, and a scan over blocks of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jax_mhc import _check, diagnostics
from jax_mhc._ops.streams import Streams
from jax_mhc._ops.sublayer import Options, Sublayer
from jax_mhc._scan.again import NOTHING, Again
from jax_mhc._scan.public import first, run, takes_own_loop
from jax_mhc._stack import checks
from jax_mhc._stack.remat import NAMES, Policy, Recomputed, policy_of
from jax_mhc._stack.structure import structure
from jax_mhc._types import MHCParams, Tree

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr


class Told(NamedTuple):
    """Values that sublayers tell beside the streams.

    Attributes:
        aux: what the layers returned beside y.
        samples: h_res of some tokens, if they are asked for.
    """

    aux: list[Tree]
    samples: Any


class Steps(NamedTuple):
    """The steps of a scan over blocks."""

    num_blocks: int
    num_together: int
    unroll: int | bool

    @property
    def num(self) -> int:
        return self.num_blocks // self.num_together


# The streams before a sublayer: those that a stack begins with may be an array.
Before: TypeAlias = jax.Array | Streams


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
    """Settings with which the sublayers of a stack are run.

    Attributes:
        x: the streams, of which shape and dtype are read.
        options: those of the ops.
        hidden_axes: the manual axes over which C is sharded.
        policy: that of `Recompute`.
        defers: whether the cotangents of streams are deferred that the stack makes.
        num_samples: the number of tokens whose h_res is returned, or 0.
        of_slices: how errors begin the names of parameters.
    """

    x: _check.Shaped
    options: Options
    hidden_axes: tuple[str, ...]
    policy: Recomputed | Policy
    defers: bool
    num_samples: int
    of_slices: str

    def sublayer(
        self,
        i: int,
        layer: Callable[..., tuple[jax.Array, Tree]],
        params: MHCParams,
        norm_scale: jax.Array | None,
        *of_block: Tree,
    ) -> Sublayer[Tree]:
        """Sublayer i of a block, and the slice of xs that the layer takes, if so."""
        options = self.options
        self.check(i, params, norm_scale)
        return Sublayer(lambda u: layer(u, *of_block), params, norm_scale, options)

    def check(self, i: int, params: MHCParams, norm_scale: jax.Array | None) -> None:
        """Checks parameters of sublayer i of a block."""
        options, x, axes = self.options, self.x, self.hidden_axes
        _check.params(checks.OP, params, x, options["config"], f"{self.of_slices}params[{i}]", axes)
        eps, argument = options["norm_scale_eps"], f"{self.of_slices}norm_scale[{i}]"
        _check.norm_scale(checks.OP, norm_scale, eps, x, argument, axes)

    def _advance(self, before: Before, sublayers: list[Sublayer[Tree]]) -> tuple[Before, Told]:
        """Runs sublayers; returns the streams after the last one, and what they told."""
        told = Told([], [])
        for sublayer in sublayers:
            deferred = before.is_deferred if isinstance(before, Streams) else self.defers
            y, ctx, aux = sublayer.until_post(before)
            before = Streams.after(y, ctx, deferred)
            told.aux.append(aux)
            if self.num_samples:
                told.samples.append(diagnostics.sample_tokens(ctx.h_res, self.num_samples))
        return before, told

    def run(
        self,
        before: Before,
        sublayers: list[Sublayer[Tree]],
        every: int,
        prevent_cse: bool = True,
    ) -> tuple[Before, Told]:
        """Runs sublayers in stretches of `every`, each one `jax.checkpoint` where there is one."""
        if every == 1 and self.policy == "streams":
            return self._advance(before, sublayers)
        policy = self.policy
        what = policy if callable(policy) else policy_of(self.x.shape, policy)
        told = Told([], [])
        for start in range(0, len(sublayers), every):
            stretch = partial(self._advance, sublayers=sublayers[start : start + every])
            run_stretch = jax.checkpoint(stretch, policy=what, prevent_cse=prevent_cse)
            before, of_stretch = run_stretch(before)
            told.aux.extend(of_stretch.aux)
            told.samples.extend(of_stretch.samples)
        return before, told


def run_blocks(
    runner: Runner,
    before: Streams,
    layers: tuple[checks.CheckedLayer, ...],
    stacked: tuple[tuple[MHCParams, ...], tuple[jax.Array | None, ...], Tree],
    steps: Steps,
    every: int,
) -> tuple[Streams, Told]:
    """Runs all blocks; returns the streams after them, and what the sublayers told.

    That of each layer of a block is stacked over the blocks; so are the samples, over all
    sublayers.
    """
    num_together, unroll = steps.num_together, steps.unroll
    layers, key = _traced(runner, before, layers, stacked, (steps, every))
    again = NOTHING
    if takes_own_loop(before, unroll) and not callable(runner.policy):
        again = Again(every, NAMES[runner.policy], runner.options["implementation"] == "fused")
        runner, every = dataclasses.replace(runner, policy="streams"), 1

    def step(before: Streams, slices: Tree) -> tuple[Streams, Told]:
        blocks = [slices]
        if num_together > 1:
            blocks = [jax.tree.map(itemgetter(b), slices) for b in range(num_together)]
        sublayers = [
            runner.sublayer(i, layer, p, scale, s)
            for block_params, scales, s in blocks
            for i, (layer, p, scale) in enumerate(zip(layers, block_params, scales, strict=True))
        ]
        # XLA could merge the two passes again only where no loop is left of them.
        prevent_cse = unroll is True or max(unroll, 1) >= steps.num
        after, (aux, samples) = runner.run(before, sublayers, every, prevent_cse)
        assert isinstance(after, Streams)
        by_layer = [aux[i :: len(layers)] for i in range(len(layers))]
        return after, Told([stacked_up(each) for each in by_layer], stacked_up(samples))

    if num_together > 1:
        stacked = jax.tree.map(
            lambda leaf: leaf.reshape(steps.num, num_together, *leaf.shape[1:]), stacked
        )
    before = before.varying_like(stacked[:2], runner.hidden_axes)
    after, told = run(checks.OP, step, before, stacked, unroll=unroll, again=again, key=key)
    return after, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), told)


def _traced(
    runner: Runner,
    before: Streams,
    layers: tuple[checks.CheckedLayer, ...],
    stacked: tuple[tuple[MHCParams, ...], tuple[jax.Array | None, ...], Tree],
    of_loop: Hashable,
) -> tuple[tuple[checks.CheckedLayer, ...], Hashable]:
    """The layers as programs, and a key that loops over blocks have in common which are alike.

    Functions written in place are new objects in every call; their programs tell.
    """
    params, scales, xs = stacked
    for i, of_one in enumerate(zip(params, scales, strict=True)):
        runner.check(i, *jax.tree.map(first, of_one))
    before = before.varying_like((params, scales), runner.hidden_axes)
    u = jax.tree.leaves(before)[0][..., 0, :]
    s = jax.tree.map(first, xs)
    traced = [jax.make_jaxpr(layer, return_shape=True)(u, s) for layer in layers]
    constants = [value for program, _ in traced for value in program.consts]
    # Arrays that layers have in common are one constant of the loop.
    alike = [next(i for i, other in enumerate(constants) if other is c) for c in constants]
    key = (
        tuple(
            (structure(program.jaxpr), jax.tree.structure(results)) for program, results in traced
        ),
        tuple(alike),
        tuple(jax.tree.structure(p) for p in (params, scales, xs)),
        tuple(runner.options.items()),
        (runner.policy, runner.defers, runner.num_samples),
        of_loop,
    )

    def run_layer(
        program: ClosedJaxpr, results: Tree, u: jax.Array, s: Tree
    ) -> tuple[jax.Array, Tree]:
        values = jax.core.eval_jaxpr(program.jaxpr, program.consts, u, *jax.tree.leaves(s))
        y, aux = jax.tree.unflatten(jax.tree.structure(results), values)
        return y, aux

    return tuple(partial(run_layer, *each) for each in traced), key


def stacked_up(values: list[Tree]) -> Tree:
    """Pytrees stacked leaf by leaf; None if there are none."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *values) if values else None
