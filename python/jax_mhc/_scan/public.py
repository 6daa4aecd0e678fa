"""A scan over blocks of a model whose carry has streams."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from jax_mhc import _check, _errors
from jax_mhc._axes import vary, varying_axes
from jax_mhc._ops.streams import Streams
from jax_mhc._scan.again import NOTHING, Again
from jax_mhc._scan.loop import own_scan
from jax_mhc._types import Tree


def scan(
    body: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Tree = None,
    *,
    length: int | None = None,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """`jax.lax.scan` that keeps `Streams` in place for the backward pass.

        def body(x, slices):
            params, weights = slices
            x = mhc_residual(lambda u: layer(u, weights), x, params)
            return x, None

        x, _ = mhc.scan(body, mhc.expand(u, streams=4), (params, weights))

    computes what `jax.lax.scan` does. The derivative of that copies all that an iteration keeps
    into arrays over all iterations, after filling these with zeros; of the streams this is 3 n·C
    values a token and sublayer. Here nothing is filled, and from a body of two sublayers on the
    kernels write streams to their place.

    Args:
        body: a function `(carry, slices) -> (carry, results)`. It may close over arrays.
        init: the carry that it begins with, a pytree: `Streams`, or something that has some in it.
            Without `Streams` that defer their cotangent, as those do that are made where there
            are kernels, this is `jax.lax.scan`.
        xs: a pytree of arrays, of whose leading axis each iteration takes a slice; or None.
        length: the number of iterations, if there is no xs.
        unroll: as for `jax.lax.scan`, which runs the loop where it is not 1.

    Returns:
        The last carry, and the results of all iterations, stacked. Differentiable in reverse mode
        of first order (without such streams: in every mode) with respect to init, xs and what the
        body closes over. The policy of a `jax.checkpoint` around the scan sees no names inside;
        one around parts of the body does.

    Raises:
        ValueError, TypeError: a body that is none, or returns a carry of another structure, shape
            or dtype; xs of different lengths.
    """
    _errors.function(_OP, "body", body, "a function (carry, slices) -> (carry, results)", _REMEDY)
    return run(_OP, body, init, xs, length=length, unroll=num_unrolled(_OP, unroll))


_OP = "scan"
_REMEDY = "Write it as for jax.lax.scan: def body(x, slices): ...; return x, None."


def run(
    op: str,
    body: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Tree,
    *,
    length: int | None = None,
    unroll: int | bool = 1,
    again: Again = NOTHING,
    key: Hashable | None = None,
) -> tuple[Any, Any]:
    """The scan, whose errors name `op`; see `own_scan` for `again` and the key."""
    carry, structure = jax.tree.flatten(init)
    for path, leaf in jax.tree.leaves_with_path(init):
        _check.shape(op, "init" + jax.tree_util.keystr(path), leaf)
    carry = [_strong(leaf) for leaf in carry]
    length = _length(op, xs, length)
    xs = jax.tree.map(jnp.asarray, xs)
    slices = jax.tree.map(first, xs)

    def checked(carry: list[Any], slices: Tree) -> tuple[list[Any], Any]:
        results = body(jax.tree.unflatten(structure, carry), slices)
        if not isinstance(results, tuple) or len(results) != 2:
            raise _errors.Refusal(TypeError, op, "the result of body").expected(
                "a pair (carry, results)", _errors.shown(results), _REMEDY
            )
        return _same_structure(op, init, structure, results[0]), results[1]

    traced, (_, results) = jax.make_jaxpr(checked, return_shape=True)(carry, slices)
    new_carry = traced.out_avals[: len(carry)]
    varying = [_varying_as(leaf, new) for leaf, new in zip(carry, new_carry, strict=True)]
    if any(a is not b for a, b in zip(carry, varying, strict=True)):
        carry = varying
        traced = jax.make_jaxpr(checked)(carry, slices)
    _same_types(op, init, carry, traced.out_avals)
    if takes_own_loop(init, unroll) and length:
        new, stacked = own_scan(
            op,
            traced,
            carry,
            jax.tree.leaves(xs),
            length=length,
            streams=_first_deferred(init),
            again=again,
            key=key,
        )
    else:

        def step(carry: list[Any], slices: Tree) -> tuple[list[Any], list[Any]]:
            out = jax.core.eval_jaxpr(traced.jaxpr, traced.consts, *carry, *jax.tree.leaves(slices))
            return out[: len(carry)], out[len(carry) :]

        new, stacked = jax.lax.scan(step, carry, xs, length=length, unroll=unroll)
    return jax.tree.unflatten(structure, new), jax.tree.unflatten(
        jax.tree.structure(results), stacked
    )


def _strong(leaf: Any) -> jax.Array:
    """A leaf of a carry as an array of no weak type."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(leaf.dtype) if leaf.weak_type else leaf


def _varying_as(leaf: jax.Array, new: jax.core.ShapedArray) -> jax.Array:
    """A leaf that varies over the manual axes that its new value varies over."""
    missing = varying_axes(new) - varying_axes(leaf)
    return vary(leaf, missing, jax.typeof(leaf).sharding.mesh) if missing else leaf


def first(array: jax.Array) -> jax.Array:
    """The first slice of an array; of none, for its type, zeros."""
    array = jnp.asarray(array)
    return array[0] if array.shape[0] else jnp.zeros(array.shape[1:], array.dtype)


def num_unrolled(op: str, unroll: int | bool) -> int | bool:
    """The steps of a loop that are unrolled; True: all of them."""
    if isinstance(unroll, bool):
        return unroll
    return _errors.integer(op, "unroll", unroll, 1, None, "Give 1 to unroll nothing.")


def takes_own_loop(init: Any, unroll: int | bool) -> bool:
    """Whether the loop has a backward pass of its own."""
    return _first_deferred(init) >= 0 and unroll is not True and unroll in (False, 1)


def _first_deferred(init: Any) -> int:
    """The place of the first streams with a deferred cotangent among the leaves of init, or -1."""
    place = 0
    for part in jax.tree.leaves(init, is_leaf=lambda part: isinstance(part, Streams)):
        if isinstance(part, Streams) and part.is_deferred:
            return place
        place += len(jax.tree.leaves(part))
    return -1


def _length(op: str, xs: Tree, length: int | None) -> int:
    """The number of iterations."""
    if length is not None:
        length = _errors.integer(op, "length", length, 0, None, "Leave it out where xs tells it.")
    for path, leaf in jax.tree.leaves_with_path(xs):
        name = "xs" + jax.tree_util.keystr(path)
        shape = _check.shape(op, name, leaf)
        if not shape or (length is not None and shape[0] != length):
            expected = "a leading axis of iterations"
            raise _errors.Refusal(ValueError, op, name).expected(
                expected if length is None else f"{expected} of length {length}",
                f"shape {list(shape)}",
                "Stack what differs from iteration to iteration; the body closes over the rest.",
            )
        length = shape[0]
    if length is None:
        raise _errors.Refusal(ValueError, op, "length").expected(
            "the number of iterations, since xs has no array", "None", "Give length=12."
        )
    return length


def _same_structure(op: str, init: Any, structure: Any, carry: Any) -> list[Any]:
    """The leaves of the carry that the body returned."""
    leaves, new = jax.tree.flatten(carry)
    if new == structure:
        return leaves
    remedy = "Return what the body is given, with other values."
    if isinstance(carry, Streams):
        remedy = "Begin with streams: mhc.as_streams(x), or what mhc.expand returns."
    elif isinstance(init, Streams):
        remedy = "Return the streams, and call x.array() behind the loop."
    raise _errors.Refusal(TypeError, op, "the carry that body returned").expected(
        f"the structure of init, {structure}", str(new), remedy
    )


def _same_types(
    op: str, init: Any, carry: list[jax.Array], new: list[jax.core.ShapedArray]
) -> None:
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(init)]
    for path, leaf, aval in zip(paths, carry, new, strict=False):
        if (leaf.shape, leaf.dtype) != (aval.shape, aval.dtype):
            raise _errors.Refusal(TypeError, op, f"the carry that body returned{path}").expected(
                f"{leaf.dtype.name}{list(leaf.shape)}, as init has",
                f"{aval.dtype.name}{list(aval.shape)}",
                "Cast it in the body, or begin with what the body returns.",
            )
