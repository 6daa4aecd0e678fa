"""Bytes, time and memory of mHC in a training step."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from jax_mhc import _errors
from jax_mhc._call import faster
from jax_mhc._errors import Refusal
from jax_mhc._limits import KERNEL_DTYPES, MAX_PERMUTED_STREAMS
from jax_mhc._measure import traffic
from jax_mhc._stack.remat import NOTHING, Recompute, best_length
from jax_mhc._types import MHCConfig
from jax_mhc.estimate._gpus import GPUS
from jax_mhc.presets import PAPER

_OP = "estimate"
_Constraint = Literal["birkhoff", "permutations", "none", "identity"]
CONSTRAINTS = (*get_args(_Constraint), "static")
DTYPES = KERNEL_DTYPES["cuda"]
# Sublayers of the stack that was measured.
_MEASURED_SUBLAYERS = 4
# Part of a copy's speed that the kernels reach where they read the streams more than once, as was
# measured on an H200 at widths that the others do not take (C = 12288): with 4 streams they move
# 59 u and not 25 (docs/kernels.md).
_TWO_PASS_SHARE = 0.41
# Compute capabilities whose kernels read the streams once, forward and backward (docs/kernels.md).
_ONE_PASS_CAPABILITIES = ("9.0",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What mHC adds to a training step, forward and backward.

    Attributes:
        u_bytes: of a layer's input, C values a token.
        sublayers: L, those of all layers.
        moved_bytes: read and written by the kernels, what is computed again among them.
        copy_gb_per_s: of a copy on the GPU.
        share: part of a copy's speed that the kernels reach.
        ms: their time.
        memory_bytes: kept for the backward pass beyond what plain residuals keep.
        parameters: their number.
        lines: the formulas, with the numbers in them.
    """

    u_bytes: int
    sublayers: int
    moved_bytes: int
    copy_gb_per_s: float
    share: float
    ms: float
    memory_bytes: int
    parameters: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the formulas, one a line."""
        return "\n".join(self.lines)


def estimate(
    *,
    hidden: int,
    layers: int,
    tokens: int,
    streams: int = 4,
    dtype: str = "bfloat16",
    constraint: str = "birkhoff",
    sublayers_per_layer: int = 2,
    gpu: str = "H200",
    bandwidth: float | None = None,
    recompute: Recompute = NOTHING,
) -> Estimate:
    """What mHC adds to a training step of a model on a GPU: bytes, time and memory.

    With u = C T values in the streams' dtype, L sublayers and stretches of k of them
    (`recompute.every`; 1 where nothing is computed again):

        bytes  = (L (5n + 5) + 3n) u                     the passes of a chain of sublayers
               + (L - L/k) (2n + 1) u                    policy "streams": post again
              or (L - L/k) (2n + 2) u + L/k (n + 1) u    policy "mhc": pre again, too
        time   = bytes / (bandwidth of a copy × share)
        memory = (n L/k + (n + 2) k + L) u               streams, a stretch's, layers' outputs
              or (n L/k + (n + 2) k) u                   policy "mhc": no layer's input is kept

    share is the part of a copy's speed that the kernels reach, as measured on an H200 in the
    nearest configuration (docs/performance.md). GPUs of other compute capabilities than 9.0 have
    kernels that move more bytes: their share is 0.41 at most, which is an assumption, since these
    kernels were timed on an H200 alone; so is the bandwidth of a copy on other GPUs, the
    datasheet's times what a copy reaches on an H200. Against training steps recorded on H200s, time
    and memory are right to 20 %, in configurations that were not measured the time to 25 %.

    The time is that of the kernels, in a Python loop over sublayers or `stack`; `jax.lax.scan`
    copies the streams besides. Below some thousand tokens launches take longer than the bytes.
    Memory is that of such a loop beyond the same loop with plain residuals; a scan of these keeps
    more. Parameters, their gradients and the optimizer's state come on top.

    Args:
        hidden: C.
        layers: of the model.
        tokens: T of a step, on one GPU.
        streams: n, from 1 to 16.
        dtype: of the streams: "float32", "bfloat16" or "float16".
        constraint: that of the config, or "static" for static coefficients.
        sublayers_per_layer: connections of a layer; attention and MLP have one each.
        gpu: a name of `jax_mhc.estimate.GPUS`, in any case.
        bandwidth: GB/s that a copy reads and writes there, as `python -m jax_mhc.bench` tells;
            None: by the GPU's datasheet.
        recompute: as of `stack`, with "streams" or "mhc" as policy.

    Returns:
        An `Estimate`; as text it shows the formulas.

    Raises:
        ValueError, TypeError: sizes or names out of range; a stretch that does not divide the
            sublayers; a policy that is a function.
    """
    n = _errors.num_streams(_OP, "streams", streams)
    dtype = _errors.choice(_OP, "dtype", dtype, DTYPES)
    constraint = _errors.choice(_OP, "constraint", constraint, CONSTRAINTS)
    if constraint == "permutations":
        remedy = "There are n! permutations."
        _errors.integer(_OP, "streams", n, 1, MAX_PERMUTED_STREAMS, remedy)
    hidden = _errors.width(_OP, hidden)
    remedy = "Give those of the model."
    layers = _errors.integer(_OP, "layers", layers, 1, None, remedy)
    per_layer = _errors.integer(_OP, "sublayers_per_layer", sublayers_per_layer, 1, None, remedy)
    remedy = "Give those of a step on one GPU."
    tokens = _errors.integer(_OP, "tokens", tokens, 1, None, remedy)
    name = _gpu_name(gpu)
    copy = GPUS[name].copy_gb_per_s
    if bandwidth is not None:
        copy = _errors.number(_OP, "bandwidth", bandwidth, positive=True)
    num = layers * per_layer
    every, policy = _stretch(recompute, n, layers, per_layer)

    u_bytes = hidden * tokens * (4 if dtype == "float32" else 2)
    forward, backward = traffic.of_stack(n, num)
    again, stretches = 0, num // every
    if every > 1 or policy == "mhc":
        calls = traffic.of_calls(n)
        again = (num - stretches) * calls["post_fwd"]
        if policy == "mhc":
            again = (num - stretches) * calls["post_pre_fwd"] + stretches * calls["pre_fwd"]
    moved = (forward + backward + again) * u_bytes
    share, basis = _share(n, hidden, tokens, dtype, constraint, GPUS[name].capability)
    ms = moved / (copy * share) / 1e6
    outputs = 0 if policy == "mhc" else num
    kept = n * stretches + (n + 2) * every + outputs

    config = PAPER if constraint == "static" else MHCConfig(constraint=_of_config(constraint))
    columns, gates = config.num_coefficients(n), config.num_gates()
    phi = 0 if constraint == "static" else n * hidden * columns + gates
    parameters = num * (phi + columns)
    lines = (
        f"mHC in {layers} layers of {per_layer} sublayers, {tokens} tokens, C = {hidden}, n = {n}, "
        f"{dtype}, {constraint}, on {name}",
        f"u       = C T values of {dtype} = {u_bytes / 1e6:.4g} MB; L = {num} sublayers",
        f"bytes   = (L (5n + 5) + 3n) u{_again(again)} = {moved / 1e9:.4g} GB a step, forward and "
        "backward",
        f"time    = bytes / ({copy:.0f} GB/s of a copy x {share:.2f}) = {ms:.3g} ms",
        f"memory  = {_kept(every, policy)} = {kept * u_bytes / 1e9:.3g} GB beyond plain residuals",
        f"weights = {parameters / 1e6:.3g} M parameters in float32 = {4 * parameters / 1e6:.3g} MB",
        f"The factor {share:.2f} is what the kernels reach of a copy's speed: {basis}.",
    )
    return Estimate(
        u_bytes=u_bytes,
        sublayers=num,
        moved_bytes=moved,
        copy_gb_per_s=copy,
        share=share,
        ms=ms,
        memory_bytes=kept * u_bytes,
        parameters=parameters,
        lines=lines,
    )


def _again(again: int) -> str:
    return f" + {again} u computed again" if again else ""


def _kept(every: int, policy: str) -> str:
    outputs = "" if policy == "mhc" else " + L"
    stretches = "n L" if every == 1 else f"n L / {every}"
    length = "(n + 2)" if every == 1 else f"(n + 2) {every}"
    return f"({stretches} + {length}{outputs}) u"


def _of_config(constraint: str) -> Any:
    """Returns the constraint, which is one of MHCConfig's."""
    return constraint


def _gpu_name(gpu: object) -> str:
    by_lower = {name.lower(): name for name in GPUS}
    if isinstance(gpu, str) and gpu.lower() in by_lower:
        return by_lower[gpu.lower()]
    raise Refusal(ValueError, _OP, "gpu").expected(
        f"one of {', '.join(GPUS)}",
        _errors.shown(gpu),
        "For another take the nearest, and give the bandwidth of a copy.",
    )


def _stretch(recompute: object, n: int, layers: int, per_layer: int) -> tuple[int, str]:
    """Sublayers of a stretch, and what is computed again in it."""
    if not isinstance(recompute, Recompute):
        raise Refusal(TypeError, _OP, "recompute").expected(
            "jax_mhc.Recompute", _errors.typed(recompute), "Make one: jax_mhc.Recompute(every=4)."
        )
    if not isinstance(recompute.policy, str):
        raise Refusal(ValueError, _OP, "recompute.policy").expected(
            "'streams' or 'mhc'", "a function", "What another policy keeps is not known here."
        )
    lengths = [each for each in range(1, per_layer + 1) if per_layer % each == 0]
    lengths += [per_layer * each for each in range(2, layers + 1) if layers % each == 0]
    if recompute.every == "auto":
        return best_length(n, layers * per_layer, lengths), recompute.policy
    if recompute.every not in lengths:
        raise Refusal(ValueError, _OP, "recompute.every").expected(
            f"one of {', '.join(map(str, lengths))}",
            recompute.every,
            "Stretches divide a layer, or are of several layers that divide all of them.",
        )
    return recompute.every, recompute.policy


def _share(
    n: int, hidden: int, tokens: int, dtype: str, constraint: str, capability: str
) -> tuple[float, str]:
    """Part of a copy's speed that the kernels reach, and where that is known from."""
    row = faster.nearest_stack(faster.Configuration(n, hidden, dtype, tokens, constraint))
    own, record = row.configuration, faster.description()
    assert row.stack_us is not None and own.tokens is not None
    u_bytes = own.tokens * own.hidden * (4 if own.dtype == "float32" else 2)
    floor_us = sum(traffic.of_stack(own.streams, _MEASURED_SUBLAYERS)) * u_bytes
    share = floor_us / (1e3 * record["copy_gb_per_s"]) / row.stack_us
    basis = f"measured in {own} on an {record['gpu']}"
    if capability in _ONE_PASS_CAPABILITIES or constraint == "static" or share <= _TWO_PASS_SHARE:
        return share, basis
    return _TWO_PASS_SHARE, (
        "assumed for kernels that read the streams more than once, as those of compute capability "
        f"{capability} do"
    )
