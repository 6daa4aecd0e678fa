"""Calls whose channels are split: every device has some channels of all streams of its tokens.

A call on some of the channels returns m and r as if there were no others, which are sums over these
channels in another form: m / r = vec(x) phi, and 1 / r² = mean(x²) + eps. So one all-reduce of
K + 1 numbers a token gives the true m and r, of which the coefficients follow, and `collapse` makes
the layer's input of them. Backward the sums <d_u, X[i]> come first: what other devices have of them
enters the call as a part of d_h_pre.

The call's term for the norm, r² <dm, m> X / (n·C), has the C of the device in place of all, S times
as many. r / √S, m / √S and √S alpha make up for that, and leave z = alpha m + bias and r dm as they
are. The gradients of alpha and bias, which all S devices have, are divided by S, as they are then
summed up over the devices.

The norm of the layer's input needs one more number a token, each way, and is plain JAX here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_mhc import reference
from jax_mhc._call.plain import head_gate, logits
from jax_mhc._call.table import Call
from jax_mhc._types import MHCConfig

# Runs a call on the channels of this device, `(call, *operands) -> results`.
Inner = Callable[..., Sequence[Any]]


def run_split(inner: Inner, call: Call, axes: tuple[str, ...], *operands: Any) -> Sequence[Any]:
    """Runs a call whose channels are split over mesh axes, phi being [n, C, K].

    Gradients of what all these devices have are left as summands of one for each device.
    """
    run = _PROGRAMS.get(call.name)
    if run is None:
        return inner(call, *operands)
    results = run(inner, call, axes, dict(zip(call.operands, operands, strict=True)))
    return [results[name] for name in call.results]


def _forward(inner: Inner, call: Call, axes: tuple[str, ...], given: dict[str, Any]) -> Any:
    """pre_fwd and post_pre_fwd."""
    config, n = _config(call), given["x"].shape[-2]
    got = _run(inner, call, _without_norm(given))
    streams = got.get("x_new", given["x"])
    m, r = _normalized(got["m"], got["r"], config, axes)

    def project(z: Any) -> Any:
        return inner(Call("sinkhorn_fwd", config), z)[0]

    h = reference.coefficients(_logits(m, given, n), n, config, project)
    (u,) = inner(Call("collapse_fwd", None), streams, h[0])
    rho = got["rho"]
    if given["norm_scale"].size:
        wide = u.astype(rho.dtype)
        mean = jax.lax.psum(jnp.sum(wide * wide, -1, keepdims=True), axes) / _channels(u, axes)
        rho = 1 / jnp.sqrt(mean + dict(call.attributes)["norm_scale_eps"])
        u = (reference.for_tokens(given["norm_scale"], u) * (rho * wide)).astype(u.dtype)
    return got | dict(zip(("h_pre", "h_post", "h_res"), h, strict=True)) | {
        "u": u, "m": m, "r": r, "rho": rho
    }  # fmt: skip


def _backward(inner: Inner, call: Call, axes: tuple[str, ...], given: dict[str, Any]) -> Any:
    """pre_bwd and post_pre_bwd."""
    num, d_norm_scale = _num_devices(axes), jnp.zeros_like(given["norm_scale"])
    d_us = [given["d_u"]]
    if d_norm_scale.size:
        d_us, d_norm_scale = _norm_backward(inner, call, axes, given)
    dots = sum(_dots(inner, given, d_u) for d_u in d_us)
    # The call adds those of its own channels, but for what the rounding of d_u took from them.
    others = jax.lax.psum(dots, axes) - _dots(inner, given, d_us[0])
    root, config = math.sqrt(num), _config(call)
    if config.norm_eps_mode == "outside":  # where rms = 1 / r - eps
        config = dataclasses.replace(config, norm_eps=root * config.norm_eps)
    changed = _without_norm(given) | {
        "m": given["m"] / root,
        "r": given["r"] / root,
        "alpha": root * given["alpha"],
        "d_u": d_us[0],
        "d_h_pre": given["d_h_pre"] + others,
    }
    got = _run(inner, call._replace(config=config), changed)
    return got | {
        "d_alpha": got["d_alpha"] / root, "d_bias": got["d_bias"] / num,
        "d_norm_scale": d_norm_scale,
    }  # fmt: skip


def _norm_backward(
    inner: Inner, call: Call, axes: tuple[str, ...], given: dict[str, Any]
) -> tuple[list[Any], Any]:
    """The cotangent of u before its norm, as a sum of two in the streams' dtype; d_norm_scale."""
    scale, rho, n = given["norm_scale"], given["rho"], given["x"].shape[-2]
    h_pre = jax.nn.sigmoid(_logits(given["m"], given, n)[..., :n]) + _config(call).pre_eps
    u = _collapse(inner, given, h_pre).astype(rho.dtype)
    wide = given["d_u"].astype(rho.dtype)
    scaled = reference.for_tokens(scale, wide) * wide
    dot = jax.lax.psum(jnp.sum(scaled * u, -1, keepdims=True), axes) / _channels(u, axes)
    d_u = rho * scaled - rho**3 * dot * u
    d_scale = jnp.sum(wide * (rho * u), tuple(range(u.ndim - 1)))
    rounded = d_u.astype(given["d_u"].dtype)
    return [rounded, (d_u - rounded.astype(rho.dtype)).astype(rounded.dtype)], d_scale


def _head_forward(inner: Inner, call: Call, axes: tuple[str, ...], given: dict[str, Any]) -> Any:
    got = _run(inner, call, given)
    m, r = _normalized(got["m"], got["r"], _config(call), axes)
    h_pre = head_gate(m, given) + _config(call).pre_eps
    (u,) = inner(Call("collapse_fwd", None), given["x"], h_pre)
    return {"u": u, "m": m, "r": r}


def _head_backward(inner: Inner, call: Call, axes: tuple[str, ...], given: dict[str, Any]) -> Any:
    """That of pre without h_post and h_res, since the head has no d_h_pre to add to."""
    x, m = given["x"], given["m"]
    n, zeros = x.shape[-2], jnp.zeros_like(m)
    matrices = jnp.broadcast_to(zeros[..., None], (*zeros.shape, n))
    as_pre = {
        "phi": jnp.concatenate([given["phi"], jnp.zeros_like(given["phi"])], -1),
        "alpha": jnp.concatenate([given["alpha"], jnp.zeros((2,), m.dtype)]),
        "bias": jnp.concatenate([given["bias"], jnp.zeros_like(given["bias"])]),
        "norm_scale": jnp.zeros((0,), m.dtype),
        "m": jnp.concatenate([m, zeros], -1),
        "rho": m[..., :0],
        "h_res": matrices,
        "d_h_pre": zeros,
        "d_h_post": zeros,
        "d_h_res": matrices,
        "d_x_in": jnp.zeros_like(x),
    }
    config = dataclasses.replace(_config(call), constraint="identity")
    pre = Call("pre_bwd", config, (("deferred", False), ("norm_scale_eps", 0.0)), call.fused)
    got = _backward(inner, pre, axes, given | as_pre)
    return got | {
        "d_phi": got["d_phi"][..., :n], "d_alpha": got["d_alpha"][:1], "d_bias": got["d_bias"][:n]
    }  # fmt: skip


_PROGRAMS = {
    "pre_fwd": _forward,
    "pre_bwd": _backward,
    "post_pre_fwd": _forward,
    "post_pre_bwd": _backward,
    "head_fwd": _head_forward,
    "head_bwd": _head_backward,
}


# ---- parts --------------------------------------------------------------------------------------


def _run(inner: Inner, call: Call, given: dict[str, Any]) -> dict[str, Any]:
    results = inner(call, *(given[name] for name in call.operands))
    return dict(zip(call.results, results, strict=True))


def _config(call: Call) -> MHCConfig:
    assert call.config is not None
    return call.config


def _num_devices(axes: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def _channels(u: Any, axes: tuple[str, ...]) -> int:
    """C of the whole streams."""
    return u.shape[-1] * _num_devices(axes)


def _without_norm(given: dict[str, Any]) -> dict[str, Any]:
    """Operands for a call that does not normalise the layer's input."""
    empty: dict[str, Any] = {"norm_scale": given["norm_scale"][:0]}
    for name in ("rho", "u_norm"):
        if name in given:
            empty[name] = given[name][..., :0]
    return given | empty


def _normalized(m: Any, r: Any, config: MHCConfig, axes: tuple[str, ...]) -> tuple[Any, Any]:
    """M and r of all channels from those of this device's."""
    eps, inside = config.norm_eps, config.norm_eps_mode == "inside"
    mean = 1 / (r * r) if inside else jnp.square(1 / r - eps)
    projected, mean = jax.lax.psum((m / r[..., None], mean / _num_devices(axes)), axes)
    r = 1 / jnp.sqrt(mean) if inside else 1 / (jnp.sqrt(mean) + eps)
    return r[..., None] * projected, r


def _logits(m: Any, given: dict[str, Any], n: int) -> Any:
    return logits(m, given["alpha"], given["bias"], n)


def _collapse(inner: Inner, given: dict[str, Any], h_pre: Any) -> Any:
    """Σ_i h_pre[i] X[i] of the streams of a backward call, which the seam has as x and y."""
    call = Call("collapse_fwd", None)
    if "y" not in given:
        return inner(call, given["x"], h_pre)[0]
    of_x = reference.mix(jnp.swapaxes(given["h_res"], -1, -2), h_pre[..., None])[..., 0]
    of_y = jnp.sum(h_pre * given["h_post"], -1, keepdims=True)
    (u,) = inner(call, given["x"], of_x)
    return u.astype(of_y.dtype) + of_y * given["y"].astype(of_y.dtype)


def _dots(inner: Inner, given: dict[str, Any], d_u: Any) -> Any:
    """<d_u, X[i]> over this device's channels, of the same streams."""
    call = Call("collapse_bwd", None)
    (dots,) = inner(call, given["x"], d_u)
    if "y" not in given:
        return dots
    (of_y,) = inner(call, given["y"][..., None, :], d_u)
    return reference.mix(given["h_res"], dots[..., None])[..., 0] + given["h_post"] * of_y
