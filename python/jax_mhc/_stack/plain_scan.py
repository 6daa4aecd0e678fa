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
from jax_mhc._ops.streams import Streams
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
        """Runs sublayers; returns the streams after the last one, and samples of h_res."""
        samples = []
        for sublayer in sublayers:
            deferred = before.is_deferred if isinstance(before, Streams) else self.defers
            y, ctx, _ = sublayer.until_post(before)
            before = Streams.after(y, ctx, deferred)
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
    before: Streams,
    layers: tuple[Callable[..., jax.Array], ...],
    stacked: tuple[tuple[MHCParams, ...], tuple[jax.Array | None, ...], Tree],
    steps: Steps,
    every: int,
) -> tuple[Streams, jax.Array | None]:
    """Runs all blocks; returns the streams after them, and samples of h_res."""
    num_together, unroll = steps.num_together, steps.unroll

    def step(before: Streams, slices: Tree) -> tuple[Streams, jax.Array | None]:
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
        after, samples = runner.run(before, sublayers, every, prevent_cse)
        assert isinstance(after, Streams)
        return after, jnp.stack(samples) if samples else None

    if num_together > 1:
        stacked = jax.tree.map(
            lambda leaf: leaf.reshape(steps.num, num_together, *leaf.shape[1:]), stacked
        )
    before = before.varying_like(stacked[:2], runner.hidden_axes)
    before, h_res = jax.lax.scan(step, before, stacked, unroll=unroll)
    return before, jax.tree.map(lambda h: h.reshape(-1, *h.shape[2:]), h_res)
