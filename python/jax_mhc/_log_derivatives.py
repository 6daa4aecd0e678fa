"""Derivatives with respect to the logarithm of a matrix, of every order.

A derivative with respect to M grows like 1 / M, beyond all bounds where an element of M is tiny. So
M is a constant to JAX, and beside it goes an array that has the derivatives of log M. Of that array
no value is ever read: where nothing is differentiated, nothing of it is left in the program.

It takes primitives, since JAX drops the rule of a custom_jvp in a scan that is differentiated
twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    from jax.extend.core import Primitive

    # A tangent may be a symbolic zero.
    Tangent: TypeAlias = jax.Array | ad.Zero


def matrix_of(matrix: jax.Array, log: jax.Array) -> jax.Array:
    """The matrix as a function of its logarithm: `matrix`, with M · d_log as its derivative."""
    return _primitives().matrix_of.bind(matrix, log)


def log_normalized(log: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """The logarithm of `matrix`, which is another one divided by its sums (plus eps) over an axis.

    log: that of the other one. Were it divided by the same sums as before, `matrix` would change by
    some D, and so the logarithm of these sums changes by log(1 + Σ D). A gradient G becomes
    G - M · Σ G, with M = `matrix`.
    """
    sums = jnp.sum(matrix_of(matrix, log), axis, keepdims=True)
    return _with_derivatives(log, log - jnp.log1p(sums - lax.stop_gradient(sums)))


def log_shifted(log: jax.Array, matrix: jax.Array, eps: float) -> jax.Array:
    """The logarithm of matrix + eps from that of `matrix`."""
    change = matrix_of(matrix, log) - lax.stop_gradient(matrix)
    return _with_derivatives(log, jnp.log1p(change / (matrix + eps)))


def _with_derivatives(value: jax.Array, other: jax.Array) -> jax.Array:
    """`value`, with the derivatives of another array of the same type."""
    return _primitives().with_derivatives.bind(value, other)


class _Primitives(NamedTuple):
    matrix_of: Primitive
    with_derivatives: Primitive


@functools.cache
def _primitives() -> _Primitives:
    # jax.extend.core.Primitive, whose import takes 30 ms.
    new: Callable[[str], Primitive] = type(lax.add_p)
    primitives = _Primitives(*(new(f"mhc_{name}") for name in _Primitives._fields))
    for primitive in primitives:
        primitive.def_impl(lambda value, _: value)
        primitive.def_abstract_eval(lambda value, _: value)
        mlir.register_lowering(primitive, lambda _, value, __: [value])
        batching.defbroadcasting(primitive)

    def jvp_of_matrix(
        primals: tuple[jax.Array, jax.Array], tangents: tuple[Tangent, Tangent]
    ) -> tuple[jax.Array, Tangent]:
        matrix, d_log = primitives.matrix_of.bind(*primals), tangents[1]
        return matrix, d_log if isinstance(d_log, ad.Zero) else matrix * d_log

    def jvp_of_other(
        primals: tuple[jax.Array, jax.Array], tangents: tuple[Tangent, Tangent]
    ) -> tuple[jax.Array, Tangent]:
        return primitives.with_derivatives.bind(*primals), tangents[1]

    ad.primitive_jvps[primitives.matrix_of] = jvp_of_matrix
    ad.primitive_jvps[primitives.with_derivatives] = jvp_of_other
    return primitives
