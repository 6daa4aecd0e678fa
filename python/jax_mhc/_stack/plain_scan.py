"""Sublayers one after the other, and a scan over blocks of them, differentiated by JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_mhc import _check, diagnostics
from jax_mhc._axes import varying_like
from jax_mhc._call import Implementation
from jax_mhc._mesh.types import sharded_like
from jax_mhc._ops.deferred import streams
from jax_mhc._ops.post_pre import post_pre
from jax_mhc._ops.pre import pre
from jax_mhc._stack import checks
from jax_mhc._stack.own_scan import no_sublayer
from jax_mhc._stack.remat import Recomputed, policy_of
from jax_mhc._types import Context, MHCConfig, MHCParams


class Pending(NamedTuple):
    """Operands of the pending post of a sublayer; a context has more than a loop should carry.

    The cotangent of x is deferred where the ops are fused (_ops/deferred.py).
    """

    x: jax.Array
    y: jax.Array
    h_post: jax.Array
    h_res: jax.Array

    def operands(self) -> tuple[jax.Array, Context]:
        """The first operands of post and of post_pre, which do not read h_pre."""
        h_pre = self.h_post
        return self.y, Context._of(self.x, self.x, h_pre, self.h_post, self.h_res)


class Sublayer(NamedTuple):
    """A sublayer and its place in `layers`."""

    place: int
    layer: Callable[[jax.Array], Any]
    params: MHCParams
    norm_scale: jax.Array | None


class Steps(NamedTuple):
    """The steps of a scan over blocks."""

    num_blocks: int
    num_together: int
    unroll: int | bool

    @property
    def num(self) -> int:
        return self.num_blocks // self.num_together


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
    """Settings with which sublayers are run; `of_slices` is how errors name their parameters."""

    x: jax.Array
    config: MHCConfig
    norm_scale_eps: float
    hidden_axes: tuple[str, ...]
    implementation: Implementation
    policy: Recomputed | Callable[..., Any]
    num_samples: int
    of_slices: str

    def _advance(self, before: Any, sublayers: list[Sublayer]) -> Any:
        """Runs sublayers; returns the pending post of the last one, and samples of h_res."""
        x, eps, axes = self.x, self.norm_scale_eps, self.hidden_axes
        options: dict[str, Any] = {
            "config": self.config, "implementation": self.implementation, "norm_scale_eps": eps,
            "hidden_axis_name": axes,
        }  # fmt: skip
        samples = []
        for i, layer, p, scale in sublayers:
            _check.params(checks.OP, p, x, self.config, f"{self.of_slices}params[{i}]", axes)
            _check.norm_scale(checks.OP, scale, eps, x, f"{self.of_slices}norm_scale[{i}]", axes)
            if isinstance(before, Pending):
                u, ctx = post_pre(*before.operands(), p, norm_scale=scale, **options)
            else:
                u, ctx = pre(before, p, norm_scale=scale, **options)
            # Loops want the type of y to be that of u.
            y = sharded_like(checks.layer_output(i, layer(u), x), u)
            y = checkpoint_name(y, "mhc_layer_output")
            before = Pending(streams(ctx)[1], y, ctx.h_post, ctx.h_res)
            if self.num_samples:
                samples.append(diagnostics.sample_tokens(ctx.h_res, self.num_samples))
        return before, samples

    def run(
        self, before: Any, sublayers: list[Sublayer], every: int, prevent_cse: bool = True
    ) -> Any:
        """Runs sublayers in stretches of `every`, each one `jax.checkpoint` where there is one."""
        if every == 1 and self.policy == "streams":
            return self._advance(before, sublayers)
        policy = self.policy
        what = policy if callable(policy) else policy_of(self.x.shape, policy)
        samples: list[Any] = []
        for start in range(0, len(sublayers), every):
            stretch = partial(self._advance, sublayers=sublayers[start : start + every])
            run_stretch = jax.checkpoint(stretch, policy=what, prevent_cse=prevent_cse)
            before, of_stretch = run_stretch(before)
            samples += of_stretch
        return before, samples


def scan(
    run: Callable[..., Any],
    layers: tuple[Callable[..., Any], ...],
    x: jax.Array,
    stacked: tuple[tuple[MHCParams, ...], tuple[Any, ...], Any],
    steps: Steps,
    hidden_axes: tuple[str, ...],
) -> tuple[Pending, Any]:
    """Runs all blocks; returns the pending post of the last sublayer, and samples of h_res."""
    num_together, unroll = steps.num_together, steps.unroll

    def step(before: Pending, slices: Any) -> tuple[Pending, Any]:
        blocks = [slices]
        if num_together > 1:
            blocks = [jax.tree.map(itemgetter(b), slices) for b in range(num_together)]
        sublayers = [
            Sublayer(i, partial(_with_slice, layer, s), p, scale)
            for block_params, scales, s in blocks
            for i, (layer, p, scale) in enumerate(zip(layers, block_params, scales, strict=True))
        ]
        # XLA could merge the two passes again only where no loop is left of them.
        before, samples = run(before, sublayers, prevent_cse=unroll is True or unroll >= steps.num)
        return before, jnp.stack(samples) if samples else None

    if num_together > 1:
        stacked = jax.tree.map(
            lambda leaf: leaf.reshape(steps.num, num_together, *leaf.shape[1:]), stacked
        )
    x = varying_like(x, x, *jax.tree.leaves(stacked[:2]))
    first = Pending(x, *no_sublayer(x, hidden_axes))
    before, h_res = jax.lax.scan(step, first, stacked, unroll=unroll)
    return before, jax.tree.map(lambda h: h.reshape(-1, *h.shape[2:]), h_res)


def _with_slice(layer: Callable[..., Any], s: Any, u: jax.Array) -> Any:
    return layer(u, s)
