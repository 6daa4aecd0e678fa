"""Choice of an op's implementation: the fused kernels or the reference in plain JAX.

That is decided while a program is traced, by the platform that it is likely to run on, and on
GPUs by what was measured there (`faster.py`). The platform that it is lowered for is known later; a
call of a program that is lowered for another one becomes plain JAX then (`primitive.py`).
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, TypeAlias

import jax
import numpy as np

from jax_mhc import _check
from jax_mhc._call import faster, library
from jax_mhc._call.faster import Configuration
from jax_mhc._call.table import refuse_fused
from jax_mhc._errors import Refusal
from jax_mhc._limits import KERNEL_DTYPES

Implementation: TypeAlias = Literal["fused", "reference"] | None

_logger = logging.getLogger("jax_mhc")


def use_fused(
    op: str,
    implementation: Implementation,
    dtype: np.dtype,
    hidden_axes: tuple[str, ...] = (),
    configuration: Configuration | None = None,
) -> bool:
    """True if `op` runs the fused kernels on streams of `dtype`; loads and registers them then.

    Where None takes plain JAX, a log record says why, once. What is measured to be faster decides
    where the configuration is given, and plain JAX can do it: not with hidden_axes.

    Raises:
        ValueError: an unknown implementation, or "fused" on a platform without kernels.
        TypeError: "fused" with a dtype for which the platform has no kernels.
        RuntimeError: the shared library cannot be used. None does not replace it by the reference:
            a broken installation would only show as lost speed. The wheel of Python alone, which
            has none, is no broken one. Also "fused" on an NVIDIA GPU
            for which there are no kernels, or with a driver that is too old for them.
    """
    _check.implementation(op, implementation)
    if _runs_fused(op, implementation, dtype):
        can_choose = implementation is None and default_platform() == "cuda" and not hidden_axes
        return not (can_choose and configuration and _is_plain_faster(configuration))
    if hidden_axes:
        raise Refusal(ValueError, op, "hidden_axis_name").expected(
            "None where the op runs in plain JAX",
            hidden_axes,
            "Plain JAX does not split C by hand: leave C whole, or split it by an "
            "auto or explicit mesh axis.",
        )
    return False


def _runs_fused(op: str, implementation: Implementation, dtype: np.dtype) -> bool:
    if implementation == "reference":
        return False
    fused, platform = implementation == "fused", default_platform()
    if fused and dtype.name not in KERNEL_DTYPES.get(platform, ()):
        refuse_fused(op, platform, dtype.name)
    if platform not in KERNEL_DTYPES:
        _log_once(logging.INFO, f"no kernels for platform {platform!r}: the ops run in plain JAX")
        return False
    if dtype.name not in KERNEL_DTYPES[platform]:
        _log_once(
            logging.INFO, f"no {dtype.name} kernels for platform {platform!r}: plain JAX instead"
        )
        return False
    # A library that is left out on purpose is no broken installation.
    must_be_there = not library.is_left_out() and (platform == "cpu" or library.broken())
    if fused or must_be_there:
        library.ensure_registered(platform)
    elif reason := library.missing(platform):
        _log_once(logging.WARNING, f"no fused kernels, the ops run in plain JAX: {reason}")
        return False
    return True


def _is_plain_faster(configuration: Configuration) -> bool:
    row = faster.plain(configuration)
    if row is None:
        return False
    _log_once(
        logging.INFO,
        f"plain JAX is faster than the kernels: {row.plain_us:.0f} us for {row.fused_us:.0f} us, "
        f"measured for {row.configuration} on {faster.description()['gpu']}. "
        "implementation='fused' takes the kernels",
    )
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
