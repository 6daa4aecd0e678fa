"""From an op to its calls: which implementation, batching, what can be differentiated.

The ops build `jax.custom_vjp` functions from `fused_call`, which is

    custom_vmap(run(call))

- **call** (`primitive.py`): a primitive, lowered to one custom call on one device, or to plain JAX
  for platforms without kernels.
- **run** (`_mesh`): that on all devices. Leading dimensions are handed over as they are.
- **custom_vmap**: a mapped axis becomes one more leading dimension of the same call. That cannot
  be where each element of the batch has its own parameters or its own parameter gradient; there
  every device runs its elements one after another, or small ones together in plain JAX.

The kernels have a reverse mode of first order. Other derivatives raise an error that says so:
forward mode in `reverse_mode_only`, a derivative of the derivative in `fused_call`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.interpreters import ad, batching, mlir

from jax_mhc import _check
from jax_mhc._call import library
from jax_mhc._call.table import KERNELS, Call, is_parameter, refuse_fused
from jax_mhc._copies import copies
from jax_mhc._errors import fail
from jax_mhc._mesh import Spread, map_batch, run
from jax_mhc._types import MHCConfig

Implementation = Literal["fused", "reference"] | None

_logger = logging.getLogger("jax_mhc")


# ---- which implementation -----------------------------------------------------------------------


def use_fused(
    op: str, implementation: Implementation, dtype: np.dtype, hidden_axes: tuple[str, ...] = ()
) -> bool:
    """Whether `op` runs the fused kernels on streams of `dtype`; loads and registers them if so.

    Where they do not, and it costs speed that a user might expect, a log record says why, once.

    Raises:
        ValueError: an unknown implementation, or "fused" on a platform without kernels.
        TypeError: "fused" with a dtype for which the platform has no kernels.
        RuntimeError: the shared library cannot be used. None does not replace it by the reference:
            a broken installation would only show as lost speed. Also "fused" on an NVIDIA GPU
            for which there are no kernels, or with a driver that is too old for them.
    """
    _check.implementation(op, implementation)
    if _runs_fused(op, implementation, dtype):
        return True
    if hidden_axes:
        fail(
            ValueError, op, "hidden_axis_name", "None where the op runs in plain JAX",
            hidden_axes, "Plain JAX does not split C by hand: leave C whole, or split it by an "
            "auto or explicit mesh axis.",
        )  # fmt: skip
    return False


def _runs_fused(op: str, implementation: Implementation, dtype: np.dtype) -> bool:
    if implementation == "reference":
        return False
    fused, platform = implementation == "fused", default_platform()
    if fused and dtype.name not in KERNELS.get(platform, ()):
        refuse_fused(op, platform, dtype.name)
    if platform not in KERNELS:
        _log_once(logging.INFO, f"no kernels for platform {platform!r}: the ops run in plain JAX")
        return False
    if dtype.name not in KERNELS[platform]:
        _log_once(
            logging.INFO, f"no {dtype.name} kernels for platform {platform!r}: plain JAX instead"
        )
        return False
    if fused or platform == "cpu" or library.broken():
        library.ensure_registered(platform)
    elif reason := library.missing(platform):
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


class Settings(NamedTuple):
    """The settings that the forward and the backward call of an op share; hashable.

    config: of the coefficients; None for calls without any.
    norm_scale_eps: of the norm of the layer's input; None for calls that cannot have one.
    hidden_axes: the axes of a `jax.shard_map` over which C is split.
    fused: whether nothing but the kernels may run the calls (implementation="fused").
    """

    config: MHCConfig | None = None
    norm_scale_eps: float | None = None
    hidden_axes: tuple[str, ...] = ()
    fused: bool = False


def fused_call(
    name: str,
    settings: Settings,
    *operands: jax.Array,
    kept_alone: Sequence[str] = ("m", "r", "rho"),
    **attributes: bool | float,
) -> Sequence[jax.Array]:
    """Runs the call `name` of docs/architecture.md on all devices. It cannot be differentiated.

    kept_alone: the results that nothing reads but what keeps them for the backward pass.
    attributes: those that the call has beside the config's and the norm's.
    """
    config, eps, hidden_axes, fused = settings
    if eps is not None:
        attributes["norm_scale_eps"] = eps
    call = Call(name, config, tuple(attributes.items()), fused)
    first_order = _primitives().first_order
    operands = tuple(first_order.bind(operand, op=call.op) for operand in operands)
    results = _batched(Spread(call, hidden_axes=hidden_axes))(*operands)
    if not name.endswith("_fwd"):
        return results
    # Where a scan stacks a result, XLA for GPUs lets the call write it to its place (dynamic-slice
    # fusion). If somebody else in the loop reads that result, the versions of JAX 0.11 leave a
    # second call for him (openxla/xla#45799).
    return [
        result if result_name in kept_alone else jax.lax.optimization_barrier(result)
        for result_name, result in zip(call.results, results, strict=True)
    ]


@functools.cache
def _batched(spread: Spread) -> Callable[..., Sequence[jax.Array]]:
    """The call with a rule for `jax.vmap`."""
    names, has_batch = spread.call.operands, spread.mapped is not None

    @custom_vmap
    def call(*operands: jax.Array) -> Sequence[jax.Array]:
        return run(spread, *operands)

    @call.def_vmap
    def _(axis_size: int, batched: list[bool], *operands: jax.Array) -> Any:
        everywhere = [True] * len(spread.call.results)
        if has_batch:
            return _batch_of_batches(spread, tuple(batched))(*operands), everywhere
        backward = any(map(is_parameter, spread.call.results))
        if backward or any(b and is_parameter(n) for n, b in zip(names, batched, strict=True)):
            mapped = spread._replace(mapped=tuple(batched))
            return _batched(mapped)(*operands), everywhere
        return call(
            *(
                operand
                if is_batched or is_parameter(name)
                else jnp.broadcast_to(operand, (axis_size, *operand.shape))
                for operand, name, is_batched in zip(operands, names, batched, strict=True)
            )
        ), everywhere

    return call


@functools.cache
def _batch_of_batches(spread: Spread, mapped: tuple[bool, ...]) -> Callable[..., Any]:
    """The batches of a mapped batch, one after the other; outside of `jax.jit` compiled once."""
    again = spread._replace(mapped=mapped)
    call = _batched(spread)
    return jax.jit(lambda *operands: map_batch(call, again, operands), inline=True)


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
        TypeError, op, "derivative", "one reverse-mode derivative",
        "a derivative of the derivative",
        "Use implementation='reference', which has derivatives of every order.",
    )  # fmt: skip


class _Primitives(NamedTuple):
    """Identities, and primitives, because JAX may drop the rules of a custom_jvp.

    reverse_mode puts `tangent` in the way of its tangents. That is removed by transposing, the step
    that makes reverse mode; whatever else meets it is forward mode, and raises. first_order has no
    derivative at all.
    """

    reverse_mode: Any
    tangent: Any
    first_order: Any


@functools.cache
def _primitives() -> _Primitives:
    # jax.extend.core.Primitive, whose import takes 30 ms.
    new: Callable[[str], Any] = type(jax.lax.add_p)
    primitives = _Primitives(*(new(f"mhc_{name}") for name in _Primitives._fields))
    reverse_mode, tangent, first_order = primitives

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
            streams, axes = copies(streams, size, axis=0), (0, *axes[1:])
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
