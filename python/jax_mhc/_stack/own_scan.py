"""A scan over blocks of sublayers that post_pre joins, with a backward pass of its own.

JAX's derivative of a scan copies what an iteration keeps for the backward pass into an array over
all iterations, and fills that array with zeros beforehand: of the streams, 3 n·C values a token
for every sublayer. Here the loop carries the arrays of streams. A post_pre writes its streams to
their place there, and the next one reads them from there; on GPUs XLA hands the kernels these
places themselves (dynamic-slice fusion), and nothing is filled.

Streams are kept before every stretch of sublayers, which may be one of them; within longer ones the
backward pass computes them again from what the layers returned, and runs no layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_mhc._axes import varying_like
from jax_mhc._call import Settings, Values, reverse_mode_only
from jax_mhc._check import accumulation_dtype
from jax_mhc._mesh.types import empty_stack, empty_stack_of, of_tokens
from jax_mhc._ops.fused_op import fused_call
from jax_mhc._ops.pre import KEPT
from jax_mhc._stack.layer import Layer, is_inexact, merge, partition
from jax_mhc._stack.structure import structure
from jax_mhc.diagnostics import sample_tokens


def own_scan(
    layers: Sequence[Callable[..., Any]],
    x: Any,
    params: Sequence[Values],
    xs: Any,
    *,
    settings: Settings,
    stretches: Stretches,
    num_samples: int = 0,
) -> tuple[Any, Any]:
    """The streams `[..., n, C]` after all blocks; and h_res of some tokens `[L, S, n, n]`, or None.

    Args:
        layers: the sublayers of a block, `(u, s) -> y`. They are traced once and may close over
            arrays.
        x: the streams.
        params: the parameters of each of layers as operands of its call, stacked over the blocks,
            of which there is at least one.
        xs: a pytree of arrays, stacked too.
        settings: the settings of all sublayers.
        stretches: what is computed again. An iteration has at least two sublayers; one alone would
            read from the array that it writes to.
        num_samples: S, or 0.
    """
    params, xs = jax.tree.map(jnp.asarray, (tuple(params), xs))
    # For all layers have the type that streams have after the first of them.
    x = varying_like(x, *jax.tree.leaves(params), x)
    u, s = x[..., 0, :], _first(xs)
    traced = [jax.make_jaxpr(layer)(u, s) for layer in layers]
    xs, other_xs = partition(jax.tree.leaves(xs), is_inexact)
    # Only what is being traced can have a gradient.
    constants, other_constants = partition(
        [value for layer in traced for value in layer.consts],
        lambda value: isinstance(value, jax.core.Tracer) and is_inexact(value),
    )
    x, others = reverse_mode_only("stack", x, (params, xs, constants))
    operands = (x, *others)

    scan = _Scan(traced, settings, stretches, num_samples)
    layout = jax.tree.structure((operands, other_xs, other_constants))
    layers_structure = tuple(structure(layer.jaxpr) for layer in traced)
    key = layers_structure, layout, settings, stretches, num_samples
    run = _compiled(_Keyed(key, scan))
    x_new, h_res = run(*operands, other_xs, other_constants)
    return x_new, jax.tree.map(lambda h: h.reshape(-1, *h.shape[2:]), h_res)


@dataclasses.dataclass(frozen=True)
class _Keyed:
    """A scan under a key that scans have in common which compute the same."""

    key: Hashable
    scan: _Scan = dataclasses.field(compare=False)


@lru_cache(maxsize=64)
def _compiled(keyed: _Keyed) -> Callable[..., Any]:
    """The scan as a function that is compiled once; where it is traced it leaves no trace."""
    run = jax.custom_vjp(keyed.scan.forward)
    backward = jax.jit(keyed.scan.backward, inline=True)
    run.defvjp(keyed.scan.forward_and_keep, backward)
    return jax.jit(run, inline=True)


class Stretches(NamedTuple):
    """The streams are kept before every stretch of `length` sublayers.

    num_blocks: the blocks in an iteration of the loop; they are a whole number of stretches.
    keeps_inputs: whether the layers' inputs and the coefficients are kept, too; else they are
        computed again with the streams.
    """

    length: int = 1
    num_blocks: int = 1
    keeps_inputs: bool = True


class _Scan:
    """What is the same in all passes."""

    def __init__(
        self,
        traced: Sequence[Any],
        settings: Settings,
        stretches: Stretches,
        num_samples: int,
    ):
        self.traced, self.hidden_axes = traced, settings.hidden_axes
        self.settings = settings
        self.length, self.num_together, self.keeps_inputs = stretches
        self.num_samples = num_samples
        # The layers' forward and backward passes: known once there is a backward pass.
        self.layers: list[Layer] = []

    def call(self, name: str, operands: Values, **options: Any) -> Values:
        """The results of a call of post or post_pre."""
        return fused_call(name, self.settings, operands, **options)

    def layer(self, j: int, u: Any, s: list[Any], constants: list[Any]) -> Any:
        """The output of sublayer j."""
        start = sum(len(layer.consts) for layer in self.traced[:j])
        jaxpr = self.traced[j].jaxpr
        own = constants[start : start + len(jaxpr.constvars)]
        return jax.core.eval_jaxpr(jaxpr, own, u, *s)[0]

    def stacked(self, h_res: list[Any]) -> Any:
        """That of some tokens `[sublayers, S, n, n]`, or None."""
        if not self.num_samples:
            return None
        return jnp.stack([sample_tokens(h, self.num_samples) for h in h_res])

    def stretches(self) -> list[list[tuple[int, int]]]:
        """Those of an iteration, each a list of sublayers: (place of the block, place in it)."""
        sublayers = [(b, j) for b in range(self.num_together) for j in range(len(self.traced))]
        return [
            sublayers[start : start + self.length]
            for start in range(0, len(sublayers), self.length)
        ]

    def forward(
        self, x: Any, params: Any, xs: Any, constants: Any, other_xs: Any, other_constants: Any
    ) -> Any:
        constants = merge(constants, other_constants)

        def step(pending: Values, slices: Any) -> tuple[Values, Any]:
            block_params, s, other_s = slices
            samples = []
            for j, p in enumerate(block_params):
                got = self.call("post_pre_fwd", pending | p)
                samples.append(got["h_res"])
                y = self.layer(j, got["u"], merge(s, other_s), constants)
                pending = {"x": got["x_new"], "y": y} | _post_of(got)
            return pending, self.stacked(samples)

        first = {"x": x} | no_sublayer(x, self.hidden_axes)
        pending, samples = jax.lax.scan(step, first, (params, xs, other_xs))
        return self.call("post_fwd", pending)["x_new"], samples

    def forward_and_keep(
        self, x: Any, params: Any, xs: Any, constants: Any, other_xs: Any, other_constants: Any
    ) -> tuple[Any, Any]:
        stretches = self.stretches()
        num_steps, last = _num_blocks(params) // self.num_together, len(stretches) - 1
        # streams[k][i]: the streams after stretch k of iteration i, but for the post of its last
        # layer. Of the last stretch they are one further, behind the first of all.
        streams = [empty_stack_of(num_steps + (k == last), x) for k in range(last + 1)]
        streams[last] = _put(streams[last], x, 0)
        given = (*_first((xs, other_xs)), constants, other_constants)
        self.layers = [
            Layer(
                partial(self.layer, j), layer.in_avals[0], given,
                has_norm="norm_scale" in of_layer, keeps_input=self.keeps_inputs,
            )
            for j, (layer, of_layer) in enumerate(zip(self.traced, params, strict=True))
        ]  # fmt: skip

        def step(i: Any, carry: Any, blocks: Any, _: Any) -> Any:
            streams, pending = carry
            streams, samples = list(streams), []
            kept: list[list[Any]] = [[] for _ in stretches]
            for k, stretch in enumerate(stretches):
                x = _at(streams[k - 1], i)
                for b, j in stretch:
                    block_params, s, other_s = blocks[b]
                    got = self.call(
                        "post_pre_fwd", {"x": x} | pending | block_params[j],
                        kept_alone=("x_new", *KEPT),
                    )  # fmt: skip
                    x, of_pre = got["x_new"], {name: got[name] for name in KEPT if name in got}
                    samples.append(got["h_res"])
                    given = s, other_s, constants, other_constants
                    y, new = self.layers[j].forward(got["u"], given)
                    if not self.keeps_inputs:
                        # The coefficients that the stretch begins with, and no others.
                        pending, of_pre = pending if not kept[k] else {"y": pending["y"]}, {}
                    kept[k].append((pending, of_pre, new))
                    pending = {"y": y} | _post_of(got)
                streams[k] = _put(streams[k], x, i + 1 if k == last else i)
            return (tuple(streams), pending), len(blocks) * [()], (kept, self.stacked(samples))

        carry = tuple(streams), no_sublayer(x, self.hidden_axes)
        (streams, pending), _, (kept, samples) = _loop(
            step, num_steps, carry, (params, xs, other_xs), (), self.num_together
        )
        x_new = self.call("post_fwd", {"x": streams[last][-1]} | pending)["x_new"]
        given = params, xs, constants, other_xs, other_constants
        return (x_new, samples), (streams, pending, kept, given)

    def again(self, x: Any, stretch_params: list[Any], stretch_kept: list[Any]) -> list[Any]:
        """The operands of the calls of a stretch, and what they made for the backward pass.

        For each sublayer x, y, h_post and h_res; m, r and rho; and u where that is not kept.
        """
        made: list[Any] = []
        coefficients: Values = {}
        for s, (p, (pending, of_pre, _)) in enumerate(
            zip(stretch_params, stretch_kept, strict=True)
        ):
            pending, u, x_new = {"x": x} | pending | coefficients, None, None
            if not self.keeps_inputs:
                got = self.call("post_pre_fwd", pending | p)
                x_new, u, coefficients = got["x_new"], got["u"], _post_of(got)
                of_pre = {name: got[name] for name in KEPT if name in got}
            elif s < len(stretch_kept) - 1:
                x_new = self.call("post_fwd", pending)["x_new"]
            made.append((pending, of_pre, u))
            x = x_new
        return made

    def backward(self, saved: Any, cotangents: Any) -> Any:
        d_x_new, _ = cotangents
        streams, pending, kept, (params, xs, constants, other_xs, other_constants) = saved
        stretches = self.stretches()
        d_pending = self.call("post_bwd", {"x": streams[-1][-1], "d_x_new": d_x_new} | pending)
        d_h_pre = jnp.zeros_like(pending["h_post"])

        def step(i: Any, carry: Any, blocks: Any, step_kept: Any) -> Any:
            # The streams' cotangent is deferred all along, and so is that of the call before.
            d_x, d_pending, h_res_new, d_constants = carry
            d_params: list[Any] = [[None] * len(self.traced) for _ in blocks]
            d_s = [jax.tree.map(jnp.zeros_like, s) for _, s, _ in blocks]
            for k, stretch in reversed(list(enumerate(stretches))):
                own_params = [blocks[b][0][j] for b, j in stretch]
                made = self.again(_at(streams[k - 1], i), own_params, step_kept[k])
                for (b, j), p, (*_, new), (pending, of_pre, u) in reversed(
                    list(zip(stretch, own_params, step_kept[k], made, strict=True))
                ):
                    given = (*blocks[b][1:], constants, other_constants)
                    layer, cotangents = self.layers[j], dict(d_pending)
                    if layer.has_norm:
                        of_pre = of_pre | {"u_norm": layer.input(new, u)}
                    d_u, *d_given = layer.backward(new, u, given)(cotangents.pop("d_y"))
                    d_s[b], d_constants = jax.tree.map(jnp.add, [d_s[b], d_constants], d_given)
                    cotangents |= {"d_u": d_u, "d_h_pre": d_h_pre, "d_x_new_in": d_x}
                    of_next = of_pre | {"h_res_new": h_res_new}
                    got = self.call(
                        "post_pre_bwd", pending | p | of_next | cotangents, deferred=True
                    )
                    d_x = got["d_x_new"]
                    d_pending = {name: got[name] for name in d_pending}
                    d_params[b][j] = {name: got[f"d_{name}"] for name in p}
                    h_res_new = pending["h_res"]
            of_blocks = [(tuple(d_p), d) for d_p, d in zip(d_params, d_s, strict=True)]
            return (d_x, d_pending, h_res_new, d_constants), of_blocks, ()

        num_steps = _num_blocks(params) // self.num_together
        carry = d_x_new, d_pending, pending["h_res"], jax.tree.map(jnp.zeros_like, constants)
        (d_x, *_, d_constants), (d_params, d_xs), _ = _loop(
            step, num_steps, carry, (params, xs, other_xs), kept, self.num_together, reverse=True
        )
        # The first h_res is I, so that the deferred cotangent is the gradient itself.
        return d_x, d_params, d_xs, d_constants, None, None


def _num_blocks(params: Sequence[Values]) -> int:
    """The number of blocks that parameters are stacked over."""
    return params[0]["bias"].shape[0]


def _post_of(got: Values) -> Values:
    """The coefficients of the post that follows a call of pre."""
    return {name: got[name] for name in ("h_post", "h_res")}


def no_sublayer(x: jax.Array, hidden_axes: tuple[str, ...]) -> Values:
    """The operands y, h_post and h_res of a post that returns x, and its cotangent, exactly."""
    *tokens, n, _ = x.shape
    wide = accumulation_dtype(x.dtype)
    h_res = jnp.broadcast_to(jnp.eye(n, dtype=wide), (*tokens, n, n))
    h_post, h_res = (of_tokens(h, x, hidden_axes) for h in (jnp.zeros((*tokens, n), wide), h_res))
    return {"y": jnp.zeros_like(x[..., 0, :]), "h_post": h_post, "h_res": h_res}


def _first(stacked: Any) -> Any:
    """The slices of the first block."""
    return jax.tree.map(lambda leaf: leaf[0], stacked)


# ---- the loop -----------------------------------------------------------------------------------


def _loop(
    step: Any,
    num: int,
    carry: Any,
    of_blocks: Any,
    of_steps: Any,
    num_together: int,
    *,
    reverse: bool = False,
) -> tuple[Any, Any, Any]:
    """A scan whose step takes some blocks and is told its place.

    step: `(i, carry, slices of each block, slices of the step) -> carry, results of each block,
    results of the step`. Blocks and results of blocks are stacked over all blocks.

    XLA uses the places in arrays where they lie if they follow from the loop's own counter.
    """

    def one(i: Any, carry: Any) -> Any:
        blocks = [jax.tree.map(partial(_at, i=place), of_blocks) for place in places(i)]
        return step(i, carry, blocks, jax.tree.map(partial(_at, i=i), of_steps))

    def places(i: Any) -> list[Any]:
        return [i * num_together + b for b in range(num_together)]

    traced, shapes = jax.make_jaxpr(one, return_shape=True)(jnp.int32(0), carry)
    _, (block_types, *_), step_types = jax.tree.unflatten(
        jax.tree.structure(shapes), traced.out_avals
    )
    # Every place is written once, and read by none but what comes after the loop.
    block_results = jax.tree.map(partial(empty_stack, num * num_together), block_types)
    step_results = jax.tree.map(partial(empty_stack, num), step_types)

    def body(state: Any) -> Any:
        count, carry, block_results, step_results = state
        i = num - 1 - count if reverse else count
        carry, of_each, of_step = one(i, carry)
        # In the order in which they are made: where a kernel writes a result to its place, XLA
        # counts what was written to the array before as an operand of the kernel.
        in_order = slice(None, None, -1 if reverse else 1)
        for place, result in list(zip(places(i), of_each, strict=True))[in_order]:
            block_results = _put_all(block_results, result, place)
        return count + 1, carry, block_results, _put_all(step_results, of_step, i)

    start = (jnp.int32(0), carry, block_results, step_results)
    _, carry, *results = jax.lax.while_loop(lambda state: state[0] < num, body, start)
    return carry, *results


def _at(array: Any, i: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False, allow_negative_indices=False)


def _put(array: Any, value: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_index_in_dim(array, value, i, 0, allow_negative_indices=False)


def _put_all(arrays: Any, values: Any, i: Any) -> Any:
    return jax.tree.map(lambda array, value: _put(array, value, i), arrays, values)
