"""A layer of a scan over blocks: its passes, and what it keeps between them.

It keeps what JAX's derivative of it does, but for what the backward pass has anyway (slices of xs,
what the layer closes over), what follows from the latter alone, and wider copies of other values,
such as the float32 that a norm makes of half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax.extend.core import JaxprEqn, Var

# The leaves of a pytree of arrays. Some may be None: those that a list of others has.
Leaves: TypeAlias = list[Any]


class Given(NamedTuple):
    """Arguments of a layer beside u. Each pair makes up its s and its constants.

    Attributes:
        s: the leaves of the slice of xs that have gradients.
        other_s: the leaves of it that have none.
        constants: the arrays that the layers close over and that have gradients.
        other_constants: the others.
    """

    s: Leaves
    other_s: Leaves
    constants: Leaves
    other_constants: Leaves


class Layer:
    """The forward and the backward pass of a layer `(u, s, constants) -> y`.

    Args:
        layer: the layer.
        u: the type of its input.
        given: what it is given beside u.
        has_norm: whether the backward pass of post_pre needs u, too.
        keeps_input: whether u is kept, where it is needed; else it is computed again.
    """

    def __init__(
        self,
        layer: Callable[[jax.Array, Leaves, Leaves], jax.Array],
        u: jax.core.AbstractValue,
        given: Given,
        *,
        has_norm: bool,
        keeps_input: bool,
    ):
        def passes(u: jax.Array, given: Given) -> tuple[jax.Array, Leaves]:
            s, other_s, constants, other_constants = given

            def of_differentiable(u: jax.Array, s: Leaves, constants: Leaves) -> jax.Array:
                return layer(u, merge(s, other_s), merge(constants, other_constants))

            y, backward = jax.vjp(of_differentiable, u, s, constants)
            # A pytree, whose leaves are the residuals.
            residuals, self.treedef = jax.tree.flatten(backward)
            return y, residuals

        closed = jax.make_jaxpr(passes)(u, given)
        self.consts, self.jaxpr = closed.consts, closed.jaxpr
        _, *self.residuals = self.jaxpr.outvars
        # Values that follow from constants are computed again: they would be kept for every block.
        self.u, *at_hand = self.jaxpr.invars
        self.has_norm = has_norm
        varying = set(
            map(id, self.jaxpr.invars[: 1 + len(jax.tree.leaves((given.s, given.other_s)))])
        )
        again = []
        for eqn in self.jaxpr.eqns:
            if eqn.effects or not varying.isdisjoint(map(id, eqn.invars)):
                varying.update(map(id, eqn.outvars))
            else:
                again.append(eqn)
        new = varying.difference(map(id, at_hand), () if keeps_input else [id(self.u)])
        inputs = [self.u] if has_norm else []
        # A wider copy is made again of its source.
        copies = {id(eqn.outvars[0]): eqn.invars[0] for eqn in self.jaxpr.eqns if _widens(eqn)}
        self.sources = [_follow(copies, v) for v in self.residuals]
        self.kept = {id(v): v for v in [*inputs, *self.sources] if id(v) in new}
        self.others = {id(v): v for v in self.sources if id(v) not in new and v is not self.u}
        y, *_ = self.jaxpr.outvars
        self.passes = self.jaxpr.replace(outvars=[y, *self.kept.values()])
        self.again = self.jaxpr.replace(
            invars=at_hand, eqns=again, outvars=list(self.others.values())
        )

    def forward(self, u: jax.Array, given: Given) -> tuple[jax.Array, Leaves]:
        """The output, and what the backward pass needs beside what is given."""
        y, *kept = jax.core.eval_jaxpr(self.passes, self.consts, u, *jax.tree.leaves(given))
        return y, kept

    def input(self, kept: Leaves, again: jax.Array | None) -> jax.Array:
        """The u that the backward pass of post_pre needs, kept or computed again."""
        values = dict(zip(self.kept, kept, strict=True))
        return values[id(self.u)] if again is None else again

    def backward(
        self, kept: Leaves, again: jax.Array | None, given: Given
    ) -> Callable[[jax.Array], tuple[jax.Array, Leaves, Leaves]]:
        """The function from d_y to d_u, d_s and d_constants; `again` is u if that is not kept."""
        others = jax.core.eval_jaxpr(self.again, self.consts, *jax.tree.leaves(given))
        values = {} if again is None else {id(self.u): again}
        values |= zip([*self.kept, *self.others], [*kept, *others], strict=True)
        residuals = [
            value if source is residual else value.astype(_type(residual).dtype)
            for source, residual in zip(self.sources, self.residuals, strict=True)
            for value in [values[id(source)]]
        ]
        return jax.tree.unflatten(self.treedef, residuals)


def _widens(eqn: JaxprEqn) -> bool:
    """True if an equation copies a variable to a wider dtype, from which it comes back exactly."""
    if eqn.primitive.name != "convert_element_type" or hasattr(eqn.invars[0], "val"):
        return False  # or a literal
    source, copy = (jnp.dtype(_type(v).dtype) for v in (eqn.invars[0], eqn.outvars[0]))
    return jnp.issubdtype(source, jnp.floating) and source.itemsize < copy.itemsize


def _type(variable: Var) -> jax.core.ShapedArray:
    """The type of a variable that holds an array."""
    assert isinstance(variable.aval, jax.core.ShapedArray)
    return variable.aval


def _follow(copies: dict[int, Var], variable: Var) -> Var:
    """The variable that a chain of copies begins with."""
    while id(variable) in copies:
        variable = copies[id(variable)]
    return variable


def is_inexact(value: jax.Array) -> bool:
    """True if an array can have a gradient."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def partition(values: Leaves, condition: Callable[[jax.Array], bool]) -> tuple[Leaves, Leaves]:
    """The values that meet the condition and the others, each with None in place of the rest."""
    chosen = list(map(condition, values))
    return (
        [value if c else None for value, c in zip(values, chosen, strict=True)],
        [None if c else value for value, c in zip(values, chosen, strict=True)],
    )


def merge(values: Leaves, others: Leaves) -> Leaves:
    """One list again of the two that `partition` made."""
    return [b if a is None else a for a, b in zip(values, others, strict=True)]
