"""A scan over blocks of sublayers that are joined by seams, with a backward pass of its own.

JAX's derivative of a scan copies what an iteration keeps for the backward pass into an array over
all iterations, and fills that array with zeros beforehand: of the streams, 3 n·C values a token
for every sublayer. Here the loop carries the arrays of streams. A seam writes its streams to their
place there, and the next one reads them from there; on GPUs XLA hands the kernels these places
themselves (dynamic-slice fusion), and nothing is filled.

Each sublayer keeps what JAX's derivative of its layer does, but for what the backward pass has
anyway (slices of xs, what the layer closes over) and what follows from the latter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_mhc._axes import varying_like
from jax_mhc._check import accumulation_dtype
from jax_mhc._dispatch import fused_call, reverse_mode_only
from jax_mhc._mesh.types import empty_stack, empty_stack_of, of_tokens
from jax_mhc._ops.kept import keep, restore
from jax_mhc._ops.pre import Settings


def scan_of_seams(
    layers: Sequence[Callable[..., Any]],
    x: Any,
    params: Sequence[tuple[Any, ...]],
    xs: Any,
    *,
    settings: Settings,
) -> Any:
    """The streams `[..., n, C]` after all blocks.

    Args:
        layers: the sublayers of a block, at least two (one alone would read from the array that it
            writes to), `(u, s) -> y`. They are traced once and may close over arrays.
        x: the streams.
        params: what `dense` gives for each of layers, stacked over the blocks, of which there is at
            least one.
        xs: a pytree of arrays, stacked too.
        settings: those of all sublayers.
    """
    params, xs = jax.tree.map(jnp.asarray, (tuple(params), xs))
    # For all layers have the type that streams have after the first of them.
    x = varying_like(x, *jax.tree.leaves(params), x)
    u, s = x[..., 0, :], _first(xs)
    traced = [jax.make_jaxpr(layer)(u, s) for layer in layers]
    xs, other_xs = _partition(jax.tree.leaves(xs), _is_inexact)
    # Only what is being traced can have a gradient.
    constants, other_constants = _partition(
        [value for layer in traced for value in layer.consts],
        lambda value: isinstance(value, jax.core.Tracer) and _is_inexact(value),
    )
    operands, treedef = jax.tree.flatten((x, params, xs, constants))
    operands = jax.tree.unflatten(treedef, reverse_mode_only("stack", *operands))

    scan = _Scan(traced, settings)
    run = jax.custom_vjp(scan.forward)
    run.defvjp(scan.forward_and_keep, scan.backward)
    return run(*operands, other_xs, other_constants)


class _Scan:
    """What is the same in all passes."""

    def __init__(self, traced: Sequence[Any], settings: Settings):
        self.traced, self.seam, self.hidden_axes = traced, settings.call, settings.hidden_axes
        # The layers' forward and backward passes: known once there is a backward pass.
        self.layers: list[_Layer] = []

    def post(self, name: str, *operands: Any) -> Any:
        """Runs a call of post's."""
        return fused_call(name, None, *operands, hidden_axes=self.hidden_axes)

    def layer(self, j: int, u: Any, s: list[Any], constants: list[Any]) -> Any:
        """The output of sublayer j."""
        start = sum(len(layer.consts) for layer in self.traced[:j])
        jaxpr = self.traced[j].jaxpr
        own = constants[start : start + len(jaxpr.constvars)]
        return jax.core.eval_jaxpr(jaxpr, own, u, *s)[0]

    def forward(
        self, x: Any, params: Any, xs: Any, constants: Any, other_xs: Any, other_constants: Any
    ) -> Any:
        constants = _merge(constants, other_constants)

        def step(pending: Any, slices: Any) -> tuple[Any, None]:
            block_params, s, other_s = slices
            for j, p in enumerate(block_params):
                x_new, u, _, h_post, h_res, *_ = self.seam("seam_fwd", *pending, *p)
                y = self.layer(j, u, _merge(s, other_s), constants)
                pending = x_new, y, h_post, h_res
            return pending, None

        pending, _ = jax.lax.scan(
            step, (x, *no_sublayer(x, self.hidden_axes)), (params, xs, other_xs)
        )
        return self.post("post_fwd", *pending)[0]

    def forward_and_keep(
        self, x: Any, params: Any, xs: Any, constants: Any, other_xs: Any, other_constants: Any
    ) -> tuple[Any, Any]:
        num_blocks, last = params[0][0].shape[0], len(params) - 1
        # streams[j][i]: those after the seam before sublayer j of block i. Of the last sublayer
        # they are one further, behind the first of all.
        streams = [empty_stack_of(num_blocks + (j == last), x) for j in range(last + 1)]
        streams[last] = _put(streams[last], x, 0)
        given = (*_first((xs, other_xs)), constants, other_constants)
        self.layers = [
            _Layer(partial(self.layer, j), layer.in_avals[0], given, norm_scale.shape[1] > 0)
            for j, (layer, (*_, norm_scale)) in enumerate(zip(self.traced, params, strict=True))
        ]

        def step(i: Any, carry: Any, slices: Any) -> tuple[Any, Any]:
            streams, pending = carry
            block_params, s, other_s = slices
            streams, kept = list(streams), []
            for j, p in enumerate(block_params):
                x_new, u, _, h_post, h_res, *m_r_rho = self.seam(
                    "seam_fwd", _at(streams[j - 1], i), *pending, *p,
                    kept_alone=("x_new", "m", "r", "rho"),
                )  # fmt: skip
                streams[j] = _put(streams[j], x_new, i + 1 if j == last else i)
                given = (s, other_s, constants, other_constants)
                y, new = self.layers[j].forward(u, given)
                kept.append((pending, m_r_rho, new))
                pending = y, h_post, h_res
            return (tuple(streams), pending), kept

        carry = tuple(streams), no_sublayer(x, self.hidden_axes)
        (streams, pending), kept = _loop(step, num_blocks, carry, (params, xs, other_xs))
        x_new = self.post("post_fwd", streams[last][-1], *pending)[0]
        given = params, xs, constants, other_xs, other_constants
        return x_new, keep((streams, pending, kept, given))

    def backward(self, saved: Any, d_x_new: Any) -> Any:
        streams, pending, kept, (params, xs, constants, other_xs, other_constants) = restore(saved)
        y, h_post, h_res = pending
        d_pending = self.post("post_bwd", streams[-1][-1], *pending, d_x_new)
        d_h_pre = jnp.zeros_like(h_post)

        def step(i: Any, carry: Any, slices: Any) -> tuple[Any, Any]:
            # The streams' cotangent is deferred all along, and so is that of the seam before.
            d_x, d_y, d_h_post, d_h_res, h_res_new, d_constants = carry
            block_params, s, other_s, block_kept = slices
            given = (s, other_s, constants, other_constants)
            d_s = jax.tree.map(jnp.zeros_like, s)
            d_params: list[Any] = []
            for j in reversed(range(len(block_params))):
                pending, m_r_rho, new = block_kept[j]
                u = self.layers[j].input(new, d_y)
                d_u, *d_given = self.layers[j].backward(new, given)(d_y)
                d_s, d_constants = jax.tree.map(jnp.add, [d_s, d_constants], d_given)
                d_x, d_y, d_h_post, d_h_res, *d_p = self.seam(
                    "seam_bwd", _at(streams[j - 1], i), *pending, *block_params[j],
                    *m_r_rho, u, h_res_new, d_u, d_h_pre, d_h_post, d_h_res, d_x, deferred=True,
                )  # fmt: skip
                d_params.insert(0, tuple(d_p))
                h_res_new = pending[-1]
            return (d_x, d_y, d_h_post, d_h_res, h_res_new, d_constants), (tuple(d_params), d_s)

        carry = (d_x_new, *d_pending, h_res, jax.tree.map(jnp.zeros_like, constants))
        (d_x, *_, d_constants), (d_params, d_xs) = _loop(
            step, params[0][0].shape[0], carry, (params, xs, other_xs, kept), reverse=True
        )
        # The first seam's h_res is I, so that what is deferred is the gradient itself.
        return d_x, d_params, d_xs, d_constants, None, None


def no_sublayer(x: Any, hidden_axes: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """y, h_post and h_res of a post that gives back x, and the cotangent of x, exactly."""
    *tokens, n, _ = x.shape
    wide = accumulation_dtype(x.dtype)
    h_res = jnp.broadcast_to(jnp.eye(n, dtype=wide), (*tokens, n, n))
    h_post, h_res = (of_tokens(h, x, hidden_axes) for h in (jnp.zeros((*tokens, n), wide), h_res))
    return jnp.zeros_like(x[..., 0, :]), h_post, h_res


# ---- what a layer keeps -------------------------------------------------------------------------


class _Layer:
    """The forward and the backward pass of a layer `(u, s, constants) -> y`.

    keeps_input: whether u is kept in any case.

    `given` is (s, other_s, constants, other_constants), of which each pair makes up the layer's
    s and constants; those without a name have no gradient.
    """

    def __init__(self, layer: Callable[..., Any], u: Any, given: Any, keeps_input: bool):
        def passes(u: Any, given: Any) -> Any:
            s, other_s, constants, other_constants = given

            def of_differentiable(u: Any, s: Any, constants: Any) -> Any:
                return layer(u, _merge(s, other_s), _merge(constants, other_constants))

            y, backward = jax.vjp(of_differentiable, u, s, constants)
            # A pytree, whose leaves are the residuals.
            residuals, self.treedef = jax.tree.flatten(backward)
            return y, residuals

        closed = jax.make_jaxpr(passes)(u, given)
        self.consts, self.jaxpr = closed.consts, closed.jaxpr
        _, *self.residuals = self.jaxpr.outvars
        # What follows from constants is computed again: it would be kept for every block.
        self.u, *at_hand = self.jaxpr.invars
        self.keeps_input = keeps_input
        varying = set(map(id, self.jaxpr.invars[: 1 + len(jax.tree.leaves(given[:2]))]))
        again = []
        for eqn in self.jaxpr.eqns:
            if eqn.effects or not varying.isdisjoint(map(id, eqn.invars)):
                varying.update(map(id, eqn.outvars))
            else:
                again.append(eqn)
        new = varying.difference(map(id, at_hand))
        inputs = [self.u] if keeps_input else []
        self.kept = {id(v): v for v in [*inputs, *self.residuals] if id(v) in new}
        self.others = {id(v): v for v in self.residuals if id(v) not in new}
        self.again = self.jaxpr.replace(
            invars=at_hand, eqns=again, outvars=list(self.others.values())
        )

    def forward(self, u: Any, given: Any) -> tuple[Any, list[Any]]:
        """The output, and what the backward pass needs beside what is given."""
        y, *residuals = jax.core.eval_jaxpr(self.jaxpr, self.consts, u, *jax.tree.leaves(given))
        values = dict(zip(map(id, self.residuals), residuals, strict=True)) | {id(self.u): u}
        return y, [values[variable] for variable in self.kept]

    def input(self, kept: list[Any], like: Any) -> Any:
        """u, or where that is not always kept, nothing of `like`."""
        values = dict(zip(self.kept, kept, strict=True))
        return (
            values[id(self.u)] if self.keeps_input else jnp.zeros((*like.shape[:-1], 0), like.dtype)
        )

    def backward(self, kept: list[Any], given: Any) -> Any:
        """The function from d_y to d_u, d_s and d_constants."""
        others = jax.core.eval_jaxpr(self.again, self.consts, *jax.tree.leaves(given))
        values = dict(zip([*self.kept, *self.others], [*kept, *others], strict=True))
        return jax.tree.unflatten(self.treedef, [values[id(v)] for v in self.residuals])


def _first(stacked: Any) -> Any:
    """The slices of the first block."""
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _partition(values: list[Any], condition: Callable[[Any], bool]) -> tuple[list[Any], list[Any]]:
    """Those that meet the condition and the others, each with None in place of the rest."""
    chosen = list(map(condition, values))
    return (
        [value if c else None for value, c in zip(values, chosen, strict=True)],
        [None if c else value for value, c in zip(values, chosen, strict=True)],
    )


def _merge(values: list[Any], others: list[Any]) -> list[Any]:
    return [b if a is None else a for a, b in zip(values, others, strict=True)]


# ---- the loop -----------------------------------------------------------------------------------


def _loop(step: Any, num: int, carry: Any, xs: Any, *, reverse: bool = False) -> tuple[Any, Any]:
    """A scan whose step is told its place, `step(i, carry, slices) -> carry, results`.

    XLA uses the places in arrays where they lie if they follow from the loop's own counter.
    """

    def one(i: Any, carry: Any) -> tuple[Any, Any]:
        return step(i, carry, jax.tree.map(lambda array: _at(array, i), xs))

    traced, shapes = jax.make_jaxpr(one, return_shape=True)(jnp.int32(0), carry)
    _, types = jax.tree.unflatten(jax.tree.structure(shapes), traced.out_avals)
    # Every place is written once, and read by none but what comes after the loop.
    results = jax.tree.map(partial(empty_stack, num), types)

    def body(state: Any) -> Any:
        count, carry, results = state
        i = num - 1 - count if reverse else count
        carry, result = one(i, carry)
        results = jax.tree.map(lambda array, value: _put(array, value, i), results, result)
        return count + 1, carry, results

    start = (jnp.int32(0), carry, results)
    _, carry, results = jax.lax.while_loop(lambda state: state[0] < num, body, start)
    return carry, results


def _at(array: Any, i: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False, allow_negative_indices=False)


def _put(array: Any, value: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_index_in_dim(array, value, i, 0, allow_negative_indices=False)
