"""Every op on meshes of devices, of every kind, against one device."""

import functools

import cases
import jax
import pytest
from cases import exact, make_cotangents, make_operands
from meshes import (
    CASE,
    LAYOUTS,
    SUMS,
    both,
    collectives,
    expected,
    forward,
    make_mesh,
    rows,
    spread,
)
from test_hlo import custom_calls

from jax_mhc import presets

pytestmark = pytest.mark.mesh

assert_trees_close = functools.partial(cases.assert_trees_close, limit=cases.limit(CASE, layers=2))


@functools.cache
def problem(op):
    """Operands, cotangents, and the outputs and gradients to expect."""
    arrays = make_operands(op, CASE), make_cotangents(op, CASE)
    return *arrays, exact(op, presets.PAPER, *arrays)


def check_collectives(mode, found, limits):
    """None of another kind, and none larger."""
    if mode == "explicit, auto":
        return  # XLA gathers, as a warning says
    if mode == "manual, explicit" and jax.__version_info__ < (0, 12):
        return  # jax.numpy.sin alone gathers there
    for kind, (_, size) in found.items():
        assert size <= limits.get(kind, 0), (found, limits)


@pytest.mark.parametrize("mode, layout", rows())
@pytest.mark.parametrize("op", SUMS)
def test_every_layout(op, mode, layout):
    operands, cotangents, (outputs, gradients) = problem(op)
    layout, mesh = LAYOUTS[layout], make_mesh(mode)
    with jax.set_mesh(mesh):
        forward_limits, limits = expected(op, mode, layout, mesh)
        function, placed = spread(
            functools.partial(both, op), mode, layout, mesh,
            (operands, cotangents), (outputs, gradients),
        )  # fmt: skip
        compiled = jax.jit(function).lower(*placed).compile()
        results = compiled(*placed)
        check_collectives(mode, collectives(compiled.as_text()), limits)
        assert_trees_close(results, (outputs, gradients))

        function, placed = spread(
            functools.partial(forward, op), mode, layout, mesh, (operands,), outputs
        )
        text = jax.jit(function).lower(*placed).compile().as_text()
        check_collectives(mode, collectives(text), forward_limits)
        calls = custom_calls(text)
        assert all(calls[f"{call}_fwd"] for call in cases.OPS[op].calls), calls
