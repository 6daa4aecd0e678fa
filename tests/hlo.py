"""Compiled programs as tests read them: custom calls, and residuals of a backward pass."""

import collections
import contextlib
import io
import math
import re

import jax
from cases import OPS
from jax.ad_checkpoint import print_saved_residuals
from programs import emitters


def compiled_text(function, *arrays):
    """The HLO that XLA compiles a function to, as users get it: with all fusions."""
    return jax.jit(function).lower(*arrays).compile(emitters(fusion=True)).as_text()


def custom_calls(text):
    """Number of our calls of each kind, by the names in docs/calls.md."""
    return collections.Counter(re.findall(r'custom_call_target="jax_mhc_(\w+)_v\d+"', text))


def forward(op):
    """The forward calls of an op of `cases.OPS`, each with its number."""
    return collections.Counter(f"{call}_fwd" for call in OPS[op].calls)


def backward(op):
    """The calls of the backward pass of an op of `cases.OPS`, each with its number."""
    calls = [f"{call}_bwd" for call in OPS[op].calls]
    return collections.Counter([*calls, *(f"{call}_fwd" for call in OPS[op].in_backward)])


def residuals(function, *arrays):
    """Numbers that the backward pass keeps beside the operands: the size of each array."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_saved_residuals(function, *arrays)
    lines = printed.getvalue().splitlines()
    shapes = [
        re.match(r"[\w<>]+\[([\d,]*)\]", line).group(1)
        for line in lines
        if "from the argument" not in line
    ]
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
