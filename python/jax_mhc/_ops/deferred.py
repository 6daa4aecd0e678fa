"""The deferred cotangent of a context's streams.

post makes X'[i] = Σ_j h_res[i, j] X[j] + h_post[i] · y, so the gradient of X from it is H_resᵀ G
with G = d_X'. Were post's backward to write that, pre's backward would read it again: twice n·C
values a token. Instead post's backward passes G on as it is, and pre's backward applies H_resᵀ.

`Context._deferred` carries G: it holds X like `Context.x`, and its cotangent is, by convention, G.
All of it is linear, so G may be a sum over several posts. The cotangent of the public x is what it
says. pre's backward takes either, and JAX reports which of the two is zero while it traces.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jax_mhc import reference
from jax_mhc._call import Values, first_order
from jax_mhc._check import accumulation_dtype
from jax_mhc._types import Context
from jax_mhc.reference import mix

Cotangent: TypeAlias = jax.Array | SymbolicZero


def streams(ctx: Context) -> tuple[bool, jax.Array]:
    """The streams as post reads them, and whether their cotangent is deferred.

    It is not in a context that a user made, or the reference.
    """
    if ctx._deferred is None:
        return False, ctx.x
    return True, ctx._deferred


def gradient(deferred: bool, d_x_new: jax.Array, h_res: jax.Array) -> jax.Array:
    """The cotangent of these streams from that of X'."""
    return d_x_new if deferred else _mix_back(h_res, d_x_new).astype(d_x_new.dtype)


def _mix_back(h_res: jax.Array, g: jax.Array) -> jax.Array:
    """H_resᵀ G in the accumulation dtype."""
    return mix(jnp.swapaxes(h_res, -1, -2), g.astype(accumulation_dtype(g.dtype)))


def d_streams_in(d_ctx: Context, h_res: jax.Array) -> tuple[jax.Array, bool]:
    """The cotangent of streams that pre's backward adds to; and whether it is deferred.

    d_ctx: the cotangent of a context, whose leaves may be symbolic zeros.
    """
    # Types say that a context has arrays; those of cotangents have symbolic zeros beside them.
    d_x: Cotangent = d_ctx.x
    d_deferred: Cotangent | None = d_ctx._deferred
    assert d_deferred is not None
    if isinstance(d_deferred, SymbolicZero):
        return instantiate(d_x), False
    if isinstance(d_x, SymbolicZero):
        return d_deferred, True
    # Somebody beside post reads the streams: rare enough for a pass of its own.
    return (d_x + _mix_back(h_res, d_deferred)).astype(d_x.dtype), False


@jax.custom_vjp
def defer(x: jax.Array, h_res: jax.Array) -> jax.Array:
    """Streams X whose cotangent is deferred, of streams that plain JAX made."""
    return x


def _defer_forward(x: jax.Array, h_res: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, h_res


def _defer_backward(h_res: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    h_res, g = _not_differentiated(h_res, g)
    return _mix_back(h_res, g).astype(g.dtype), jnp.zeros_like(h_res)


defer.defvjp(_defer_forward, _defer_backward)


@jax.custom_vjp
def post_deferred(x: jax.Array, y: jax.Array, h_post: jax.Array, h_res: jax.Array) -> jax.Array:
    """Post in plain JAX, of streams X whose cotangent is deferred."""
    return _plain_post(x, y, h_post, h_res)


def _plain_post(x: jax.Array, y: jax.Array, h_post: jax.Array, h_res: jax.Array) -> jax.Array:
    return reference.post(y, Context(x, h_post, h_post, h_res))


_Operands: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _post_forward(*operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _plain_post(*operands), operands


def _post_backward(operands: _Operands, g: jax.Array) -> _Operands:
    g, x, *others = _not_differentiated(g, *operands)
    return g, *jax.vjp(functools.partial(_plain_post, x), *others)[1](g)


post_deferred.defvjp(_post_forward, _post_backward)


def _not_differentiated(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Operands of a backward pass. The cotangents that it reads X for would not be deferred."""
    return tuple(first_order("as_streams", operand) for operand in operands)


def instantiate(cotangent: Cotangent) -> jax.Array:
    """An array in place of a symbolic zero."""
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def context(x: jax.Array, results: Values) -> Context:
    """The context of streams x with the coefficients that a call gave."""
    return Context._of(x, x, results["h_pre"], results["h_post"], results["h_res"])


def cotangents_of(d_u: Cotangent, d_ctx: Context) -> Values:
    """The cotangents of u and of the coefficients, which a backward call takes."""
    return {
        "d_u": instantiate(d_u),
        "d_h_pre": instantiate(d_ctx.h_pre),
        "d_h_post": instantiate(d_ctx.h_post),
        "d_h_res": instantiate(d_ctx.h_res),
    }
