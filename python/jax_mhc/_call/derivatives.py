"""Errors for derivatives that the kernels do not have: all but reverse mode of first order.

Forward mode raises in `reverse_mode_only`, a derivative of the derivative in `first_order`. Both
name the remedy, which JAX's own errors for a `jax.custom_vjp` cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import jax
from jax.interpreters import ad, batching, mlir

from jax_mhc._copies import copies
from jax_mhc._errors import Refusal

if TYPE_CHECKING:
    from jax.extend.core import Primitive

Tree = TypeVar("Tree")


def reverse_mode_only(op: str, streams: jax.Array, others: Tree) -> tuple[jax.Array, Tree]:
    """The operands of `op` as its custom_vjp can take them: the streams, and a pytree of others.

    Their tangents may be transposed but not computed: on forward mode a custom_vjp gives JAX's own
    error, which cannot name our remedy and under jit comes as late as the lowering.

    Where vmap maps any operand, it maps the streams. `pre` returns them; were they the same for all
    elements of a batch that differ in their parameters, every element's backward call would add the
    one cotangent of that result.
    """
    leaves, treedef = jax.tree.flatten(others)
    streams, *leaves = _primitives().reverse_mode.bind(streams, *leaves, op=op)
    return streams, jax.tree.unflatten(treedef, leaves)


def first_order(op: str, operand: jax.Array) -> jax.Array:
    """An operand of a call, which must not be differentiated."""
    return _primitives().first_order.bind(operand, op=op)


def _forward_mode(*_: object, op: str, **__: object) -> NoReturn:
    raise Refusal(TypeError, op, "derivative").expected(
        "reverse mode (jax.grad, jax.vjp, jax.jacrev)",
        "forward mode (jax.jvp, jax.jacfwd, jax.linearize)",
        "Use implementation='reference', which has every mode.",
    )


def _second_order(*_: object, op: str) -> NoReturn:
    raise Refusal(TypeError, op, "derivative").expected(
        "one reverse-mode derivative",
        "a derivative of the derivative",
        "Use implementation='reference', which has derivatives of every order.",
    )


class _Primitives(NamedTuple):
    """Identities. They are primitives, because JAX may drop the rules of a custom_jvp.

    reverse_mode puts `tangent` in the way of its tangents. That is removed by transposing, the step
    that makes reverse mode; whatever else meets it is forward mode, and raises. first_order has no
    derivative at all.
    """

    reverse_mode: Primitive
    tangent: Primitive
    first_order: Primitive


@functools.cache
def _primitives() -> _Primitives:
    # jax.extend.core.Primitive, whose import takes 30 ms.
    new: Callable[[str], Primitive] = type(jax.lax.add_p)
    primitives = _Primitives(*(new(f"mhc_{name}") for name in _Primitives._fields))
    reverse_mode, tangent, first_order = primitives

    # Tangents may be symbolic zeros, which JAX has no public type for.
    def jvp(operands: Sequence[Any], tangents: Sequence[Any], op: str) -> tuple[list[Any], Any]:
        # The operands themselves: other values would be saved once more for the backward pass.
        return list(operands), [
            t if type(t) is ad.Zero else tangent.bind(t, op=op) for t in tangents
        ]

    def batch(
        operands: Sequence[jax.Array], axes: Sequence[int | None], op: str
    ) -> tuple[Sequence[jax.Array], Sequence[int | None]]:
        streams, *others = operands
        if axes[0] is None:
            mapped = zip(others, axes[1:], strict=True)
            size = next(other.shape[axis] for other, axis in mapped if axis is not None)
            streams, axes = copies(streams, size, axis=0), (0, *axes[1:])
        return reverse_mode.bind(streams, *others, op=op), axes

    reverse_mode.multiple_results = True
    reverse_mode.def_impl(lambda *operands, op: list(operands))
    reverse_mode.def_abstract_eval(lambda *avals, op: list(avals))
    mlir.register_lowering(reverse_mode, lambda _, *operands, op: list(operands))
    ad.primitive_jvps[reverse_mode] = jvp
    batching.primitive_batchers[reverse_mode] = batch

    tangent.def_impl(_forward_mode)
    tangent.def_abstract_eval(lambda aval, op: aval)
    mlir.register_lowering(tangent, _forward_mode)
    ad.deflinear2(tangent, lambda cotangent, _, op: [cotangent])
    batching.primitive_batchers[tangent] = _forward_mode

    first_order.def_impl(lambda operand, op: operand)
    first_order.def_abstract_eval(lambda aval, op: aval)
    mlir.register_lowering(first_order, lambda _, operand, op: [operand])
    ad.defjvp(first_order, _second_order)
    batching.defvectorized(first_order)
    return primitives
