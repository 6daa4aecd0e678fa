"""An iteration of a scan: its two passes, and what it keeps between them.

It keeps what JAX's derivative of the body does, but for what the backward pass has anyway (slices
of xs and their casts, what the body closes over), what follows from the latter alone, and other
forms of one value, such as the float32 that a norm makes of half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jax_mhc._scan.again import Again
from jax_mhc._scan.leaves import Leaves, form_of, merge, partition, raw
from jax_mhc._scan.program import (
    Environment,
    evaluate,
    evaluate_for,
    inlined,
    is_cheap,
    is_free,
    read,
    without_names,
)

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, Var


class Given(NamedTuple):
    """Arguments of an iteration, or of all of them, as leaves.

    Attributes:
        carry: the carry.
        slices: the slices of xs; or xs.
        constants: the arrays that the body closes over, None in place of those without a gradient.
        other_constants: the others.
    """

    carry: Leaves
    slices: Leaves
    constants: Leaves
    other_constants: Leaves


class Iteration:
    """The forward and the backward pass of a body `constants, carry, slices -> carry, results`.

    Args:
        body: the body.
        given: its arguments, whose types are read.
        again: what is computed again.

    Attributes:
        carry: the variables of the carry.
        slices: those of the slices of xs.
        results: those of the new carry, and of the results.
        begins: the places in the carry of the leaves that are kept, but for those in place.
        in_place: the places in the carry of streams that are kept and that a kernel makes of
            others than these, and the identities of the new ones.
        kept: the variables that an iteration makes and that are kept.
        streams: the identities of those of them, and of the new ones of `in_place`, that are
            streams which a kernel makes.
    """

    def __init__(self, body: Jaxpr, given: Given, again: Again):
        self.again = again

        def passes(given: Given) -> tuple[Leaves, Leaves]:
            carry, other_carry = partition(given.carry)
            slices, other_slices = partition(given.slices)

            def of_differentiable(
                carry: Leaves, slices: Leaves, constants: Leaves
            ) -> tuple[Leaves, Leaves]:
                carry, slices = merge(carry, other_carry), merge(slices, other_slices)
                constants = merge(constants, given.other_constants)
                return partition(jax.core.eval_jaxpr(body, constants, *carry, *slices))

            results, backward, others = jax.vjp(
                of_differentiable, carry, slices, given.constants, has_aux=True
            )
            # A pytree, whose leaves are the residuals.
            residuals, self.treedef = jax.tree.flatten(backward)
            self.forms = list(map(form_of, residuals))
            return merge(results, others), list(map(raw, residuals))

        closed = inlined(jax.make_jaxpr(passes)(given))
        self.jaxpr, named = without_names(closed.jaxpr)
        self.makers = {id(v): eqn for eqn in self.jaxpr.eqns for v in eqn.outvars}
        streams = {key for key in self.makers if named.get(key) == "mhc_streams"}
        dropped = again.dropped(self.makers, named)
        self.consts = closed.consts
        num_results = len(body.outvars)
        self.results = self.jaxpr.outvars[:num_results]
        self.residuals = self.jaxpr.outvars[num_results:]
        self.carry, self.slices, *constants = self.given = jax.tree.unflatten(
            jax.tree.structure(given), self.jaxpr.invars
        )
        at_hand = set(map(id, (*self.slices, *merge(*constants))))
        varying = set(map(id, (*self.carry, *self.slices)))
        for eqn in self.jaxpr.eqns:
            if is_cheap(eqn, at_hand):
                at_hand.update(map(id, eqn.outvars))
            if eqn.effects or not varying.isdisjoint(map(id, eqn.invars)):
                varying.update(map(id, eqn.outvars))
        free = {id(eqn.outvars[0]): eqn.invars[0] for eqn in self.jaxpr.eqns if is_free(eqn)}
        kept: dict[int, Var] = {}
        for residual in self.residuals:
            atom: Any = residual
            while id(atom) in free:
                atom = free[id(atom)]
            if id(atom) in varying.difference(at_hand, dropped):
                kept[id(atom)] = atom
        self.begins: list[int] = []
        self.in_place: dict[int, int] = {}
        new: Any
        for place, (old, new) in enumerate(zip(self.carry, self.results, strict=False)):
            if id(old) not in kept:
                continue
            if id(new) in streams and not self._reads(new, old):
                self.in_place[place] = id(new)
            else:
                self.begins.append(place)
        elsewhere = {*map(id, self.carry), *self.in_place.values()}
        self.kept = [v for key, v in kept.items() if key not in elsewhere]
        self.streams = streams.intersection(map(id, self.kept)).union(self.in_place.values())

    def _reads(self, new: Var, old: Var) -> bool:
        """Whether the equation that makes a variable reads the other one."""

        def source(atom: Any) -> Any:
            eqn = self.makers.get(id(atom))
            if eqn is None or eqn.primitive.name != "mhc_first_order":
                return atom
            return source(eqn.invars[0])

        return any(source(operand) is old for operand in self.makers[id(new)].invars)

    def forward(
        self, given: Given, place: Callable[[int, jax.Array], jax.Array]
    ) -> tuple[Leaves, Leaves]:
        """The new carry with the results, and what is kept.

        place: the function that takes new streams, by identity, to where they are read from.
        """
        values = self._given(given)
        for eqn in self.jaxpr.eqns:
            evaluate(eqn, values)
            for variable in eqn.outvars:
                if id(variable) in self.streams:
                    values[id(variable)] = place(id(variable), values[id(variable)])
        return read(self.results, values), read(self.kept, values)

    def backward(
        self, given: Given, new_streams: Environment, kept: Leaves
    ) -> Callable[[Leaves], tuple[Leaves, Leaves, Leaves]]:
        """The function from the cotangents of the results to those of the differentiable arguments.

        given: the arguments; of the carry those leaves that are kept.
        new_streams: those of `in_place`, by identity.
        kept: the values of `kept`.
        """
        values = self._given(given) | new_streams
        values |= zip(map(id, self.kept), kept, strict=True)
        residuals = evaluate_for(self.residuals, self.jaxpr.eqns, values, self.again.shorter)
        with_forms = [form(value) for form, value in zip(self.forms, residuals, strict=True)]
        return jax.tree.unflatten(self.treedef, with_forms)

    def _given(self, given: Given) -> Environment:
        """The values of constants and arguments, as far as there are any."""
        values: Environment = dict(zip(map(id, self.jaxpr.constvars), self.consts, strict=True))
        for variables, arguments in zip(self.given, given, strict=True):
            values |= zip(map(id, variables), arguments, strict=True)
        return values
