"""The custom calls in plain JAX: where there are no kernels, and where these are the slower choice.

A program is traced before the platform is known that it is lowered for. So every call has this
second form, which `primitive.py` lowers to on platforms without kernels, and for the small elements
of a batch. Backward calls are the formulas of docs/mathematics.md, on what the forward calls keep.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_mhc import reference
from jax_mhc._axes import varying_like
from jax_mhc._check import accumulation_dtype
from jax_mhc._types import MHCConfig

if TYPE_CHECKING:
    from jax_mhc._call.table import Call, Values


def run(call: Call, operands: Values) -> Values:
    """Runs a call: its results from its operands, both by name."""
    results = _PROGRAMS[call.name](call, operands)
    return {name: results[name] for name in call.results}


def logits(given: Values, streams: int) -> jax.Array:
    """The logits z `[..., K]` [16] from m, alpha and bias; without m the coefficients are static.

    The tokens of static ones are those of r `[...]`.
    """
    bias = given["bias"]
    if "m" in given:
        return reference.gated(given["m"], given["alpha"], bias, streams)
    r = given["r"][..., None]
    # To JAX it varies with the tokens, although it does not.
    of_tokens = jnp.broadcast_to(reference.for_tokens(bias, r), (*r.shape[:-1], *bias.shape))
    return varying_like(of_tokens, r)


# ---- forward ------------------------------------------------------------------------------------


def _pre_fwd(call: Call, given: Values) -> Values:
    config, x = _config(call), _wide(given["x"])
    made = {"r": varying_like(jnp.zeros(x.shape[:-2], x.dtype), x)}
    if "phi" in given:
        made["m"], made["r"] = reference.projection(x, _rows(given["phi"]), config)
    n = x.shape[-2]
    h = _coefficients(logits(given | made, n), n, config)
    made["h_pre"], made["h_post"], made["h_res"] = h
    u = reference.weighted_sum(given.get("h_given", made["h_pre"]), x)
    if "norm_scale" in given:
        u, made["rho"] = _normalized(u, given["norm_scale"], call.attribute("norm_scale_eps"))
    return made | {"u": u.astype(given["x"].dtype)}


def _post_fwd(call: Call, given: Values) -> Values:
    x, y, h_post, h_res = (given[name] for name in ("x", "y", "h_post", "h_res"))
    x_new = reference.mix(h_res, _wide(x)) + h_post[..., None] * _wide(y)[..., None, :]
    return {"x_new": x_new.astype(x.dtype)}


def _post_pre_fwd(call: Call, given: Values) -> Values:
    new = _post_fwd(call, given)
    return new | _pre_fwd(call, given | {"x": new["x_new"]})


def _head_fwd(call: Call, given: Values) -> Values:
    config, x = _config(call), _wide(given["x"])
    m, r = reference.projection(x, _rows(given["phi"]), config)
    h_pre = head_gate(m, given) + config.pre_eps
    return {"u": reference.weighted_sum(h_pre, x).astype(given["x"].dtype), "m": m, "r": r}


def _collapse_fwd(call: Call, given: Values) -> Values:
    x = given["x"]
    return {"u": reference.weighted_sum(given["h_pre"], _wide(x)).astype(x.dtype)}


def _sinkhorn_fwd(call: Call, given: Values) -> Values:
    return {"h_res": reference.sinkhorn(given["z"], config=_config(call))}


# ---- backward -----------------------------------------------------------------------------------


def _pre_bwd(call: Call, given: Values) -> Values:
    config, x = _config(call), _wide(given["x"])
    n, d_u = x.shape[-2], _wide(given["d_u"])
    made: Values = {}
    given = given | {name: varying_like(given[name], x) for name in ("m", "r") if name in given}
    z = logits(given, n)
    h_pre = given.get("h_given", jax.nn.sigmoid(z[..., :n]) + config.pre_eps)
    if "norm_scale" in given:
        # Of u before its norm, and of the norm's parameter.
        u, rho = reference.weighted_sum(h_pre, x), given["rho"]
        w_d_u = reference.for_tokens(given["norm_scale"], d_u) * d_u
        made["d_norm_scale"] = _sum_tokens(d_u * (rho * u))
        dot = jnp.mean(w_d_u * u, -1, keepdims=True)
        d_u = rho * w_d_u - rho**3 * dot * u
    d_h_pre, dots = given["d_h_pre"], _dots(x, d_u)
    if "h_given" in given:
        made["d_h_given"] = dots
    else:
        d_h_pre = d_h_pre + dots

    def inner_product(z: jax.Array) -> jax.Array:
        h = _coefficients(z, n, config)
        d_h = d_h_pre, given["d_h_post"], given["d_h_res"]
        return functools.reduce(jnp.add, (jnp.sum(a * b) for a, b in zip(h, d_h, strict=True)))

    d_z = jax.grad(inner_product)(z)
    d_x = _wide(given["d_x_in"])
    if call.attribute("deferred"):
        d_x = reference.mix(jnp.swapaxes(given["h_res"], -1, -2), d_x)
    d_x = d_x + h_pre[..., None] * d_u[..., None, :]
    if "phi" in given:
        m = given["m"]
        groups = jnp.split(_sum_tokens(d_z * m), (n, 2 * n))[: given["alpha"].size]
        made["d_alpha"] = jnp.stack([jnp.sum(group) for group in groups])
        d_m = reference.for_tokens(reference.gates(given["alpha"], n, m.shape[-1]), m) * d_z
        from_m, made["d_phi"] = _project_back(x, given, config, d_m)
        d_x = d_x + from_m
    return made | {"d_x": d_x.astype(given["x"].dtype), "d_bias": _sum_tokens(d_z)}


def _post_bwd(call: Call, given: Values) -> Values:
    x, y, d_x_new = (_wide(given[name]) for name in ("x", "y", "d_x_new"))
    d_y = reference.weighted_sum(given["h_post"], d_x_new)
    d_h_res = jnp.einsum("...ic,...jc->...ij", d_x_new, x, precision=jax.lax.Precision.HIGHEST)
    return {"d_y": d_y.astype(given["y"].dtype), "d_h_post": _dots(d_x_new, y), "d_h_res": d_h_res}


def _post_pre_bwd(call: Call, given: Values) -> Values:
    of_next = {"h_res": given["h_res_new"], "d_x_in": given["d_x_new_in"]}
    of_pre = _pre_bwd(call, given | {"x": _post_fwd(call, given)["x_new"]} | of_next)
    d_x_new = of_pre.pop("d_x")
    return of_pre | {"d_x_new": d_x_new} | _post_bwd(call, given | {"d_x_new": d_x_new})


def _head_bwd(call: Call, given: Values) -> Values:
    config, x, m, d_u = _config(call), _wide(given["x"]), given["m"], _wide(given["d_u"])
    gate = head_gate(m, given)
    d_z = _dots(x, d_u) * gate * (1 - gate)
    alpha = reference.for_tokens(given["alpha"], m)
    from_m, d_phi = _project_back(x, given, config, alpha * d_z)
    d_x = (gate + config.pre_eps)[..., None] * d_u[..., None, :] + from_m
    return {
        "d_x": d_x.astype(given["x"].dtype),
        "d_phi": d_phi,
        "d_alpha": jnp.sum(d_z * m).reshape(1),
        "d_bias": _sum_tokens(d_z),
    }


def _collapse_bwd(call: Call, given: Values) -> Values:
    return {"d_h_pre": _dots(_wide(given["x"]), _wide(given["d_u"]))}


def _sinkhorn_bwd(call: Call, given: Values) -> Values:
    project = functools.partial(reference.sinkhorn, config=_config(call))
    _, pullback = jax.vjp(project, given["z"])
    return {"d_z": pullback(given["d_h_res"])[0]}


_PROGRAMS: dict[str, Callable[[Call, Values], Values]] = {
    "pre_fwd": _pre_fwd,
    "pre_bwd": _pre_bwd,
    "post_fwd": _post_fwd,
    "post_bwd": _post_bwd,
    "post_pre_fwd": _post_pre_fwd,
    "post_pre_bwd": _post_pre_bwd,
    "sinkhorn_fwd": _sinkhorn_fwd,
    "sinkhorn_bwd": _sinkhorn_bwd,
    "head_fwd": _head_fwd,
    "head_bwd": _head_bwd,
    "collapse_fwd": _collapse_fwd,
    "collapse_bwd": _collapse_bwd,
}


# ---- parts --------------------------------------------------------------------------------------


def _config(call: Call) -> MHCConfig:
    assert call.config is not None
    return call.config


def _wide(array: jax.Array) -> jax.Array:
    """An array in the accumulation dtype."""
    return array.astype(accumulation_dtype(array.dtype))


def _coefficients(
    z: jax.Array, n: int, config: MHCConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    project = functools.partial(reference.sinkhorn, config=config)
    return reference.coefficients(z, n, config, project)


def head_gate(m: jax.Array, given: Values) -> jax.Array:
    """The weights of the streams in the head, without pre_eps: sigmoid(alpha · m + bias)."""
    alpha, bias = (reference.for_tokens(given[name], m) for name in ("alpha", "bias"))
    return jax.nn.sigmoid(alpha * m + bias)


def _normalized(u: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The RMSNorm of u, and rho `[..., 1]`."""
    rho = jax.lax.rsqrt(jnp.mean(jnp.square(u), -1, keepdims=True) + eps)
    return reference.for_tokens(scale, u) * (rho * u), rho


def _rows(phi: jax.Array) -> jax.Array:
    """A phi `[n, C, K]` as the reference has it, `[n*C, K]`."""
    return phi.reshape(phi.shape[0] * phi.shape[1], phi.shape[2])


def _project_back(
    x: jax.Array, given: Values, config: MHCConfig, d_m: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of x and phi through m = r · (vec(x) phi)."""
    highest = jax.lax.Precision.HIGHEST
    phi, m, r = _rows(given["phi"]), given["m"], given["r"]
    width = math.prod(x.shape[-2:])
    flat, r_d_m = x.reshape(*x.shape[:-2], width), r[..., None] * d_m
    tokens = tuple(range(r.ndim))
    d_phi = jax.lax.dot_general(flat, r_d_m, (((tokens), (tokens)), ((), ())), precision=highest)
    # r depends on x, too: the term of the norm.
    factor = r * jnp.sum(d_m * m, -1) / width
    if config.norm_eps_mode == "inside":
        factor = r * factor
    else:
        square = jnp.mean(jnp.square(x), (-2, -1))
        factor = jnp.where(square > 0, factor * jax.lax.rsqrt(jnp.maximum(square, 1e-300)), 0)
    d_x = jnp.matmul(r_d_m, phi.T, precision=highest).reshape(x.shape)
    return d_x - factor[..., None, None] * x, d_phi.reshape(given["phi"].shape)


def _dots(x: jax.Array, u: jax.Array) -> jax.Array:
    """The inner products <x[i], u> over the channels: [..., n, C] and [..., C] -> [..., n]."""
    return jnp.sum(x * u[..., None, :], -1)


def _sum_tokens(values: jax.Array) -> jax.Array:
    return jnp.sum(values, tuple(range(values.ndim - 1)))
