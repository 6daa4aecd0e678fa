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
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jax_mhc._call import Settings, Values, reverse_mode_only
from jax_mhc._mesh.types import empty_stack, empty_stack_of
from jax_mhc._ops.fused_op import KEPT, fused_call, normalizers
from jax_mhc._ops.pending import Pending
from jax_mhc._ops.streams import Streams
from jax_mhc._stack.layer import Given, Layer, Leaves, is_inexact, merge, partition
from jax_mhc._scan.structure import structure
from jax_mhc._types import Tree
from jax_mhc.diagnostics import sample_tokens

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr

# A pytree that a loop carries.
Carry: TypeAlias = Tree
# The parts of Streams: x, y, h_pre, h_post and h_res.
_Parts: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def own_scan(
    layers: Sequence[Callable[[jax.Array, Tree], jax.Array]],
    before: Streams,
    params: Sequence[Values],
    xs: Tree,
    *,
    settings: Settings,
    stretches: Stretches,
    num_samples: int = 0,
) -> tuple[Streams, jax.Array | None]:
    """The streams after all blocks; and h_res of some tokens `[L, S, n, n]`, or None.

    Args:
        layers: the sublayers of a block, `(u, s) -> y`. They are traced once and may close over
            arrays.
        before: the streams, whose cotangent is deferred.
        params: for each of layers bias, and phi, alpha and norm_scale where it has these, stacked
            over the blocks, of which there is at least one.
        xs: a pytree of arrays, stacked too.
        settings: the settings of all sublayers.
        stretches: what is computed again. An iteration has at least two sublayers; one alone would
            read from the array that it writes to.
        num_samples: S, or 0.
    """
    params, xs = jax.tree.map(jnp.asarray, (tuple(params), xs))
    # For all layers have the type that streams have after the first of them.
    (x, *parts), _ = before.varying_like(params, settings.hidden_axes).tree_flatten()
    u, s = x[..., 0, :], _first(xs)
    traced = [jax.make_jaxpr(layer)(u, s) for layer in layers]
    xs, other_xs = partition(jax.tree.leaves(xs), is_inexact)
    # Only what is being traced can have a gradient.
    constants, other_constants = partition(
        [value for layer in traced for value in layer.consts],
        lambda value: isinstance(value, jax.core.Tracer) and is_inexact(value),
    )
    x, (parts, params, xs, constants) = reverse_mode_only(
        "stack", x, (parts, params, xs, constants)
    )
    operands = (x, *parts), params, xs, constants

    scan = _Scan(traced, settings, stretches, num_samples)
    layout = jax.tree.structure((operands, other_xs, other_constants))
    layers_structure = tuple(structure(layer.jaxpr) for layer in traced)
    key = layers_structure, layout, settings, stretches, num_samples
    run = _compiled(_Keyed(key, scan))
    after, samples = run(*operands, other_xs, other_constants)
    return Streams.tree_unflatten(before.is_deferred, after), samples


@dataclasses.dataclass(frozen=True)
class _Keyed:
    """A scan under a key that scans have in common which compute the same."""

    key: Hashable
    scan: _Scan = dataclasses.field(compare=False)


@lru_cache(maxsize=64)
def _compiled(keyed: _Keyed) -> Callable[..., tuple[_Parts, jax.Array | None]]:
    """The scan as a function that is compiled once; where it is traced it leaves no trace."""
    run = jax.custom_vjp(keyed.scan.forward)
    backward = jax.jit(keyed.scan.backward, inline=True)
    run.defvjp(keyed.scan.forward_and_keep, backward)
    return jax.jit(run, inline=True)


class Stretches(NamedTuple):
    """Stretches of `length` sublayers, before each of which the streams are kept.

    num_blocks: the blocks in an iteration of the loop; they are a whole number of stretches.
    keeps_inputs: whether the layers' inputs and the coefficients are kept, too; else they are
        computed again with the streams.
    """

    length: int = 1
    num_blocks: int = 1
    keeps_inputs: bool = True


class _Kept(NamedTuple):
    """Values of a sublayer that are kept for the backward pass.

    Attributes:
        pending: what the post in front of it needs, by name. Within a stretch whose coefficients
            are computed again, y alone.
        normalizers: m, r and rho, as far as they are there and kept.
        layer: what the layer keeps.
    """

    pending: Values
    normalizers: Values
    layer: Leaves


class _Before(NamedTuple):
    """Values that a sublayer had before it, and made for its backward pass.

    Attributes:
        x: the streams before its post_pre.
        pending: what post needs of the sublayer before.
        normalizers: m, r and rho, as far as they are there.
        u: the layer's input, where it is not kept.
    """

    x: jax.Array
    pending: Pending
    normalizers: Values
    u: jax.Array | None


class _Scan:
    """The passes of a scan over blocks, and what is the same in all of them."""

    def __init__(
        self,
        traced: Sequence[ClosedJaxpr],
        settings: Settings,
        stretches: Stretches,
        num_samples: int,
    ):
        self.traced, self.settings = traced, settings
        self.length, self.num_together, self.keeps_inputs = stretches
        self.num_samples = num_samples
        # The layers' forward and backward passes: known once there is a backward pass.
        self.layers: list[Layer] = []

    def post_pre(
        self,
        x: jax.Array,
        pending: Pending,
        params: Values,
        kept_alone: Collection[str] = KEPT,
    ) -> Values:
        """The results of a post_pre."""
        operands = {"x": x} | pending._asdict() | params
        return fused_call("post_pre_fwd", self.settings, operands, kept_alone=kept_alone)

    def sublayer(
        self,
        x: jax.Array,
        pending: Pending,
        params: Values,
        layer: Callable[[jax.Array], tuple[jax.Array, Leaves]],
        kept_alone: Collection[str] = KEPT,
    ) -> tuple[Values, Pending, Leaves]:
        """A whole sublayer: the results of its post_pre, its pending post, what its layer keeps."""
        results = self.post_pre(x, pending, params, kept_alone)
        y, kept = layer(results["u"])
        return results, Pending(y, results["h_post"], results["h_res"]), kept

    def post(self, x: jax.Array, pending: Pending) -> jax.Array:
        """The streams after a sublayer."""
        return fused_call("post_fwd", self.settings, {"x": x} | pending._asdict())["x_new"]

    def layer(self, j: int, u: jax.Array, s: Leaves, constants: Leaves) -> jax.Array:
        """The output of sublayer j."""
        start = sum(len(layer.consts) for layer in self.traced[:j])
        jaxpr = self.traced[j].jaxpr
        own = constants[start : start + len(jaxpr.constvars)]
        return jax.core.eval_jaxpr(jaxpr, own, u, *s)[0]

    def stacked(self, h_res: list[jax.Array]) -> jax.Array | None:
        """The h_res of some tokens `[sublayers, S, n, n]`, or None."""
        if not self.num_samples:
            return None
        return jnp.stack([sample_tokens(h, self.num_samples) for h in h_res])

    def stretches(self) -> list[list[tuple[int, int]]]:
        """The stretches of an iteration: lists of sublayers (place of the block, place in it)."""
        sublayers = [(b, j) for b in range(self.num_together) for j in range(len(self.traced))]
        return [
            sublayers[start : start + self.length]
            for start in range(0, len(sublayers), self.length)
        ]

    def forward(
        self,
        before: _Parts,
        params: tuple[Values, ...],
        xs: Leaves,
        constants: Leaves,
        other_xs: Leaves,
        other_constants: Leaves,
    ) -> tuple[_Parts, jax.Array | None]:
        """The forward pass where nothing is differentiated."""
        x, y, h_pre, *gates = before
        constants = merge(constants, other_constants)

        def step(carry: Carry, slices: Tree) -> tuple[Carry, jax.Array | None]:
            (x, pending, h_pre), (block_params, s, other_s) = carry, slices
            samples = []
            s = merge(s, other_s)

            def layer(j: int, u: jax.Array) -> tuple[jax.Array, Leaves]:
                return self.layer(j, u, s, constants), []

            for j, p in enumerate(block_params):
                results, pending, _ = self.sublayer(x, pending, p, partial(layer, j))
                x, h_pre = results["x_new"], results["h_pre"]
                samples.append(pending.h_res)
            return (x, pending, h_pre), self.stacked(samples)

        carry = x, Pending(y, *gates), h_pre
        (x, pending, h_pre), samples = jax.lax.scan(step, carry, (params, xs, other_xs))
        return _parts(x, pending, h_pre), _of_sublayers(samples)

    def forward_and_keep(
        self,
        before: _Parts,
        params: tuple[Values, ...],
        xs: Leaves,
        constants: Leaves,
        other_xs: Leaves,
        other_constants: Leaves,
    ) -> tuple[tuple[_Parts, jax.Array | None], Tree]:
        """The forward pass, and what the backward pass takes."""
        x, y, h_pre, *gates = before
        stretches = self.stretches()
        num_steps, last = params[0]["bias"].shape[0] // self.num_together, len(stretches) - 1
        # streams[k][i]: those after stretch k of iteration i, but for the post of its last layer.
        # Of the last stretch they are one further, behind the first of all.
        streams = [empty_stack_of(num_steps + (k == last), x) for k in range(last + 1)]
        streams[last] = _put(streams[last], x, 0)
        s, other_s = _first((xs, other_xs))
        given = Given(s, other_s, constants, other_constants)
        self.layers = [
            Layer(
                partial(self.layer, j),
                layer.in_avals[0],
                given,
                has_norm="norm_scale" in p,
                keeps_input=self.keeps_inputs,
            )
            for j, (layer, p) in enumerate(zip(self.traced, params, strict=True))
        ]

        def step(
            i: jax.Array, carry: Carry, blocks: list[Tree], _: Tree
        ) -> tuple[Carry, list[Tree], Tree]:
            streams, pending, h_pre = carry
            streams, samples = list(streams), []
            kept: list[list[_Kept]] = [[] for _ in stretches]
            for k, stretch in enumerate(stretches):
                x = _at(streams[k - 1], i)
                for b, j in stretch:
                    block_params, s, other_s = blocks[b]
                    given = Given(s, other_s, constants, other_constants)
                    of_post, y_before = pending._asdict(), pending.y
                    results, pending, new = self.sublayer(
                        x,
                        pending,
                        block_params[j],
                        partial(self.layers[j].forward, given=given),
                        kept_alone=("x_new", *KEPT),
                    )
                    x, h_pre, of_pre = results["x_new"], results["h_pre"], normalizers(results)
                    samples.append(pending.h_res)
                    if not self.keeps_inputs:
                        # Of the coefficients those alone that the stretch begins with.
                        of_post, of_pre = of_post if not kept[k] else {"y": y_before}, {}
                    kept[k].append(_Kept(of_post, of_pre, new))
                streams[k] = _put(streams[k], x, i + 1 if k == last else i)
            of_step = kept, self.stacked(samples)
            return (tuple(streams), pending, h_pre), len(blocks) * [()], of_step

        carry = tuple(streams), Pending(y, *gates), h_pre
        (streams, pending, h_pre), _, (kept, samples) = _loop(
            step, num_steps, carry, (params, xs, other_xs), (), self.num_together
        )
        after = _parts(streams[last][-1], pending, h_pre)
        saved = params, xs, constants, other_xs, other_constants
        return (after, _of_sublayers(samples)), (streams, pending.h_res, kept, saved)

    def again(
        self, x: jax.Array, stretch_params: list[Values], stretch_kept: list[_Kept]
    ) -> list[_Before]:
        """Values before each sublayer of a stretch, computed again where they are not kept."""
        made: list[_Before] = []
        results: Values = {}
        for s, (p, kept) in enumerate(zip(stretch_params, stretch_kept, strict=True)):
            coefficients = {name: results[name] for name in ("h_post", "h_res") if name in results}
            pending = Pending(**(coefficients | kept.pending))
            results, of_pre, x_new = {}, kept.normalizers, x
            if not self.keeps_inputs:
                results = self.post_pre(x, pending, p)
                x_new, of_pre = results["x_new"], normalizers(results)
            elif s < len(stretch_kept) - 1:
                x_new = self.post(x, pending)
            made.append(_Before(x, pending, of_pre, results.get("u")))
            x = x_new
        return made

    def backward(self, saved: Tree, cotangents: Tree) -> Tree:
        """The backward pass."""
        (d_x, d_y, d_h_pre, d_h_post, d_h_res), _ = cotangents
        streams, h_res, kept, (params, xs, constants, other_xs, other_constants) = saved
        stretches = self.stretches()
        d_pending = {"d_y": d_y, "d_h_post": d_h_post, "d_h_res": d_h_res}

        def step(
            i: jax.Array, carry: Carry, blocks: list[Tree], step_kept: list[list[_Kept]]
        ) -> tuple[Carry, list[Tree], Tree]:
            # The streams' cotangent is deferred all along, and so is that of the post before.
            d_x, d_pending, d_h_pre, h_res_new, d_constants = carry
            d_params: list[list[Values]] = [[{}] * len(self.traced) for _ in blocks]
            d_s = [jax.tree.map(jnp.zeros_like, s) for _, s, _ in blocks]
            for k, stretch in reversed(list(enumerate(stretches))):
                own_params = [blocks[b][0][j] for b, j in stretch]
                made = self.again(_at(streams[k - 1], i), own_params, step_kept[k])
                for (b, j), p, (*_, new), before in reversed(
                    list(zip(stretch, own_params, step_kept[k], made, strict=True))
                ):
                    layer = self.layers[j]
                    _, s, other_s = blocks[b]
                    given = Given(s, other_s, constants, other_constants)
                    operands = {"x": before.x} | before.pending._asdict() | before.normalizers | p
                    if layer.has_norm:
                        operands["u_norm"] = layer.input(new, before.u)
                    d_u, *d_given = layer.backward(new, before.u, given)(d_pending["d_y"])
                    d_s[b], d_constants = jax.tree.map(jnp.add, [d_s[b], d_constants], d_given)
                    operands |= {"h_res_new": h_res_new, "d_u": d_u, "d_h_pre": d_h_pre}
                    operands |= {name: d_pending[name] for name in ("d_h_post", "d_h_res")}
                    gradients = fused_call(
                        "post_pre_bwd",
                        self.settings,
                        operands | {"d_x_new_in": d_x},
                        deferred=True,
                    )
                    d_x = gradients["d_x_new"]
                    d_pending = {name: gradients[name] for name in d_pending}
                    # Only of the last sublayer has somebody else h_pre.
                    d_h_pre = jnp.zeros_like(d_h_pre)
                    d_params[b][j] = {name: gradients[f"d_{name}"] for name in p}
                    h_res_new = before.pending.h_res
            of_blocks = [(tuple(d_p), d) for d_p, d in zip(d_params, d_s, strict=True)]
            return (d_x, d_pending, d_h_pre, h_res_new, d_constants), of_blocks, ()

        num_steps = params[0]["bias"].shape[0] // self.num_together
        carry = d_x, d_pending, d_h_pre, h_res, jax.tree.map(jnp.zeros_like, constants)
        (d_x, d_pending, d_h_pre, _, d_constants), (d_params, d_xs), _ = _loop(
            step, num_steps, carry, (params, xs, other_xs), kept, self.num_together, reverse=True
        )
        d_before = d_x, d_pending["d_y"], d_h_pre, d_pending["d_h_post"], d_pending["d_h_res"]
        return d_before, d_params, d_xs, d_constants, None, None


def _parts(x: jax.Array, pending: Pending, h_pre: jax.Array) -> _Parts:
    """The parts of streams in their order."""
    return x, pending.y, h_pre, pending.h_post, pending.h_res


def _of_sublayers(samples: jax.Array | None) -> jax.Array | None:
    """Samples `[L, S, n, n]` of those of each step of a loop, `[steps, sublayers, S, n, n]`."""
    return None if samples is None else samples.reshape(-1, *samples.shape[2:])


def _first(stacked: Tree) -> Tree:
    """The slices of the first block."""
    return jax.tree.map(lambda leaf: leaf[0], stacked)


# ---- the loop -----------------------------------------------------------------------------------


def _loop(
    step: Callable[[jax.Array, Carry, list[Tree], Tree], tuple[Carry, list[Tree], Tree]],
    num: int,
    carry: Carry,
    of_blocks: Tree,
    of_steps: Tree,
    num_together: int,
    *,
    reverse: bool = False,
) -> tuple[Carry, Tree, Tree]:
    """A scan whose step takes several blocks, and its place.

    step: `(i, carry, slices of each block, slices of the step) -> carry, results of each block,
    results of the step`. Blocks and results of blocks are stacked over all blocks.

    XLA uses the places in arrays in place if they follow from the loop's own counter.
    """

    def one(i: jax.Array, carry: Carry) -> tuple[Carry, list[Tree], Tree]:
        blocks = [jax.tree.map(partial(_at, i=place), of_blocks) for place in places(i)]
        return step(i, carry, blocks, jax.tree.map(partial(_at, i=i), of_steps))

    def places(i: jax.Array) -> list[jax.Array]:
        return [i * num_together + b for b in range(num_together)]

    traced, shapes = jax.make_jaxpr(one, return_shape=True)(jnp.int32(0), carry)
    _, (block_types, *_), step_types = jax.tree.unflatten(
        jax.tree.structure(shapes), traced.out_avals
    )
    # Every place is written once, and read by none but what comes after the loop.
    block_results = jax.tree.map(partial(empty_stack, num * num_together), block_types)
    step_results = jax.tree.map(partial(empty_stack, num), step_types)

    def body(state: tuple[jax.Array, Carry, Tree, Tree]) -> tuple[jax.Array, Carry, Tree, Tree]:
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
    _, *results = jax.lax.while_loop(lambda state: state[0] < num, body, start)
    return tuple(results)


def _at(array: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False, allow_negative_indices=False)


def _put(array: jax.Array, value: jax.Array, i: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, value, i, 0, allow_negative_indices=False)


def _put_all(arrays: Tree, values: Tree, i: jax.Array) -> Tree:
    return jax.tree.map(lambda array, value: _put(array, value, i), arrays, values)
