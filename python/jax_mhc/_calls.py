"""The custom calls: the table of docs/architecture.md, and the primitive that one of them is.

A call runs on one device, on what that device has; `_mesh` spreads it over many.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import mlir

from jax_mhc import _library
from jax_mhc._axes import typed, varying_axes
from jax_mhc._check import accumulation_dtype
from jax_mhc._types import MHCConfig


class Call(NamedTuple):
    """A call with its settings; hashable.

    attributes: those that it has beside the config's.
    """

    name: str
    config: MHCConfig | None
    attributes: tuple[tuple[str, bool | float], ...] = ()

    @property
    def op(self) -> str:
        """The public name of its op."""
        stem = self.name.split("_")[0]
        return {"seam": "post_pre"}.get(stem, stem)

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return _CALLS[self.name][0].split()

    @property
    def results(self) -> list[str]:
        """Names of the results, in order."""
        return _CALLS[self.name][1].split()


# Operands and results by name, in order. d_<name> has the shape and dtype of <name>; d_x_in and
# d_x_new_in are cotangents that the kernel adds to, in the memory that becomes d_x or d_x_new. The
# attribute `deferred` of these calls says whether the transposed h_res has yet to be applied.
_CALLS = {
    "pre_fwd": ("x phi alpha bias norm_scale", "u h_pre h_post h_res m r rho"),
    "pre_bwd": (
        "x phi alpha bias norm_scale m r rho h_res d_u d_h_pre d_h_post d_h_res d_x_in",
        "d_x d_phi d_alpha d_bias d_norm_scale",
    ),
    "post_fwd": ("x y h_post h_res", "x_new"),
    "post_bwd": ("x y h_post h_res d_x_new", "d_y d_h_post d_h_res"),
    "seam_fwd": (
        "x y h_post h_res phi alpha bias norm_scale",
        "x_new u h_pre h_post h_res m r rho",
    ),
    "seam_bwd": (
        "x y h_post h_res phi alpha bias norm_scale m r rho u_norm h_res_new "
        "d_u d_h_pre d_h_post d_h_res d_x_new_in",
        "d_x_new d_y d_h_post d_h_res d_phi d_alpha d_bias d_norm_scale",
    ),
    "sinkhorn_fwd": ("z", "h_res"),
    "sinkhorn_bwd": ("z d_h_res", "d_z"),
    "head_fwd": ("x phi alpha bias", "u m r"),
    "head_bwd": ("x phi alpha bias m r d_u", "d_x d_phi d_alpha d_bias"),
    "collapse_fwd": ("x h_pre", "u"),
    "collapse_bwd": ("x d_u", "d_h_pre"),
}

_IN_PLACE = {"d_x_in": "d_x", "d_x_new_in": "d_x_new"}

# The dimensions of a value behind those of its tokens, "*": streams n, channels C (or none, where
# there is no norm), and others. phi is there as [n, C, K].
_DIMS = {
    "x": "* n C",
    "x_new": "* n C",
    "y": "* C",
    "u": "* C",
    "u_norm": "* C",
    "h_pre": "* -",
    "h_post": "* -",
    "h_res": "* - -",
    "h_res_new": "* - -",
    "z": "* - -",
    "m": "* -",
    "r": "*",
    "rho": "* -",
    "phi": "- C -",
    "alpha": "-",
    "bias": "-",
    "norm_scale": "C",
}


def dims(name: str) -> list[str]:
    """The dimensions of a value, or of a cotangent of it; see `_DIMS`."""
    return _DIMS[name.removeprefix("d_").removesuffix("_in")].split()


def is_parameter(name: str) -> bool:
    """Whether it is the same for all tokens."""
    return "*" not in dims(name)


def is_gradient(name: str) -> bool:
    """Whether it is a gradient, and so a sum over all that depends on the value."""
    return name.startswith("d_")


# ---- on one device ------------------------------------------------------------------------------


def bind(call: Call, *operands: Any) -> Sequence[Any]:
    """Runs a call on one device: one custom call."""
    return primitive().bind(*operands, call=call)


@functools.cache
def primitive() -> Any:
    """The primitive of all calls."""
    # jax.extend.core.Primitive, whose import takes 30 ms.
    new: Callable[[str], Any] = type(jax.lax.add_p)
    primitive = new("mhc_call")

    @functools.cache
    def compiled(call: Call) -> Any:
        return jax.jit(functools.partial(primitive.bind, call=call))

    primitive.multiple_results = True
    primitive.def_impl(lambda *operands, call: compiled(call)(*operands))
    primitive.def_abstract_eval(lambda *avals, call: _result_types(call, avals))
    mlir.register_lowering(primitive, _lower)
    mlir.register_lowering(primitive, _lower_cuda, platform="cuda")
    return primitive


def _given(call: Call, operands: Sequence[Any]) -> tuple[dict[str, Any], Any]:
    """The operands by name, and the streams, or what has their place."""
    return dict(zip(call.operands, operands, strict=True)), operands[0]


def _result_types(call: Call, operands: Sequence[Any]) -> list[jax.core.ShapedArray]:
    """Shapes, dtypes and varying axes of a call's results."""
    given, streams = _given(call, operands)
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
    varying = frozenset[str]().union(*map(varying_axes, operands))
    return [typed(*types[result], varying, streams) for result in call.results]


def _workspace(call: Call, operands: Sequence[Any]) -> Any:
    """The type of the scratch memory of a call on an NVIDIA GPU."""
    given, streams = _given(call, operands)
    *tokens, n, last = streams.shape
    columns = given["phi"].shape[1] if "phi" in given else 0
    iters = call.config.sinkhorn_iters if call.config else 0
    element_bytes = streams.dtype.itemsize
    norm_width = given["norm_scale"].shape[0] if "norm_scale" in given else 0
    sizes = (element_bytes, n, last, columns, iters, norm_width)
    per_token, fixed = _library.workspace(call.name, *sizes)
    # Linear in the tokens, whose number may be a symbol.
    return jax.core.ShapedArray((per_token * math.prod(tokens) + fixed,), np.dtype(np.float32))


def _lower(context: mlir.LoweringRuleContext, *operands: Any, call: Call) -> Sequence[Any]:
    """The custom call."""
    aliases = {
        call.operands.index(operand): call.results.index(result)
        for operand, result in _IN_PLACE.items()
        if operand in call.operands
    }
    lower = jax.ffi.ffi_lowering(_library.target_name(call.name), operand_output_aliases=aliases)
    return lower(context, *operands, **_attributes(call))


def _lower_cuda(context: mlir.LoweringRuleContext, *operands: Any, call: Call) -> Sequence[Any]:
    """The same with the workspace, which XLA then owns as it owns every result."""
    workspace = _workspace(call, context.avals_in)
    if workspace.shape == (0,):
        return _lower(context, *operands, call=call)
    context = context.replace(avals_out=[*context.avals_out, workspace])
    return _lower(context, *operands, call=call)[:-1]


def _attributes(call: Call) -> dict[str, Any]:
    """Of fixed width, whatever the x64 setting is."""
    fixed = {bool: np.int64, int: np.int64, float: np.float64, str: str}
    attributes = dict(call.attributes)
    if call.config is not None:
        attributes |= dataclasses.asdict(call.config)
    return {name: fixed[type(value)](value) for name, value in attributes.items()}


def fingerprint(call: Call) -> np.ndarray:
    """32 bytes that tell calls with other settings apart, the same in every process."""
    import hashlib

    text = repr((_library.target_name(call.name), sorted(_attributes(call).items())))
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
