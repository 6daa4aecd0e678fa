"""The primitive that a call is: its types, and what it becomes where a program is lowered.

A call runs on one device, on the part of each array that this device has; `_mesh` spreads it over
many. The platform that a program is lowered for, and not the one that it is traced on, decides what
the call becomes: a custom call, or plain JAX (`plain.py`). A batch of calls, whose elements have
parameters of their own, is one primitive too, so that it can become whichever is faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jax.interpreters import mlir

from jax_mhc._axes import typed, varying_axes
from jax_mhc._call import library, plain
from jax_mhc._call.table import Call, Values, attributes, refuse_fused, sizes
from jax_mhc._check import accumulation_dtype
from jax_mhc._limits import KERNEL_DTYPES

if TYPE_CHECKING:
    from jax.extend.core import Primitive
    from jax.extend.mlir import ir

    IrValue: TypeAlias = ir.Value[Any]
    IrValues: TypeAlias = Sequence[IrValue | Sequence[IrValue]]

# The names of the operands of a batch of calls whose first axis is that of the batch.
Mapped: TypeAlias = tuple[str, ...] | None


def bind(call: Call, operands: Mapping[str, jax.Array], *, mapped: Mapped = None) -> Values:
    """Runs a call on one device.

    Args:
        call: the call.
        operands: its operands.
        mapped: the operands whose first axis is that of a batch of calls; all results have this
            axis. None: one call.
    """
    in_order = [operands[name] for name in call.operands]
    results = primitive().bind(*in_order, call=call, mapped=mapped)
    return dict(zip(call.results, results, strict=True))


@functools.cache
def primitive() -> Primitive:
    """The primitive of all calls."""
    # jax.extend.core.Primitive, whose import takes 30 ms.
    new: Callable[[str], Primitive] = type(jax.lax.add_p)
    primitive = new("mhc_call")

    @functools.cache
    def compiled(call: Call, mapped: Mapped) -> Callable[..., list[jax.Array]]:
        return jax.jit(functools.partial(primitive.bind, call=call, mapped=mapped))

    def run(*operands: jax.Array, call: Call, mapped: Mapped) -> list[jax.Array]:
        # With jit disabled, the jitted function would bind the primitive, which would end here.
        with jax.disable_jit(False):
            return compiled(call, mapped)(*operands)

    primitive.multiple_results = True
    primitive.def_impl(run)
    primitive.def_abstract_eval(_result_types)
    mlir.register_lowering(primitive, _lower_plain)
    mlir.register_lowering(primitive, _lower_cpu, platform="cpu")
    mlir.register_lowering(primitive, _lower_cuda, platform="cuda")
    return primitive


def _are_mapped(call: Call, mapped: Mapped) -> list[bool]:
    """For each operand, True if its first axis is that of a batch."""
    return [name in (mapped or ()) for name in call.operands]


def _result_types(
    *operands: jax.core.ShapedArray, call: Call, mapped: Mapped
) -> list[jax.core.ShapedArray]:
    """Shapes, dtypes and varying axes of a call's results."""
    are_mapped = _are_mapped(call, mapped)
    shapes = [value.shape[m:] for value, m in zip(operands, are_mapped, strict=True)]
    tokens, by_letter = sizes(call.operand_values, shapes)
    lead = tokens
    if mapped is not None:
        lead = (operands[are_mapped.index(True)].shape[0], *tokens)
    varying = frozenset[str]().union(*map(varying_axes, operands))
    streams = operands[0]
    dtypes = {"streams": streams.dtype, "accumulation": accumulation_dtype(streams.dtype)}
    return [
        typed(
            (
                *lead[: len(lead) if value.has_tokens else len(lead) - len(tokens)],
                *(by_letter[dim] for dim in value.dims),
            ),
            dtypes[value.precision],
            varying,
            streams,
        )
        for value in call.result_values
    ]


# ---- lowering -----------------------------------------------------------------------------------


def _lower_plain(
    context: mlir.LoweringRuleContext, *operands: IrValue, call: Call, mapped: Mapped
) -> IrValues:
    """Plain JAX, for platforms without kernels."""
    if call.fused:
        refuse_fused(call.op, _platform(context), _types(context)[0].dtype.name)

    def run(*operands: jax.Array) -> list[jax.Array]:
        results = plain.run(call, dict(zip(call.operands, operands, strict=True)))
        return [results[name] for name in call.results]

    if mapped is not None:
        run = jax.vmap(run, in_axes=[0 if m else None for m in _are_mapped(call, mapped)])
    return mlir.lower_fun(run, multiple_results=True)(context, *operands)


def _types(context: mlir.LoweringRuleContext) -> Sequence[jax.core.ShapedArray]:
    """The types of the operands, of which the first is that of the streams, or in their place."""
    # JAX declares the base class of all types.
    return context.avals_in  # type: ignore[return-value]


def _lower_cpu(
    context: mlir.LoweringRuleContext, *operands: IrValue, call: Call, mapped: Mapped
) -> IrValues:
    """One custom call, or one for each element of a batch."""
    if mapped is not None:
        return _lower_batch(context, *operands, call=call, mapped=mapped)
    return _lower_call(context, *operands, call=call)


def _lower_cuda(
    context: mlir.LoweringRuleContext, *operands: IrValue, call: Call, mapped: Mapped
) -> IrValues:
    """The same with the workspace, which XLA then owns as it owns every result."""
    if _types(context)[0].dtype.name not in KERNEL_DTYPES["cuda"]:
        return _lower_plain(context, *operands, call=call, mapped=mapped)
    if mapped is not None:
        return _lower_batch(context, *operands, call=call, mapped=mapped)
    workspace = _workspace(call, _types(context))
    if workspace.shape == (0,):
        return _lower_call(context, *operands, call=call)
    context = context.replace(avals_out=[*context.avals_out, workspace])
    return _lower_call(context, *operands, call=call)[:-1]


def _lower_batch(
    context: mlir.LoweringRuleContext, *operands: IrValue, call: Call, mapped: tuple[str, ...]
) -> IrValues:
    """A batch: one call after the other, or plain JAX where that is faster."""

    def one_by_one(*operands: jax.Array) -> list[jax.Array]:
        given = dict(zip(call.operands, operands, strict=True))
        results = jax.lax.map(
            lambda elements: bind(call, given | elements), {name: given[name] for name in mapped}
        )
        return [results[name] for name in call.results]

    if not call.fused and _is_small(call, context, mapped):
        return _lower_plain(context, *operands, call=call, mapped=mapped)
    return mlir.lower_fun(one_by_one, multiple_results=True)(context, *operands)


def _is_small(call: Call, context: mlir.LoweringRuleContext, mapped: tuple[str, ...]) -> bool:
    """True if the elements of a batch are so small that all together are faster in plain JAX.

    Measured, not derived: benches/batches.py, benches/results/*/2026-11-29-batches.md.
    """
    operands, are_mapped = _types(context), _are_mapped(call, mapped)
    num = operands[are_mapped.index(True)].shape[0]
    *tokens, n, last = operands[0].shape[are_mapped[0] :]
    # A size may be a symbol, of which nothing is known.
    if not all(isinstance(size, int) for size in (num, *tokens, last)):
        return False
    num_tokens = math.prod(tokens)
    num_values = num_tokens * n * last
    if _platform(context) == "cuda":
        # A call takes 10 to 20 us however little it does.
        return num >= 16 and num_values <= 1 << 18
    if call.is_forward:
        return num_tokens <= 128
    return num_tokens <= 4 or num_values <= 1 << 12


def _platform(context: mlir.LoweringRuleContext) -> str:
    """The platform that an operation is lowered for, or one of several."""
    return (context.platforms or context.module_context.platforms)[0]


def _lower_call(context: mlir.LoweringRuleContext, *operands: IrValue, call: Call) -> IrValues:
    """The custom call."""
    aliases = {len(operands) - 1: 0} if call.row.adds_in_place else {}
    lower = jax.ffi.ffi_lowering(library.target_name(call.name), operand_output_aliases=aliases)
    return lower(context, *operands, **attributes(call))


def _workspace(call: Call, operands: Sequence[jax.core.ShapedArray]) -> jax.core.ShapedArray:
    """The type of the scratch memory of a call on an NVIDIA GPU."""
    tokens, by_letter = sizes(call.operand_values, [operand.shape for operand in operands])
    channels = by_letter.get("C", by_letter["n"])
    problem = (
        operands[0].dtype.itemsize,
        by_letter["n"],
        channels,
        by_letter["K"] if "phi" in call.operands else 0,
        call.config.sinkhorn_iters if call.config else 0,
        channels if "norm_scale" in call.operands else 0,
        int("h_given" in call.operands),
    )
    per_token, fixed = library.workspace(call.name, *problem)
    # Linear in the tokens, whose number may be a symbol.
    return jax.core.ShapedArray((per_token * math.prod(tokens) + fixed,), np.dtype(np.float32))
