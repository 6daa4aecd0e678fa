"""Programs that JAX traced (jaxprs): without inner calls, and evaluated a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp

from jax_mhc._scan.leaves import type_of

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# Values by the identity of their variables.
Environment: TypeAlias = dict[int, Any]

# Operands of an equation, and the function from their values to the one result that is wanted.
Shorter: TypeAlias = tuple[list[Any], Callable[..., Any]]

# Calls that say how their program is compiled, and not what it computes.
_CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2")


def is_literal(atom: Any) -> bool:
    """Whether an operand is a literal, and no variable."""
    return hasattr(atom, "val")


def inlined(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program with the programs of inner calls in their place."""

    def run(*operands: Any) -> list[Any]:
        return _run(program.jaxpr, program.consts, operands)

    if not any(_inner(eqn) for eqn in program.jaxpr.eqns):
        return program
    return jax.make_jaxpr(run)(*program.in_avals)


def _inner(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The program that an equation calls, if nothing depends on the call itself."""
    params = eqn.params
    if eqn.primitive.name not in _CALLS or params.get("differentiated"):
        return None
    shardings = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    if any(type(sharding).__name__ != "UnspecifiedValue" for sharding in shardings):
        return None
    inner: ClosedJaxpr | None = params.get("jaxpr") or params.get("call_jaxpr")
    return inner


def _run(jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """The results of a program whose inner calls are inlined."""
    values: Environment = dict(
        zip(map(id, (*jaxpr.constvars, *jaxpr.invars)), (*consts, *operands), strict=True)
    )
    for eqn in jaxpr.eqns:
        inner = _inner(eqn)
        if inner is None:
            evaluate(eqn, values)
            continue
        # That of checkpoint has no constants, and no place for them.
        open_jaxpr: Any = getattr(inner, "jaxpr", inner)
        results = _run(open_jaxpr, getattr(inner, "consts", ()), read(eqn.invars, values))
        values |= zip(map(id, eqn.outvars), results, strict=True)
    return read(jaxpr.outvars, values)


def read(atoms: Iterable[Any], values: Environment) -> list[Any]:
    """The values of variables and literals."""
    return [atom.val if is_literal(atom) else values[id(atom)] for atom in atoms]


def evaluate(eqn: JaxprEqn, values: Environment) -> None:
    """Adds the results of an equation to the values."""
    operands = {id(atom): atom for atom in eqn.invars if not is_literal(atom)}
    results = [v for v in eqn.outvars if type(v).__name__ != "DropVar"]
    one = jax.make_jaxpr(lambda: ())().jaxpr.replace(
        invars=list(operands.values()), outvars=results, eqns=[eqn], effects=eqn.effects
    )
    values |= zip(
        map(id, results),
        jax.core.eval_jaxpr(one, (), *[values[key] for key in operands]),
        strict=True,
    )


def evaluate_for(
    outputs: Iterable[Any],
    eqns: Sequence[JaxprEqn],
    values: Environment,
    shorter: Callable[[JaxprEqn, frozenset[int]], Shorter | None],
) -> list[Any]:
    """The values of outputs, by those of the equations that lead there from the values.

    shorter: the function that may know a shorter way to the one result that is wanted of an
        equation: operands, and a function of their values.
    """
    outputs = list(outputs)
    wanted = {id(atom) for atom in outputs if not is_literal(atom)}.difference(values)
    steps: list[tuple[JaxprEqn, Shorter | None]] = []
    for eqn in reversed(eqns):
        of_eqn = wanted.intersection(map(id, eqn.outvars))
        if of_eqn:
            steps.append((eqn, shorter(eqn, frozenset(of_eqn))))
            operands = steps[-1][1][0] if steps[-1][1] else eqn.invars
            wanted |= {id(atom) for atom in operands if not is_literal(atom)}.difference(values)
    values = dict(values)
    for eqn, way in reversed(steps):
        if way is None:
            evaluate(eqn, values)
        else:
            (key,) = wanted.intersection(map(id, eqn.outvars))
            values[key] = way[1](*read(way[0], values))
    return read(outputs, values)


# Operations that cost little beside what reads their results.
_CHEAP = (
    "broadcast_in_dim", "convert_element_type", "dynamic_slice", "reduce_precision", "reshape",
    "slice", "split", "squeeze", "transpose", "unstack",
)  # fmt: skip


# Operations that may give their operand in another form.
_FORMS = ("convert_element_type", "reduce_precision", "reshape")


def is_cheap(eqn: JaxprEqn, at_hand: set[int]) -> bool:
    """Whether an equation makes, at little cost, a cast or part of values that are at hand."""
    operands = (id(atom) for atom in eqn.invars if not is_literal(atom))
    return eqn.primitive.name in _CHEAP and at_hand.issuperset(operands)


def is_free(eqn: JaxprEqn) -> bool:
    """Whether an equation gives its one operand in another form, which costs nothing to repeat."""
    name, params = eqn.primitive.name, eqn.params
    if name not in _FORMS or any(map(is_literal, eqn.invars)) or len(eqn.invars) != 1:
        return False
    source, result = (type_of(v).dtype for v in (eqn.invars[0], eqn.outvars[0]))
    if name == "reduce_precision":
        own = jnp.finfo(source)
        return (params["exponent_bits"], params["mantissa_bits"]) == (own.nexp, own.nmant)
    if name == "convert_element_type":
        # A wider copy, from which the value comes back exactly.
        return jnp.issubdtype(source, jnp.floating) and source.itemsize < result.itemsize
    return True


def without_names(jaxpr: Jaxpr) -> tuple[Jaxpr, dict[int, str]]:
    """The program without `checkpoint_name`, and the names of values by their identity.

    Barriers behind streams are left out: what makes them may write them to their place.
    """
    makers = {id(v): eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    named = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "name"]
    of_streams = (makers.get(id(eqn.invars[0])) for eqn in named if _is_streams(eqn))
    barriers = (eqn for eqn in of_streams if eqn and eqn.primitive.name == "optimization_barrier")
    dropped = set(map(id, (*named, *barriers)))
    other_names: dict[int, Any] = {}

    def renamed(atom: Any) -> Any:
        return atom if is_literal(atom) else other_names.get(id(atom), atom)

    eqns = []
    for eqn in jaxpr.eqns:
        operands = list(map(renamed, eqn.invars))
        if id(eqn) in dropped:
            other_names |= zip(map(id, eqn.outvars), operands, strict=True)
        else:
            eqns.append(eqn.replace(invars=operands))
    names = {id(renamed(eqn.outvars[0])): eqn.params["name"] for eqn in named}
    return jaxpr.replace(eqns=eqns, outvars=list(map(renamed, jaxpr.outvars))), names


def _is_streams(eqn: JaxprEqn) -> bool:
    return bool(eqn.params["name"] == "mhc_streams")
