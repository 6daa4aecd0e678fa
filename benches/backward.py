"""The backward passes of post, pre and the seam by themselves.

Inside a chain of sublayers the gradient of X is handed back as G, the gradient of the X' that post
makes of it, before the transposed h_res is applied (docs/architecture.md). Each pass here takes and
returns what it takes and returns there:

- post_bwd: from d_x_new to d_y, d_h_post and d_h_res;
- pre_bwd: from d_u, the gradients of the coefficients and G to d_x and those of the parameters;
- post_pre_bwd: the same for x_new, then post's of the sublayer before.
- post_pre_given_bwd: the same where the weights of the streams in u are given, and their gradient.

They come in two steps: `keep` runs the forward pass and returns what the backward pass needs, `run`
is the backward pass. For the fused kernels these are their calls, for any other module with
`pre` and `post` they are `jax.vjp` of these; all compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp

from jax_mhc import MHCParams
from jax_mhc._call import Settings, use_fused
from jax_mhc._ops.fused_op import fused_call
from jax_mhc._types import Context
from jax_mhc.presets import PAPER


class Pass(NamedTuple):
    """A backward pass.

    Attributes:
        keep: from the op's inputs by name to the results of its forward pass by name, and what is
            kept.
        run: from what is kept and the gradients of the results to the gradients of the inputs.
    """

    keep: Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]
    run: Callable[[Any, dict[str, Any]], dict[str, Any]]


def passes(ops: Any, rounded: Any = None) -> dict[str, Pass]:
    """The passes of `ops`, which are `common.FUSED` or a module.

    With `rounded`, a dtype, what the kernels hand from one half of the seam to the other is rounded
    to it, although the module computes in a wider one.
    """
    if ops is common.FUSED:
        use_fused("backward", "fused", jnp.dtype("bfloat16"))  # makes the kernels known to XLA
        return {
            name: Pass(functools.partial(_keep_fused, name), functools.partial(_run_fused, name))
            for name in _KEPT
        }
    run_seam = functools.partial(_run_seam, rounded)
    return {
        "post_bwd": Pass(functools.partial(_keep_post, ops), _run_post),
        "pre_bwd": Pass(functools.partial(_keep_pre, ops), _run_pre),
        "post_pre_bwd": Pass(functools.partial(_keep_seam, ops, rounded, False), run_seam),
        "post_pre_given_bwd": Pass(functools.partial(_keep_seam, ops, rounded, True), run_seam),
    }


def gradients(backward: Pass, named: dict[str, Any], cotangents: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward pass in one program: the results of both."""
    results, kept = backward.keep(named)
    # Where the rest of the model would be.
    results, kept, cotangents = jax.lax.optimization_barrier((results, kept, cotangents))
    return results | backward.run(kept, cotangents)


# ---- the fused kernels --------------------------------------------------------------------------

# Operands of the calls of docs/calls.md, in order, before the gradients.
_POST, _PRE = Settings(fused=True), Settings(PAPER, norm_scale_eps=0.0, fused=True)
_KEPT = {
    "post_bwd": "x y h_post h_res",
    "pre_bwd": "x phi alpha bias m r h_res",
    "post_pre_bwd": "x y h_post h_res phi alpha bias m r h_res_new",
    "post_pre_given_bwd": "x y h_post h_res phi alpha bias m r h_given h_res_new",
}
_COTANGENTS = {
    "post_bwd": "d_x_new",
    "pre_bwd": "d_u d_h_pre d_h_post d_h_res d_x_new",
    "post_pre_bwd": "d_u d_h_pre d_h_post d_h_res d_x_new",
    "post_pre_given_bwd": "d_u d_h_pre d_h_post d_h_res d_x_new",
}


def _call(name: str) -> str:
    """The call of a pass."""
    return name.replace("_given", "")


def _keep_fused(name: str, named: dict[str, Any]) -> Any:
    x, ctx, params = (named.get(key) for key in ("x", "ctx", "params"))
    if name == "pre_bwd":
        operands = {"x": x}
    else:
        operands = {"x": ctx.x, "y": named["y"], "h_post": ctx.h_post, "h_res": ctx.h_res}
    if name == "post_bwd":
        return fused_call("post_fwd", _POST, operands), operands
    operands |= {"phi": params.phi, "alpha": params.alpha, "bias": params.bias}
    if name == "post_pre_given_bwd":
        operands["h_given"] = named["h_given"]
    results = fused_call(_call(name).replace("_bwd", "_fwd"), _PRE, operands)
    kept = {key: results.pop(key) for key in ("m", "r")}
    kept["h_res" if name == "pre_bwd" else "h_res_new"] = results["h_res"]
    return results, operands | kept


def _run_fused(name: str, kept: Any, cotangents: dict[str, Any]) -> dict[str, Any]:
    given = {key: cotangents[key] for key in _COTANGENTS[name].split()}
    if name == "post_bwd":
        return fused_call(name, _POST, kept | given)
    # Calls have a name of its own for the cotangent that they add to: d_x_in or d_x_new_in.
    added_to = "d_x_in" if name == "pre_bwd" else "d_x_new_in"
    given[added_to] = given.pop("d_x_new")
    return fused_call(_call(name), _PRE, kept | given, deferred=True)


# ---- plain JAX ----------------------------------------------------------------------------------


def _keep_post(ops: Any, named: dict[str, Any]) -> Any:
    ctx = named["ctx"]

    def post(y: jax.Array, h_post: jax.Array, h_res: jax.Array) -> jax.Array:
        return ops.post(y, Context(ctx.x, ctx.h_pre, h_post, h_res))

    x_new, vjp = jax.vjp(post, named["y"], ctx.h_post, ctx.h_res)
    return {"x_new": x_new}, vjp


def _run_post(vjp: Any, cotangents: dict[str, Any]) -> dict[str, Any]:
    d_y, d_h_post, d_h_res = vjp(cotangents["d_x_new"])
    return {"d_y": d_y, "d_h_post": d_h_post, "d_h_res": d_h_res}


def _keep_pre(ops: Any, named: dict[str, Any], *given: jax.Array) -> Any:
    def pre(x: jax.Array, params: MHCParams, *given: jax.Array) -> Any:
        options = {"h_pre": given[0]} if given else {}
        u, ctx = ops.pre(x, params, **options)
        return u, x, ctx.h_pre, ctx.h_post, ctx.h_res

    (u, _, h_pre, h_post, h_res), vjp = jax.vjp(pre, named["x"], named["params"], *given)
    return {"u": u, "h_pre": h_pre, "h_post": h_post, "h_res": h_res}, (vjp, h_res)


def _run_pre(kept: Any, cotangents: dict[str, Any]) -> dict[str, Any]:
    vjp, h_res = kept
    g = cotangents["d_x_new"]
    wide = [g[:, i].astype(h_res.dtype) for i in range(g.shape[1])]
    mixed = [
        sum(h_res[:, i, j, None] * stream for i, stream in enumerate(wide)).astype(g.dtype)
        for j in range(len(wide))
    ]
    given = (cotangents[f"d_{key}"] for key in ("h_pre", "h_post", "h_res"))
    d_x, d_params, *d_given = vjp((cotangents["d_u"], jnp.stack(mixed, 1), *given))
    return {
        "d_x": d_x, "d_phi": d_params.phi, "d_alpha": d_params.alpha, "d_bias": d_params.bias,
        **dict(zip(["d_h_given"], d_given, strict=False)),
    }  # fmt: skip


def _keep_seam(ops: Any, rounded: Any, is_given: bool, named: dict[str, Any]) -> Any:
    results, of_post = _keep_post(ops, named)
    x_new = _round(results["x_new"], rounded)
    given = [named["h_given"]] if is_given else []
    coefficients, of_pre = _keep_pre(ops, {"x": x_new, "params": named["params"]}, *given)
    return results | coefficients, (of_post, of_pre)


def _run_seam(rounded: Any, kept: Any, cotangents: dict[str, Any]) -> dict[str, Any]:
    of_post, of_pre = kept
    results = _run_pre(of_pre, cotangents)
    d_x_new = results.pop("d_x")
    behind = _run_post(of_post, {"d_x_new": _round(d_x_new, rounded)})
    return {"d_x_new": d_x_new, **results, **behind}


def _round(array: jax.Array, dtype: Any) -> jax.Array:
    return array if dtype is None else array.astype(dtype).astype(array.dtype)
