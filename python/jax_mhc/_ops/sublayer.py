"""A whole sublayer: a layer and its hyper-connection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypedDict, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_mhc._call import Implementation
from jax_mhc._ops.post import post
from jax_mhc._ops.pre import pre
from jax_mhc._ops.streams import Streams
from jax_mhc._types import Context, MHCConfig, MHCParams

Rest = TypeVar("Rest")


class Options(TypedDict):
    """Keyword arguments that `pre` and `post_pre` have in common; see `pre`."""

    config: MHCConfig
    norm_scale_eps: float
    hidden_axis_name: str | Sequence[str] | None
    implementation: Implementation


@dataclasses.dataclass(frozen=True, eq=False)
class Sublayer(Generic[Rest]):
    """A layer and its hyper-connection (equation 3).

        u, ctx  = pre(x, params)
        y, rest = layer(u)
        x_new   = post(y, ctx)              or left to the next sublayer

    Attributes:
        layer: from u to y, of the streams' dtype and both `[..., C]`, and what else there is.
        params: its parameters.
        norm_scale: of the norm that the layer begins with, or None.
        options: those of the ops.
    """

    layer: Callable[[jax.Array], tuple[jax.Array, Rest]]
    params: MHCParams
    norm_scale: jax.Array | None
    options: Options

    def until_post(self, before: jax.Array | Streams) -> tuple[jax.Array, Context, Rest]:
        """The operands of the sublayer's post, and the rest of what the layer returned.

        before: the streams.
        """
        u, ctx = pre(before, self.params, norm_scale=self.norm_scale, **self.options)
        y, rest = self.layer(u)
        return checkpoint_name(y, "mhc_layer_output"), ctx, rest

    def run(self, x: jax.Array | Streams) -> tuple[jax.Array | Streams, Context, Rest]:
        """The new streams, the context, and the rest of what the layer returned."""
        y, ctx, rest = self.until_post(x)
        if isinstance(x, Streams):
            return Streams.after(y, ctx, x.is_deferred), ctx, rest
        return post(y, ctx, implementation=self.options["implementation"]), ctx, rest
