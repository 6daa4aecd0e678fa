"""A scan with a backward pass of its own, which keeps streams where kernels write them.

JAX's derivative of a scan copies what an iteration keeps for the backward pass into an array over
all iterations, and fills that array with zeros beforehand: of the streams, 3 n·C values a token
for every sublayer. Here nothing is filled, and the loop carries the arrays of streams: a kernel
writes its streams to their place there, and whatever comes next reads them from there. On GPUs XLA
hands the kernels these places themselves (dynamic-slice fusion).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_mhc._call import reverse_mode_only
from jax_mhc._mesh.types import empty_stack, empty_stack_of
from jax_mhc._scan.again import Again
from jax_mhc._scan.iteration import Given, Iteration
from jax_mhc._scan.leaves import (
    Leaves,
    form_of,
    is_inexact,
    merge,
    partition,
    raw,
    raw_type,
    type_of,
)
from jax_mhc._types import Tree

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr


def own_scan(
    op: str,
    body: ClosedJaxpr,
    carry: Leaves,
    xs: Leaves,
    *,
    length: int,
    streams: int,
    again: Again,
    key: Hashable | None,
) -> tuple[Leaves, Leaves]:
    """The carry after all iterations, and the results of each, stacked.

    Args:
        op: the name for errors.
        body: the body `carry, slices of xs -> carry, results`, on leaves.
        carry: what it begins with, of the types that the body returns.
        xs: what the slices are of.
        length: the number of iterations, at least 1.
        streams: the place of the first streams in the carry.
        again: what is computed again.
        key: what bodies have in common that compute the same: the function for them is compiled
            once. None: it is compiled wherever it is called outside of `jax.jit`.
    """
    # Only what is being traced can have a gradient.
    constants, others = partition(
        body.consts, lambda value: isinstance(value, jax.core.Tracer) and is_inexact(value)
    )
    differentiable, *other = zip(*map(partition, (carry, xs)), strict=True)
    first = carry[streams]
    first, (differentiable, constants) = reverse_mode_only(op, first, (differentiable, constants))
    carry, xs = map(merge, differentiable, *other)
    carry[streams] = first
    scan = _Scan(body.jaxpr, len(carry), length, again)
    operands = carry, xs, constants, others
    if key is None:
        return _compiled(scan)(*operands)
    leaves, treedef = jax.tree.flatten(operands)
    keyed = _Keyed((key, length, again, treedef, *map(jax.typeof, leaves)), scan)
    return _compiled_once(keyed)(*operands)


@dataclasses.dataclass(frozen=True)
class _Keyed:
    """A scan under a key that scans have in common which compute the same."""

    key: Hashable
    scan: _Scan = dataclasses.field(compare=False)


@lru_cache(maxsize=64)
def _compiled_once(keyed: _Keyed) -> Callable[..., tuple[Leaves, Leaves]]:
    """The function of all scans that have a key in common."""
    return _compiled(keyed.scan)


def _compiled(scan: _Scan) -> Callable[..., tuple[Leaves, Leaves]]:
    """The scan as a function that is compiled; where it is traced it leaves no trace."""
    run = jax.custom_vjp(scan.forward)
    run.defvjp(scan.forward_and_keep, jax.jit(scan.backward, inline=True))
    return jax.jit(run, inline=True)


class _Arrays(NamedTuple):
    """Arrays over all iterations, of what they keep; see `Iteration`.

    Attributes:
        begins: of the carry's leaves that are kept `[length, ...]`.
        in_place: of the carry's streams `[length + 1, ..., n, C]`.
        kept: of what the iterations make `[length, ...]`.
    """

    begins: Leaves
    in_place: Leaves
    kept: Leaves


class _Scan:
    """The passes of a scan, and what is the same in all of them."""

    def __init__(self, body: Jaxpr, num_carry: int, length: int, again: Again):
        self.body, self.num_carry, self.length, self.again = body, num_carry, length, again
        # Known once there is a backward pass.
        self.iteration: Iteration

    def forward(self, *leaves: Leaves) -> tuple[Leaves, Leaves]:
        """The forward pass where nothing is differentiated."""
        carry, xs, *constants = leaves

        def step(carry: Leaves, slices: Leaves) -> tuple[Leaves, Leaves]:
            results = jax.core.eval_jaxpr(self.body, merge(*constants), *carry, *slices)
            return results[: self.num_carry], results[self.num_carry :]

        return jax.lax.scan(step, carry, xs, length=self.length)

    def forward_and_keep(self, *leaves: Leaves) -> tuple[tuple[Leaves, Leaves], Tree]:
        """The forward pass, and what the backward pass takes."""
        given = Given(*leaves)
        first = given._replace(slices=[x[0] for x in given.slices])
        self.iteration = iteration = Iteration(self.body, first, self.again)
        places, num_carry = list(iteration.in_place), self.num_carry
        of_new = {key: k for k, key in enumerate(iteration.in_place.values())}
        of_kept = {id(variable): k for k, variable in enumerate(iteration.kept)}

        def step(
            i: jax.Array, state: tuple[Leaves, _Arrays], slices: Leaves
        ) -> tuple[tuple[Leaves, _Arrays], Leaves]:
            carry, (begins, in_place, kept) = jax.tree.map(lambda leaf: leaf, state)
            for place, array in zip(places, in_place, strict=True):
                carry[place] = _at(array, i)
            for k, place in enumerate(iteration.begins):
                begins[k] = _put(begins[k], carry[place], i)

            def take(key: int, streams: jax.Array) -> jax.Array:
                if key in of_new:
                    arrays, k, place = in_place, of_new[key], i + 1
                else:
                    arrays, k, place = kept, of_kept[key], i
                arrays[k] = _put(arrays[k], streams, place)
                return _at(arrays[k], place)

            results, values = iteration.forward(given._replace(carry=carry, slices=slices), take)
            for k, (variable, value) in enumerate(zip(iteration.kept, values, strict=True)):
                if id(variable) not in iteration.streams:
                    kept[k] = _put(kept[k], value, i)
            carry, results = results[:num_carry], results[num_carry:]
            for place in places:
                carry[place] = None
            return (carry, _Arrays(begins, in_place, kept)), results

        arrays = _Arrays(
            [
                empty_stack(self.length, type_of(iteration.carry[place]))
                for place in iteration.begins
            ],
            [
                _put(empty_stack_of(self.length + 1, given.carry[place]), given.carry[place], 0)
                for place in places
            ],
            [empty_stack(self.length, type_of(variable)) for variable in iteration.kept],
        )
        carry = [None if k in places else value for k, value in enumerate(given.carry)]
        types = list(map(type_of, iteration.results[num_carry:]))
        (carry, arrays), results = _loop(step, self.length, (carry, arrays), given.slices, types)
        for place, array in zip(places, arrays.in_place, strict=True):
            carry[place] = array[-1]
        return (carry, results), (arrays, given._replace(carry=[None] * num_carry))

    def backward(self, saved: Tree, cotangents: Tree) -> Tree:
        """The backward pass."""
        iteration, num_carry = self.iteration, self.num_carry
        (arrays, given), (d_carry, d_results) = saved, cotangents
        differentiable = [is_inexact(type_of(atom)) for atom in iteration.results]
        d_results = [
            d if of_result else None
            for d, of_result in zip(d_results, differentiable[num_carry:], strict=True)
        ]
        d_carry = [d if of_c else None for d, of_c in zip(d_carry, differentiable, strict=False)]

        def step(
            i: jax.Array, state: tuple[Leaves, Leaves], slices: Leaves
        ) -> tuple[tuple[Leaves, Leaves], Leaves]:
            d_carry, d_constants = state
            carry: Leaves = [None] * num_carry
            for place, array in zip(iteration.begins, arrays.begins, strict=True):
                carry[place] = _at(array, i)
            new_streams = {}
            for (place, key), array in zip(
                iteration.in_place.items(), arrays.in_place, strict=True
            ):
                carry[place], new_streams[key] = _at(array, i), _at(array, i + 1)
            backward = iteration.backward(
                given._replace(carry=carry, slices=slices),
                new_streams,
                [_at(array, i) for array in arrays.kept],
            )
            d_of_results = jax.tree.map(partial(_at, i=i), d_results)
            d_carry, d_slices, d_new = backward([*d_carry, *d_of_results])
            d_constants = jax.tree.map(jnp.add, d_constants, d_new)
            return (d_carry, d_constants), [d for d in d_slices if d is not None]

        d_constants = jax.tree.map(jnp.zeros_like, given.constants)
        of_slices = list(map(type_of, iteration.slices))
        types = [aval for aval in of_slices if is_inexact(aval)]
        (d_carry, d_constants), of_inexact = _loop(
            step, self.length, (d_carry, d_constants), given.slices, types, reverse=True
        )
        stacked = iter(of_inexact)
        d_xs = [next(stacked) if is_inexact(aval) else None for aval in of_slices]
        return d_carry, d_xs, d_constants, None


def _loop(
    step: Callable[[jax.Array, Any, Leaves], tuple[Any, Leaves]],
    length: int,
    state: Any,
    xs: Leaves,
    types: list[jax.core.ShapedArray],
    *,
    reverse: bool = False,
) -> tuple[Any, Leaves]:
    """A loop whose step is told its place: `(i, state, slices of xs) -> state, results`.

    XLA uses the places in arrays in place if they follow from the loop's own counter.

    types: those of the results of a step.
    """

    def one(looped: tuple[jax.Array, Any, Leaves]) -> tuple[jax.Array, Any, Leaves]:
        count, state, stacked = looped
        i = length - 1 - count if reverse else count
        state, results = step(i, state, [_at(x, i) for x in xs])
        forms[:] = map(form_of, results)
        stacked = [_put(a, raw(r), i) for a, r in zip(stacked, results, strict=True)]
        return count + 1, state, stacked

    forms: list[Callable[[jax.Array], jax.Array]] = []
    # Every place is written once, and read by none but what comes after the loop.
    stacked = [empty_stack(length, raw_type(one)) for one in types]
    start = jnp.int32(0), state, stacked
    _, state, stacked = jax.lax.while_loop(lambda looped: looped[0] < length, one, start)
    return state, [form(array) for form, array in zip(forms, stacked, strict=True)]


def _at(array: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False, allow_negative_indices=False)


def _put(array: jax.Array, value: jax.Array, i: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, value, i, 0, allow_negative_indices=False)
