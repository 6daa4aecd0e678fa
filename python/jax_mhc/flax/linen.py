"""Hyper-connections as modules of Flax Linen.

    from jax_mhc.flax.linen import MHC

    x = MHC(Attention(...), C, streams=4)(x)    # in place of x + Attention(...)(x)

`Head` leaves the streams.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

import jax_mhc
from jax_mhc import _module
from jax_mhc._call.dispatch import Implementation
from jax_mhc._ops.streams import Streams
from jax_mhc._types import HeadParams, Layer, MHCConfig, MHCParams
from jax_mhc.presets import PAPER

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["MHC", "Head"]


class MHC(nn.Module):
    """A layer and its manifold-constrained hyper-connection (equation 3).

    The counterpart of `x + layer(x)`: `jax_mhc.mhc_residual` with parameters of its own, which see
    for the equation, dtypes and derivatives. In the collection `params` they are phi `[nC, K]`,
    alpha `[3]` and bias `[K]` (with static the bias alone), and norm_scale `[C]` where there is a
    norm: float32, with the initial values of `jax_mhc.init_params`, and ones. As always in Linen, a
    layer made inside of another module's call keeps its variables there, under its own name.

    h_res `[..., n, n]` is sown into the collection `intermediates`, for `jax_mhc.diagnostics`.

    Attributes:
        layer: a module or function, `layer(u, ...)` with u `[..., C]`, which returns y `[..., C]`
            of u's dtype, or a tuple that begins with it.
        hidden: C.
        streams: n, from 1 to 16.
        config: settings.
        static: coefficients from the bias alone, without phi and alpha.
        norm: u is normalised, by the RMSNorm that layers begin with, in the same kernel; the layer
            should have none of its own then.
        norm_scale_eps: the eps of that norm.
        implementation: None, "fused" or "reference"; see `jax_mhc.pre`.
    """

    layer: Layer
    hidden: int
    streams: int = 4
    config: MHCConfig = PAPER
    static: bool = False
    norm: bool = False
    norm_scale_eps: float = 1e-6
    implementation: Implementation = None

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "*tokens n C"] | Streams, *args: object, **kwargs: object
    ) -> Any:
        """Runs the layer on the streams.

        Args:
            x: the streams `[..., n, C]`.
            *args: handed on to the layer, after u.
            **kwargs: handed on to the layer.

        Returns:
            The new streams `[..., n, C]`, or `Streams` where x is; of a layer that returns
            `(y, *rest)`, `(streams, *rest)`.

        Raises:
            ValueError, TypeError: x that is not streams of the module's n and C; a layer that
                returns another shape or dtype; what `jax_mhc.init_params` and `jax_mhc.pre` raise.
        """
        op = "flax.linen.MHC"
        _module.settings(
            op,
            layer=self.layer,
            static=self.static,
            norm=self.norm,
            norm_scale_eps=self.norm_scale_eps,
            implementation=self.implementation,
        )
        x = _module.streams(op, x, self.streams, self.hidden)
        param = partial(_param, self, jax_mhc.init_params)
        phi, alpha = (None, None) if self.static else (param("phi"), param("alpha"))
        scale = None
        if self.norm:
            scale = self.param("norm_scale", nn.initializers.ones, (self.hidden,), "float32")
        out, h_res = _module.residual(
            op,
            self.layer,
            x,
            MHCParams(phi, alpha, param("bias")),
            args,
            kwargs,
            config=self.config,
            norm_scale=scale,
            norm_scale_eps=self.norm_scale_eps,
            implementation=self.implementation,
        )
        self.sow("intermediates", "h_res", h_res)
        return out


class Head(nn.Module):
    """Leaves the streams by a learned weighted mean, `[..., n, C]` -> `[..., C]`.

    `jax_mhc.head` with parameters of its own, which see: phi `[nC, n]`, alpha `[1]` and bias `[n]`,
    float32, with the initial values of `jax_mhc.init_head`.

    Attributes:
        hidden: C.
        streams: n, from 1 to 16.
        config: settings; those of norm and of h_pre enter.
        implementation: None, "fused" or "reference"; see `jax_mhc.pre`.
    """

    hidden: int
    streams: int = 4
    config: MHCConfig = PAPER
    implementation: Implementation = None

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "*tokens n C"] | Streams
    ) -> Float[jax.Array, "*tokens C"]:
        """Collapses the streams x `[..., n, C]` to `[..., C]`; raises what `MHC` does for them."""
        x = _module.streams("flax.linen.Head", x, self.streams, self.hidden)
        param = partial(_param, self, jax_mhc.init_head)
        params = HeadParams(param("phi"), param("alpha"), param("bias"))
        return jax_mhc.head(x, params, config=self.config, implementation=self.implementation)


def _param(module: MHC | Head, init: Callable[..., Any], name: str) -> jax.Array:
    """Returns one of the values that `init` makes; in Linen each has a key of its own."""
    sizes = {"streams": module.streams, "hidden": module.hidden, "config": module.config}
    return module.param(name, lambda key: getattr(init(key, **sizes), name))
