"""Sublayers one after the other, and a scan over blocks of them, differentiated by JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jax_mhc import _check, diagnostics
from jax_mhc._axes import varying_like
from jax_mhc._ops.deferred import streams
from jax_mhc._ops.pending import Pending, PendingPost, no_sublayer
from jax_mhc._ops.sublayer import Options, Sublayer
from jax_mhc._stack import checks
from jax_mhc._stack.remat import Policy, Recomputed, policy_of
from jax_mhc._types import MHCParams, Tree


class Steps(NamedTuple):
    """The steps of a scan over blocks."""

    num_blocks: int
    num_together: int
    unroll: int | bool

    @property
    def num(self) -> int:
        return self.num_blocks // self.num_together


# The streams that a stack begins with, or those before the pending post of a sublayer.
Before: TypeAlias = jax.Array | PendingPost


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
    """Settings with which the sublayers of a stack are run.

    Attributes:
        x: the streams, of which shape and dtype are read.
        options: those of the ops.
        hidden_axes: the manual axes over which C is sharded.
        policy: that of `Recompute`.
        num_samples: the number of tokens whose h_res is returned, or 0.
        of_slices: how errors begin the names of parameters.
    """

    x: jax.Array
    options: Options
    hidden_axes: tuple[str, ...]
    policy: Recomputed | Policy
    num_samples: int
    of_slices: str

    def sublayer(
        self,
        i: int,
        layer: Callable[..., jax.Array],
        params: MHCParams,
        norm_scale: jax.Array | None,
        *of_block: Tree,
    ) -> Sublayer[None]:
        """Sublayer i of a block, and the slice of xs that the layer takes, if so."""
        options, x, axes = self.options, self.x, self.hidden_axes
        _check.params(checks.OP, params, x, options["config"], f"{self.of_slices}params[{i}]", axes)
        eps, argument = options["norm_scale_eps"], f"{self.of_slices}norm_scale[{i}]"
        _check.norm_scale(checks.OP, norm_scale, eps, x, argument, axes)
        return Sublayer(lambda u: (layer(u, *of_block), None), params, norm_scale, options)

    def _advance(
        self, before: Before, sublayers: list[Sublayer[None]]
    ) -> tuple[Before, list[jax.Array]]:
        """Runs sublayers; returns the pending post of the last one, and samples of h_res."""
        samples = []
        for sublayer in sublayers:
            operands = before.operands() if isinstance(before, PendingPost) else before
            y, ctx, _ = sublayer.until_post(operands)
            before = PendingPost(streams(ctx)[1], Pending(y, ctx.h_post, ctx.h_res))
            if self.num_samples:
                samples.append(diagnostics.sample_tokens(ctx.h_res, self.num_samples))
        return before, samples

    def run(
        self,
        before: Before,
        sublayers: list[Sublayer[None]],
        every: int,
        prevent_cse: bool = True,
    ) -> tuple[Before, list[jax.Array]]:
        """Runs sublayers in stretches of `every`, each one `jax.checkpoint` where there is one."""
        if every == 1 and self.policy == "streams":
            return self._advance(before, sublayers)
        policy = self.policy
        what = policy if callable(policy) else policy_of(self.x.shape, policy)
        samples: list[jax.Array] = []
        for start in range(0, len(sublayers), every):
            stretch = partial(self._advance, sublayers=sublayers[start : start + every])
            run_stretch = jax.checkpoint(stretch, policy=what, prevent_cse=prevent_cse)
            before, of_stretch = run_stretch(before)
            samples += of_stretch
        return before, samples


def scan(
    runner: Runner,
    layers: tuple[Callable[..., jax.Array], ...],
    stacked: tuple[tuple[MHCParams, ...], tuple[jax.Array | None, ...], Tree],
    steps: Steps,
    every: int,
) -> tuple[Before, jax.Array | None]:
    """Runs all blocks; returns the pending post of the last sublayer, and samples of h_res."""
    num_together, unroll = steps.num_together, steps.unroll

    def step(before: Before, slices: Tree) -> tuple[Before, jax.Array | None]:
        blocks = [slices]
        if num_together > 1:
            blocks = [jax.tree.map(itemgetter(b), slices) for b in range(num_together)]
        sublayers = [
            runner.sublayer(i, layer, p, scale, s)
            for block_params, scales, s in blocks
            for i, (layer, p, scale) in enumerate(zip(layers, block_params, scales, strict=True))
        ]
        # XLA could merge the two passes again only where no loop is left of them.
        prevent_cse = unroll is True or unroll >= steps.num
        before, samples = runner.run(before, sublayers, every, prevent_cse)
        return before, jnp.stack(samples) if samples else None

    if num_together > 1:
        stacked = jax.tree.map(
            lambda leaf: leaf.reshape(steps.num, num_together, *leaf.shape[1:]), stacked
        )
    x = varying_like(runner.x, runner.x, *jax.tree.leaves(stacked[:2]))
    first: Before = PendingPost(x, no_sublayer(x, runner.hidden_axes))
    before, h_res = jax.lax.scan(step, first, stacked, unroll=unroll)
    return before, jax.tree.map(lambda h: h.reshape(-1, *h.shape[2:]), h_res)
