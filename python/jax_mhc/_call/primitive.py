"""The primitive that a call is: its types, and what becomes of it where a program is lowered.

A call runs on one device, on what that device has; `_mesh` spreads it over many. The platform that
a program is lowered for, and not the one that it is traced on, says what it becomes: a custom call,
or plain JAX (`plain.py`). A batch of calls, whose elements have parameters of their own, is one
primitive too, so that it can become whichever is faster.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir

from jax_mhc._axes import typed, varying_axes
from jax_mhc._call import library, plain
from jax_mhc._call.table import IN_PLACE, KERNELS, Call, attributes, refuse_fused
from jax_mhc._check import accumulation_dtype


def bind(call: Call, *operands: Any, mapped: tuple[bool, ...] | None = None) -> Sequence[Any]:
    """Runs a call on one device.

    mapped: of each operand, whether its first axis is that of a batch of calls; all results have
        this axis. None: one call.
    """
    return primitive().bind(*operands, call=call, mapped=mapped)


@functools.cache
def primitive() -> Any:
    """The primitive of all calls."""
    # jax.extend.core.Primitive, whose import takes 30 ms.
    new: Callable[[str], Any] = type(jax.lax.add_p)
    primitive = new("mhc_call")

    @functools.cache
    def compiled(call: Call, mapped: tuple[bool, ...] | None) -> Any:
        return jax.jit(functools.partial(primitive.bind, call=call, mapped=mapped))

    def run(*operands: Any, call: Call, mapped: tuple[bool, ...] | None) -> Any:
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


def _given(call: Call, operands: Sequence[Any]) -> tuple[dict[str, Any], Any]:
    """The operands by name, and the streams, or what has their place."""
    return dict(zip(call.operands, operands, strict=True)), operands[0]


def _result_types(
    *operands: jax.core.ShapedArray, call: Call, mapped: tuple[bool, ...] | None
) -> list[jax.core.ShapedArray]:
    """Shapes, dtypes and varying axes of a call's results."""
    given, streams = _given(call, operands)
    lead: tuple[int, ...] = ()
    if mapped is not None:
        sizes = [value.shape[0] for value, m in zip(operands, mapped, strict=True) if m]
        lead = (sizes[0],)
        elements = [
            jax.ShapeDtypeStruct(value.shape[m:], value.dtype)
            for value, m in zip(operands, mapped, strict=True)
        ]
        given, _ = _given(call, elements)
    varying = frozenset[str]().union(*map(varying_axes, operands))
    types = _types(call, given)
    return [
        typed((*lead, *shape), dtype, varying, streams)
        for shape, dtype in (types[result] for result in call.results)
    ]


def _types(call: Call, given: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of what a call can have as results, by name."""
    streams = given[call.operands[0]]
    types = {f"d_{key}": (value.shape, value.dtype) for key, value in given.items()}
    *tokens, n, last = streams.shape
    wide = accumulation_dtype(streams.dtype)
    types |= {
        "x_new": (streams.shape, streams.dtype),
        "d_x_new": (streams.shape, streams.dtype),
        "u": ((*tokens, last), streams.dtype),
        "h_pre": ((*tokens, n), wide),
        "d_h_pre": ((*tokens, n), wide),
        "h_post": ((*tokens, n), wide),
        "h_res": ((*tokens, n, n), wide),
        "r": (tuple(tokens), wide),
    }
    if "phi" in given:
        types["m"] = ((*tokens, given["phi"].shape[1]), wide)
    if "norm_scale" in given:
        types["rho"] = ((*tokens, min(given["norm_scale"].shape[0], 1)), wide)
    return types


# ---- lowering -----------------------------------------------------------------------------------


def _lower_plain(
    context: mlir.LoweringRuleContext, *operands: Any, call: Call, mapped: Any
) -> Sequence[Any]:
    """Plain JAX, for platforms without kernels."""
    if call.fused:
        refuse_fused(call.op, _platform(context), _dtype(context))
    run: Callable[..., Any] = functools.partial(plain.run, call)
    if mapped is not None:
        run = jax.vmap(run, in_axes=[0 if m else None for m in mapped])
    return mlir.lower_fun(run, multiple_results=True)(context, *operands)


def _dtype(context: mlir.LoweringRuleContext) -> str:
    """The dtype of the streams, or of what has their place."""
    streams: Any = context.avals_in[0]
    return streams.dtype.name


def _lower_cpu(
    context: mlir.LoweringRuleContext, *operands: Any, call: Call, mapped: Any
) -> Sequence[Any]:
    """One custom call, or one for each element of a batch."""
    if mapped is not None:
        return _lower_batch(context, *operands, call=call, mapped=mapped)
    return _lower_call(context, *operands, call=call)


def _lower_cuda(
    context: mlir.LoweringRuleContext, *operands: Any, call: Call, mapped: Any
) -> Sequence[Any]:
    """The same with the workspace, which XLA then owns as it owns every result."""
    if _dtype(context) not in KERNELS["cuda"]:
        return _lower_plain(context, *operands, call=call, mapped=mapped)
    if mapped is not None:
        return _lower_batch(context, *operands, call=call, mapped=mapped)
    workspace = _workspace(call, context.avals_in)
    if workspace.shape == (0,):
        return _lower_call(context, *operands, call=call)
    context = context.replace(avals_out=[*context.avals_out, workspace])
    return _lower_call(context, *operands, call=call)[:-1]


def _lower_batch(
    context: mlir.LoweringRuleContext, *operands: Any, call: Call, mapped: tuple[bool, ...]
) -> Sequence[Any]:
    """A batch: one call after the other, or plain JAX where that is faster."""

    def one_by_one(*operands: Any) -> Any:
        def one(elements: list[Any]) -> Any:
            element = iter(elements)
            pairs = zip(operands, mapped, strict=True)
            return bind(call, *(next(element) if m else array for array, m in pairs))

        return jax.lax.map(one, [array for array, m in zip(operands, mapped, strict=True) if m])

    if not call.fused and _is_small(call, context, mapped):
        return _lower_plain(context, *operands, call=call, mapped=mapped)
    return mlir.lower_fun(one_by_one, multiple_results=True)(context, *operands)


def _is_small(call: Call, context: mlir.LoweringRuleContext, mapped: tuple[bool, ...]) -> bool:
    """Whether the elements of a batch are so small that all together are faster in plain JAX.

    Measured, not derived: benches/batches.py, benches/results/*/2026-11-29-batches.md.
    """
    operands: Sequence[Any] = context.avals_in
    (num, *_) = (value.shape[0] for value, m in zip(operands, mapped, strict=True) if m)
    *tokens, n, last = operands[0].shape[mapped[0] :]
    # A size may be a symbol, of which nothing is known.
    if not all(isinstance(size, int) for size in (num, *tokens, last)):
        return False
    num_tokens = math.prod(tokens)
    num_values = num_tokens * n * last
    if _platform(context) == "cuda":
        # A call takes 10 to 20 us however little it does.
        return num >= 16 and num_values <= 1 << 18
    if call.name.endswith("_fwd"):
        return num_tokens <= 128
    return num_tokens <= 4 or num_values <= 1 << 12


def _platform(context: mlir.LoweringRuleContext) -> str:
    """The platform that an operation is lowered for, or one of several."""
    return (context.platforms or context.module_context.platforms)[0]


def _lower_call(context: mlir.LoweringRuleContext, *operands: Any, call: Call) -> Sequence[Any]:
    """The custom call."""
    aliases = {
        call.operands.index(operand): call.results.index(result)
        for operand, result in IN_PLACE.items()
        if operand in call.operands
    }
    lower = jax.ffi.ffi_lowering(library.target_name(call.name), operand_output_aliases=aliases)
    return lower(context, *operands, **attributes(call))


def _workspace(call: Call, operands: Sequence[Any]) -> Any:
    """The type of the scratch memory of a call on an NVIDIA GPU."""
    given, streams = _given(call, operands)
    *tokens, n, last = streams.shape
    columns = given["phi"].shape[1] if "phi" in given else 0
    iters = call.config.sinkhorn_iters if call.config else 0
    element_bytes = streams.dtype.itemsize
    norm_width = given["norm_scale"].shape[0] if "norm_scale" in given else 0
    sizes = (element_bytes, n, last, columns, iters, norm_width)
    per_token, fixed = library.workspace(call.name, *sizes)
    # Linear in the tokens, whose number may be a symbol.
    return jax.core.ShapedArray((per_token * math.prod(tokens) + fixed,), np.dtype(np.float32))
