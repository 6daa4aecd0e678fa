"""The one file that knows JAX's plumbing: custom calls, batching, what can be differentiated.

The ops build `jax.custom_vjp` functions from `fused_call`, which is

    custom_vmap(call)

- **call**: a primitive, lowered to one custom call with the operands and results of `_CALLS`, the
  table of docs/architecture.md. Leading dimensions are handed over as they are. Lowered for an
  NVIDIA GPU, the custom call gets its workspace as one more result.
- **custom_vmap**: a mapped axis becomes one more leading dimension of the same call. That cannot
  be where each element of the batch has its own parameters or its own parameter gradient; there
  the elements run one after another (`jax.lax.map`).

The kernels have a reverse mode of first order. Other derivatives raise an error that says so:
forward mode in `reverse_mode_only`, a derivative of the derivative in `fused_call`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.interpreters import ad, batching, mlir

from jax_mhc import _library
from jax_mhc._check import STREAM_DTYPES, accumulation_dtype
from jax_mhc._errors import choice, fail
from jax_mhc._types import MHCConfig

Implementation = Literal["fused", "reference"] | None

# Platforms that the package ships kernels for, and the streams' dtypes that they take.
_KERNELS = {"cpu": STREAM_DTYPES, "cuda": ("float32", "bfloat16", "float16")}

_logger = logging.getLogger("jax_mhc")


# ---- which implementation -----------------------------------------------------------------------


def use_fused(op: str, implementation: Implementation, dtype: np.dtype) -> bool:
    """Whether `op` runs the fused kernels on streams of `dtype`; loads and registers them if so.

    Where they do not, and it costs speed that a user might expect, a log record says why, once.

    Raises:
        ValueError: an unknown implementation, or "fused" on a platform without kernels.
        TypeError: "fused" with a dtype for which the platform has no kernels.
        RuntimeError: the shared library cannot be used. None does not replace it by the reference:
            a broken installation would only show as lost speed. Also "fused" on an NVIDIA GPU
            for which there are no kernels, or with a driver that is too old for them.
    """
    choice(op, "implementation", implementation, (None, "fused", "reference"))
    if implementation == "reference":
        return False
    fused, platform = implementation == "fused", default_platform()
    if platform not in _KERNELS:
        if fused:
            fail(
                ValueError, op, "implementation='fused'",
                f"a platform with kernels ({', '.join(_KERNELS)})", platform,
                "Use implementation=None or implementation='reference' here.",
            )  # fmt: skip
        _log_once(logging.INFO, f"no kernels for platform {platform!r}: the ops run in plain JAX")
        return False
    if dtype.name not in _KERNELS[platform]:
        if fused:
            fail(
                TypeError, op, "implementation='fused'",
                f"dtype {', '.join(_KERNELS[platform])} on platform {platform!r}", dtype.name,
                "Use implementation=None or implementation='reference', or convert the arrays.",
            )  # fmt: skip
        _log_once(
            logging.INFO, f"no {dtype.name} kernels for platform {platform!r}: plain JAX instead"
        )
        return False
    if fused or platform == "cpu" or _library.broken():
        _library.ensure_registered(platform)
    elif reason := _library.missing(platform):
        _log_once(logging.WARNING, f"no fused kernels, the ops run in plain JAX: {reason}")
        return False
    return True


def default_platform() -> str:
    """The platform that XLA compiles for unless told otherwise; `cuda` or `rocm` for `gpu`."""
    # JAX adds its settings to `config` at run time, unseen by type checkers.
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        platform = jax.default_backend()
    else:
        platform = device if isinstance(device, str) else device.platform
    if platform == "gpu":
        # JAX itself tells them apart by this text.
        version = jax.devices("gpu")[0].client.platform_version
        return next((name for name in ("cuda", "rocm") if name in version), platform)
    return platform


@functools.cache
def _log_once(level: int, message: str) -> None:
    _logger.log(level, message)


# ---- the calls ----------------------------------------------------------------------------------

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
}

_IN_PLACE = {"d_x_in": "d_x", "d_x_new_in": "d_x_new"}

# Everything else has the tokens as leading dimensions.
_PARAMETERS = frozenset(
    prefix + name for prefix in ("", "d_") for name in ("phi", "alpha", "bias", "norm_scale")
)


def _result_types(name: str, operands: Sequence[Any]) -> list[jax.core.ShapedArray]:
    """Shapes and dtypes of a call's results."""
    operand_names, result_names = (names.split() for names in _CALLS[name])
    given = dict(zip(operand_names, operands, strict=True))
    types = {f"d_{key}": (value.shape, value.dtype) for key, value in given.items()}
    streams = given["x"] if "x" in given else given["z"]
    *tokens, n, last = streams.shape
    wide = accumulation_dtype(streams.dtype)
    types |= {
        "x_new": (streams.shape, streams.dtype),
        "d_x_new": (streams.shape, streams.dtype),
        "u": ((*tokens, last), streams.dtype),
        "h_pre": ((*tokens, n), wide),
        "h_post": ((*tokens, n), wide),
        "h_res": ((*tokens, n, n), wide),
        "r": (tuple(tokens), wide),
    }
    if "phi" in given:
        types["m"] = ((*tokens, given["phi"].shape[1]), wide)
    if "norm_scale" in given:
        types["rho"] = ((*tokens, min(given["norm_scale"].shape[0], 1)), wide)
    return [jax.core.ShapedArray(*types[result]) for result in result_names]


def _workspace(name: str, config: MHCConfig | None, operands: Sequence[Any]) -> Any:
    """The type of the scratch memory of a call on an NVIDIA GPU."""
    given = dict(zip(_CALLS[name][0].split(), operands, strict=True))
    streams = given["x"] if "x" in given else given["z"]
    *tokens, n, last = streams.shape
    columns = given["phi"].shape[1] if "phi" in given else 0
    iters = config.sinkhorn_iters if config else 0
    element_bytes = streams.dtype.itemsize
    norm_width = given["norm_scale"].shape[0] if "norm_scale" in given else 0
    sizes = (element_bytes, n, last, columns, iters, norm_width)
    per_token, fixed = _library.workspace(name, *sizes)
    # Linear in the tokens, whose number may be a symbol.
    return jax.core.ShapedArray((per_token * math.prod(tokens) + fixed,), np.dtype(np.float32))


def fused_call(
    name: str,
    config: MHCConfig | None,
    *operands: jax.Array,
    kept_alone: Sequence[str] = ("m", "r", "rho"),
    **attributes: bool | float,
) -> Sequence[jax.Array]:
    """Runs the call `name` of docs/architecture.md. It cannot be differentiated.

    kept_alone: the results that nothing reads but what keeps them for the backward pass.
    attributes: those that the call has beside the config's.
    """
    op = name.split("_")[0]
    first_order = _primitives().first_order
    call = _call(name, config, tuple(attributes.items()))
    results = call(*(first_order.bind(operand, op=op) for operand in operands))
    if not name.endswith("_fwd"):
        return results
    # Where a scan stacks a result, XLA for GPUs lets the call write it to its place (dynamic-slice
    # fusion). If somebody else in the loop reads that result, the versions of JAX 0.11 leave a
    # second call for him (openxla/xla#45799).
    names = _CALLS[name][1].split()
    return [
        result if result_name in kept_alone else jax.lax.optimization_barrier(result)
        for result_name, result in zip(names, results, strict=True)
    ]


@functools.cache
def _call(
    name: str, config: MHCConfig | None, attributes: tuple[tuple[str, bool | float], ...]
) -> Callable[..., Sequence[jax.Array]]:
    operand_names, result_names = (names.split() for names in _CALLS[name])

    @custom_vmap
    def call(*operands: jax.Array) -> Sequence[jax.Array]:
        return _primitives().call.bind(*operands, name=name, config=config, attributes=attributes)

    @call.def_vmap
    def _(axis_size: int, batched: list[bool], *operands: jax.Array) -> Any:
        everywhere = [True] * len(result_names)
        own_parameters = any(
            is_batched and operand in _PARAMETERS
            for operand, is_batched in zip(operand_names, batched, strict=True)
        )
        if own_parameters or not _PARAMETERS.isdisjoint(result_names):

            def one(mapped: list[jax.Array]) -> Sequence[jax.Array]:
                elements = iter(mapped)
                return call(
                    *(
                        next(elements) if is_batched else operand
                        for operand, is_batched in zip(operands, batched, strict=True)
                    )
                )

            mapped = [o for o, is_batched in zip(operands, batched, strict=True) if is_batched]
            return jax.lax.map(one, mapped), everywhere
        return call(
            *(
                operand
                if is_batched or operand_name in _PARAMETERS
                else jnp.broadcast_to(operand, (axis_size, *operand.shape))
                for operand, operand_name, is_batched in zip(
                    operands, operand_names, batched, strict=True
                )
            )
        ), everywhere

    return call


def _lower(
    context: mlir.LoweringRuleContext,
    *operands: Any,
    name: str,
    config: MHCConfig | None,
    attributes: tuple[tuple[str, bool | float], ...],
) -> Sequence[Any]:
    """The custom call of `name`."""
    operand_names, result_names = (names.split() for names in _CALLS[name])
    aliases = {
        operand_names.index(operand): result_names.index(result)
        for operand, result in _IN_PLACE.items()
        if operand in operand_names
    }
    lower = jax.ffi.ffi_lowering(_library.target_name(name), operand_output_aliases=aliases)
    return lower(context, *operands, **_attributes(config), **_typed(dict(attributes)))


def _lower_cuda(
    context: mlir.LoweringRuleContext,
    *operands: Any,
    name: str,
    config: MHCConfig | None,
    attributes: tuple[tuple[str, bool | float], ...],
) -> Sequence[Any]:
    """The same with the workspace, which XLA then owns as it owns every result."""
    workspace = _workspace(name, config, context.avals_in)
    if workspace.shape == (0,):
        return _lower(context, *operands, name=name, config=config, attributes=attributes)
    context = context.replace(avals_out=[*context.avals_out, workspace])
    return _lower(context, *operands, name=name, config=config, attributes=attributes)[:-1]


def _attributes(config: MHCConfig | None) -> dict[str, Any]:
    """The config as attributes."""
    return {} if config is None else _typed(dataclasses.asdict(config))


def _typed(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes of fixed width, whatever the x64 setting is."""
    fixed = {bool: np.int64, int: np.int64, float: np.float64, str: str}
    return {name: fixed[type(value)](value) for name, value in attributes.items()}


# ---- derivatives that the kernels do not have ---------------------------------------------------


def reverse_mode_only(op: str, *operands: jax.Array) -> Sequence[jax.Array]:
    """The operands of `op` as its custom_vjp can take them.

    Their tangents may be transposed but not computed: on forward mode a custom_vjp gives JAX's own
    error, which cannot name our remedy and under jit comes as late as the lowering.

    Where vmap maps any operand, it maps the first, the streams. `pre` returns them; were they
    the same for all elements of a batch that differ in their parameters, every element's backward
    call would add the one cotangent of that result.
    """
    return _primitives().reverse_mode.bind(*operands, op=op)


def _forward_mode(*_: Any, op: str, **__: Any) -> NoReturn:
    fail(
        TypeError, op, "derivative", "reverse mode (jax.grad, jax.vjp, jax.jacrev)",
        "forward mode (jax.jvp, jax.jacfwd, jax.linearize)",
        "Use implementation='reference', which has every mode.",
    )  # fmt: skip


def _second_order(*_: Any, op: str) -> NoReturn:
    fail(
        TypeError, {"seam": "post_pre"}.get(op, op), "derivative", "one reverse-mode derivative",
        "a derivative of the derivative",
        "Use implementation='reference', which has derivatives of every order.",
    )  # fmt: skip


class _Primitives(NamedTuple):
    """One call, and identities. Primitives, because JAX may drop the rules of a custom_jvp.

    reverse_mode puts `tangent` in the way of its tangents. That is removed by transposing, the step
    that makes reverse mode; whatever else meets it is forward mode, and raises. first_order has no
    derivative at all.
    """

    call: Any
    reverse_mode: Any
    tangent: Any
    first_order: Any


@functools.cache
def _primitives() -> _Primitives:
    # jax.extend.core.Primitive, whose import takes 30 ms.
    new: Callable[[str], Any] = type(jax.lax.add_p)
    primitives = _Primitives(*(new(f"mhc_{name}") for name in _Primitives._fields))
    call, reverse_mode, tangent, first_order = primitives

    @functools.cache
    def compiled(**settings: Any) -> Any:
        return jax.jit(functools.partial(call.bind, **settings))

    call.multiple_results = True
    call.def_impl(lambda *operands, **settings: compiled(**settings)(*operands))
    call.def_abstract_eval(lambda *avals, name, **_: _result_types(name, avals))
    mlir.register_lowering(call, _lower)
    mlir.register_lowering(call, _lower_cuda, platform="cuda")

    def jvp(operands: Any, tangents: Any, op: str) -> Any:
        # The operands themselves: other values would be saved once more for the backward pass.
        return list(operands), [
            t if type(t) is ad.Zero else tangent.bind(t, op=op) for t in tangents
        ]

    def batch(operands: Any, axes: Any, op: str) -> Any:
        streams, *others = operands
        if axes[0] is None:
            mapped = zip(others, axes[1:], strict=True)
            size = next(other.shape[axis] for other, axis in mapped if axis is not None)
            streams, axes = jnp.broadcast_to(streams, (size, *streams.shape)), (0, *axes[1:])
        return reverse_mode.bind(streams, *others, op=op), axes

    reverse_mode.multiple_results = True
    reverse_mode.def_impl(lambda *operands, op: list(operands))
    reverse_mode.def_abstract_eval(lambda *avals, op: list(avals))
    mlir.register_lowering(reverse_mode, lambda _, *operands, op: list(operands))
    ad.primitive_jvps[reverse_mode] = jvp
    batching.primitive_batchers[reverse_mode] = batch

    tangent.def_impl(_forward_mode)
    tangent.def_abstract_eval(lambda aval, op: aval)
    mlir.register_lowering(tangent, _forward_mode)
    ad.deflinear2(tangent, lambda cotangent, _, op: [cotangent])
    batching.primitive_batchers[tangent] = _forward_mode

    first_order.def_impl(lambda operand, op: operand)
    first_order.def_abstract_eval(lambda aval, op: aval)
    mlir.register_lowering(first_order, lambda _, operand, op: [operand])
    ad.defjvp(first_order, _second_order)
    batching.defvectorized(first_order)
    return primitives
