"""Calls whose channels are sharded: each device has a part of C of all streams of its tokens.

A call on a part of the channels returns m and r as if there were no others. They are sums over
these channels in another form: m / r = vec(x) phi, and 1 / r² = mean(x²) + eps. So one all-reduce
of K + 1 numbers a token gives the true m and r, of which the coefficients follow, and `collapse`
makes the layer's input of them. Backward the sums <d_u, X[i]> come first: what other devices have
of them enters the call as a part of d_h_pre.

The call's term for the norm, r² <dm, m> X / (n·C), has the C of the device in place of all, S times
as many. r / √S, m / √S and √S alpha make up for that, and leave z = alpha m + bias and r dm as they
are. The gradients of alpha and bias, which all S devices have, are divided by S, as they are then
summed up over the devices.

A u with given weights waits for no sum. Its call has it at once, and so it has <d_u, X'[i]>, the
gradient of the weights; what comes back to h_pre is known beforehand.

The norm of the layer's input needs one more number a token, each way, and is plain JAX here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jax_mhc import reference
from jax_mhc._axes import Axes
from jax_mhc._call import Call, Settings, Values
from jax_mhc._call.plain import head_gate, logits
from jax_mhc._types import MHCConfig

# A function that runs a call on the channels of this device.
Inner: TypeAlias = Callable[[Call, Values], Values]


def run_split(inner: Inner, call: Call, axes: Axes, operands: Values) -> Values:
    """Runs a call whose channels are sharded over mesh axes.

    Gradients of what all these devices have are left as partial sums, one for each device.
    """
    run = _PROGRAMS.get(call.name)
    if run is None:
        return inner(call, operands)
    results = run(inner, call, axes, operands)
    return {name: results[name] for name in call.results}


def _forward(inner: Inner, call: Call, axes: Axes, given: Values) -> Values:
    """pre_fwd and post_pre_fwd."""
    config, n = _config(call), given["x"].shape[-2]
    got = _run(inner, _without_norm(call), given)
    streams = got.get("x_new", given["x"])
    got |= _normalized(got, config, axes)

    def project(z: jax.Array) -> jax.Array:
        return inner(Call("sinkhorn_fwd", config), {"z": z})["h_res"]

    z = logits(given | got, n)
    got["h_pre"], got["h_post"], got["h_res"] = reference.coefficients(z, n, config, project)
    if "h_given" in given:
        return got
    u = inner(Call("collapse_fwd"), {"x": streams, "h_pre": got["h_pre"]})["u"]
    if "norm_scale" in given:
        wide = u.astype(got["r"].dtype)
        mean = jax.lax.psum(jnp.sum(wide * wide, -1, keepdims=True), axes) / _channels(u, axes)
        rho = got["rho"] = 1 / jnp.sqrt(mean + call.attribute("norm_scale_eps"))
        u = (reference.for_tokens(given["norm_scale"], u) * (rho * wide)).astype(u.dtype)
    return got | {"u": u}


def _backward(inner: Inner, call: Call, axes: Axes, given: Values) -> Values:
    """pre_bwd and post_pre_bwd."""
    num = _num_devices(axes)
    made: Values = {}
    changed = dict(given)
    if "h_given" not in given:
        d_us = [given["d_u"]]
        if "norm_scale" in given:
            d_us, made["d_norm_scale"] = _norm_backward(inner, call, axes, given)
        dots = functools.reduce(jnp.add, (_dots(inner, given, d_u) for d_u in d_us))
        # The call adds those of its own channels, but for what the rounding of d_u took from them.
        others = jax.lax.psum(dots, axes) - _dots(inner, given, d_us[0])
        changed |= {"d_u": d_us[0], "d_h_pre": given["d_h_pre"] + others}
    root, config = math.sqrt(num), _config(call)
    if config.norm_eps_mode == "outside":  # where rms = 1 / r - eps
        config = dataclasses.replace(config, norm_eps=root * config.norm_eps)
    changed |= {name: given[name] / root for name in ("m", "r") if name in given}
    if "alpha" in given:
        changed["alpha"] = root * given["alpha"]
    got = _run(inner, _without_norm(call)._replace(config=config), changed)
    if "alpha" in given:
        made["d_alpha"] = got["d_alpha"] / root
    return got | made | {"d_bias": got["d_bias"] / num}


def _norm_backward(
    inner: Inner, call: Call, axes: Axes, given: Values
) -> tuple[list[jax.Array], jax.Array]:
    """The cotangent of u before its norm, as a sum of two in the streams' dtype; d_norm_scale."""
    scale, rho, n = given["norm_scale"], given["rho"], given["x"].shape[-2]
    h_pre = jax.nn.sigmoid(logits(given, n)[..., :n]) + _config(call).pre_eps
    u = _collapse(inner, given, h_pre).astype(rho.dtype)
    wide = given["d_u"].astype(rho.dtype)
    scaled = reference.for_tokens(scale, wide) * wide
    dot = jax.lax.psum(jnp.sum(scaled * u, -1, keepdims=True), axes) / _channels(u, axes)
    d_u = rho * scaled - rho**3 * dot * u
    d_scale = jnp.sum(wide * (rho * u), tuple(range(u.ndim - 1)))
    rounded = d_u.astype(given["d_u"].dtype)
    return [rounded, (d_u - rounded.astype(rho.dtype)).astype(rounded.dtype)], d_scale


def _head_forward(inner: Inner, call: Call, axes: Axes, given: Values) -> Values:
    got = _run(inner, call, given)
    got |= _normalized(got, _config(call), axes)
    h_pre = head_gate(got["m"], given) + _config(call).pre_eps
    return got | inner(Call("collapse_fwd"), {"x": given["x"], "h_pre": h_pre})


def _head_backward(inner: Inner, call: Call, axes: Axes, given: Values) -> Values:
    """Backward pass of pre without h_post and h_res: the head has no d_h_pre to add to."""
    x, m = given["x"], given["m"]
    n, zeros = x.shape[-2], jnp.zeros_like(m)
    matrices = jnp.broadcast_to(zeros[..., None], (*zeros.shape, n))
    as_pre = {
        "phi": jnp.concatenate([given["phi"], jnp.zeros_like(given["phi"])], -1),
        "alpha": jnp.concatenate([given["alpha"], jnp.zeros((1,), m.dtype)]),
        "bias": jnp.concatenate([given["bias"], jnp.zeros_like(given["bias"])]),
        "m": jnp.concatenate([m, zeros], -1),
        "h_res": matrices,
        "d_h_pre": zeros,
        "d_h_post": zeros,
        "d_h_res": matrices,
        "d_x_in": jnp.zeros_like(x),
    }
    config = dataclasses.replace(_config(call), constraint="identity")
    pre = Settings(config, fused=call.fused).call("pre_bwd", given | as_pre, deferred=False)
    got = _backward(inner, pre, axes, given | as_pre)
    return got | {
        "d_phi": got["d_phi"][..., :n],
        "d_alpha": got["d_alpha"][:1],
        "d_bias": got["d_bias"][:n],
    }


_PROGRAMS: dict[str, Callable[[Inner, Call, Axes, Values], Values]] = {
    "pre_fwd": _forward,
    "pre_bwd": _backward,
    "post_pre_fwd": _forward,
    "post_pre_bwd": _backward,
    "head_fwd": _head_forward,
    "head_bwd": _head_backward,
}


# ---- parts --------------------------------------------------------------------------------------


def _run(inner: Inner, call: Call, given: Values) -> Values:
    """Runs a call on those of the values that are its operands."""
    return inner(call, {name: given[name] for name in call.operands})


def _config(call: Call) -> MHCConfig:
    assert call.config is not None
    return call.config


def _num_devices(axes: Axes) -> int:
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def _channels(u: jax.Array, axes: Axes) -> int:
    """C of the streams on all devices."""
    return u.shape[-1] * _num_devices(axes)


def _without_norm(call: Call) -> Call:
    """The call without the norm of the layer's input."""
    return call._replace(groups=tuple(group for group in call.groups if group != "norm"))


def _normalized(got: Values, config: MHCConfig, axes: Axes) -> Values:
    """The r, and m if there is one, of all channels from those of this device's."""
    eps, inside = config.norm_eps, config.norm_eps_mode == "inside"
    r = got["r"]
    mean = 1 / (r * r) if inside else jnp.square(1 / r - eps)
    projected = {"m": got["m"] / r[..., None]} if "m" in got else {}
    projected, mean = jax.lax.psum((projected, mean / _num_devices(axes)), axes)
    r = 1 / jnp.sqrt(mean) if inside else 1 / (jnp.sqrt(mean) + eps)
    return {"r": r} | {name: r[..., None] * value for name, value in projected.items()}


def _collapse(inner: Inner, given: Values, h_pre: jax.Array) -> jax.Array:
    """Σ_i h_pre[i] X[i] of the streams of a backward call, which post_pre has as x and y."""
    call = Call("collapse_fwd")
    if "y" not in given:
        return inner(call, {"x": given["x"], "h_pre": h_pre})["u"]
    of_x = reference.mix(jnp.swapaxes(given["h_res"], -1, -2), h_pre[..., None])[..., 0]
    of_y = jnp.sum(h_pre * given["h_post"], -1, keepdims=True)
    u = inner(call, {"x": given["x"], "h_pre": of_x})["u"]
    return u.astype(of_y.dtype) + of_y * given["y"].astype(of_y.dtype)


def _dots(inner: Inner, given: Values, d_u: jax.Array) -> jax.Array:
    """The inner products <d_u, X[i]> over this device's channels, of the same streams."""
    call = Call("collapse_bwd")
    dots = inner(call, {"x": given["x"], "d_u": d_u})["d_h_pre"]
    if "y" not in given:
        return dots
    of_y = inner(call, {"x": given["y"][..., None, :], "d_u": d_u})["d_h_pre"]
    return reference.mix(given["h_res"], dots[..., None])[..., 0] + given["h_post"] * of_y
