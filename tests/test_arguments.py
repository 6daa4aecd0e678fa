"""Refusals of what cannot be meant, in the one form of errors; and nothing else is refused."""

import re

import jax
import pytest
from bad_arguments import BAD, Traced
from unusual_arguments import GOOD

from jax_mhc._errors import shown


@pytest.fixture(autouse=True, scope="module")
def unfiltered_tracebacks():
    """JAX takes most of the time of an error to shorten its traceback."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def run(op, call, *values):
    """Traces a call, which compiles nothing; the watch and the plots want values."""
    if op.startswith("diagnostics") and not any(isinstance(value, Traced) for value in values):
        call(*values)
    elif values and isinstance(values[0], Traced):
        jax.eval_shape(lambda traced: [call(traced), None][1], values[0].value)
    else:
        jax.eval_shape(lambda: [call(*values), None][1])


def fault(op, argument, call, value):
    """Fault of the refusal of a value; None where there is none."""
    try:
        run(op, call, value)
    except (TypeError, ValueError) as error:
        # Or a part of the argument, such as params.bias or layers[0].
        where = rf"jax_mhc\.{re.escape(op)}: {re.escape(argument)}([.\[][^:]*)?"
        form = rf"{where}: expected [^\n]+, got [^\n]+\. [A-Z][^\n]+[.?]"
        return None if re.fullmatch(form, str(error)) else f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


NAMES = [f"{op}-{argument}" for op, argument, *_ in BAD]


@pytest.mark.parametrize("op, argument, values, call", BAD, ids=NAMES)
def test_bad_arguments_are_refused(op, argument, values, call):
    faults = [(shown(value), fault(op, argument, call, value)) for value in values]
    assert not [(value, text) for value, text in faults if text]


@pytest.mark.parametrize("op", GOOD)
def test_unusual_arguments_are_taken(op):
    for call in GOOD[op]:
        run(op, call)


def test_there_are_many_bad_arguments():
    num = sum(len(values) for _, _, values, _ in BAD)
    print(f"{num} bad arguments of {len(BAD)} places")
    assert num >= 400
