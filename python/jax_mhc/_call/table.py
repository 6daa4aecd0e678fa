"""The custom calls: the table of docs/architecture.md, and what there are kernels for."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, NoReturn

import numpy as np

from jax_mhc._call import library
from jax_mhc._check import STREAM_DTYPES
from jax_mhc._errors import fail
from jax_mhc._types import MHCConfig

# Platforms that the package ships kernels for, and the streams' dtypes that they take.
KERNELS = {"cpu": STREAM_DTYPES, "cuda": ("float32", "bfloat16", "float16")}


class Call(NamedTuple):
    """A call with its settings; hashable.

    attributes: those that it has beside the config's.
    fused: whether nothing but the kernels may run it (implementation="fused").
    """

    name: str
    config: MHCConfig | None
    attributes: tuple[tuple[str, bool | float], ...] = ()
    fused: bool = False

    @property
    def op(self) -> str:
        """The public name of its op."""
        return self.name.removesuffix("_fwd").removesuffix("_bwd")

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
    "post_pre_fwd": (
        "x y h_post h_res phi alpha bias norm_scale",
        "x_new u h_pre h_post h_res m r rho",
    ),
    "post_pre_bwd": (
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

IN_PLACE = {"d_x_in": "d_x", "d_x_new_in": "d_x_new"}

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


def refuse_fused(op: str, platform: str, dtype: str) -> NoReturn:
    """Raises that there are no kernels for a platform, or for this dtype on it."""
    if platform not in KERNELS:
        fail(
            ValueError, op, "implementation='fused'",
            f"a platform with kernels ({', '.join(KERNELS)})", platform,
            "Use implementation=None or implementation='reference' here.",
        )  # fmt: skip
    fail(
        TypeError, op, "implementation='fused'",
        f"dtype {', '.join(KERNELS[platform])} on platform {platform!r}", dtype,
        "Use implementation=None or implementation='reference', or convert the arrays.",
    )  # fmt: skip


def attributes(call: Call) -> dict[str, Any]:
    """Of fixed width, whatever the x64 setting is."""
    fixed = {bool: np.int64, int: np.int64, float: np.float64, str: str}
    attributes = dict(call.attributes)
    if call.config is not None:
        attributes |= dataclasses.asdict(call.config)
    return {name: fixed[type(value)](value) for name, value in attributes.items()}


def fingerprint(call: Call) -> np.ndarray:
    """32 bytes that tell calls with other settings apart, the same in every process."""
    import hashlib

    text = repr((library.target_name(call.name), sorted(attributes(call).items())))
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
