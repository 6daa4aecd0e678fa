"""Streams that carry the post of their last sublayer, for the next sublayer to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jax_mhc import _check
from jax_mhc._axes import varying_like
from jax_mhc._call import Implementation, use_fused
from jax_mhc._errors import Refusal, typed
from jax_mhc._mesh.types import of_tokens
from jax_mhc._ops.deferred import defer, post_deferred
from jax_mhc._ops.pending import no_sublayer
from jax_mhc._ops.post import post
from jax_mhc._types import Context, Tree

if TYPE_CHECKING:
    from jaxtyping import Float

_NAMES = ("x", "y", "h_pre", "h_post", "h_res")
# Dimensions of these parts behind those of tokens.
_RANKS = 2, 1, 1, 1, 2


@jax.tree_util.register_pytree_with_keys_class
class Streams:
    """The residual streams X' `[..., n, C]` between two sublayers; a pytree.

        X'[i] = Σ_j h_res[i, j] X[j] + h_post[i] · y

    X' is not computed: the streams hold X, and y and the coefficients of the last sublayer. The
    next `mhc_residual` runs that post together with its own pre (`post_pre`), in one pass over the
    streams and not two. In a loop, a scan or a chain of modules the structure stays what `expand`
    or `as_streams` made it.

    `x.array()` gives X' as an array; `x.shape`, `x.dtype` and `x.streams` (n) tell of it without
    computing. `x[index]` and `x.reshape(*tokens)` act on the leading dimensions, those of tokens,
    and `x.map_tokens` does on each part what it is told. Streams are no array: arithmetic and the
    functions of `jax.numpy` are refused, as they would have to act on X'.

    Differentiable as `post` is. The leaves of a gradient with respect to Streams belong together
    and are no gradients of X; differentiate with respect to an array for those.
    """

    __slots__ = ("_deferred", "_h_post", "_h_pre", "_h_res", "_x", "_y")

    _x: jax.Array
    _y: jax.Array
    _h_pre: jax.Array
    _h_post: jax.Array
    _h_res: jax.Array
    _deferred: bool

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Refuses: Streams come of `as_streams`."""
        raise Refusal(TypeError, "Streams", "Streams(...)").expected(
            "a call of jax_mhc.expand or jax_mhc.as_streams",
            "a call of the class",
            "Make streams of an array [..., n, C] with jax_mhc.as_streams(x).",
        )

    @classmethod
    def _of(cls, leaves: Iterable[Any], deferred: bool) -> Streams:
        """Streams of their parts. deferred: whether the cotangent of X is (_ops/deferred.py)."""
        self = object.__new__(cls)
        self._x, self._y, self._h_pre, self._h_post, self._h_res = leaves
        self._deferred = deferred
        return self

    @classmethod
    def after(cls, y: jax.Array, ctx: Context, deferred: bool) -> Streams:
        """Streams after a sublayer: the context of its pre, and the layer's output."""
        if not deferred:
            x = ctx.x
        elif ctx._deferred is not None:
            x = ctx._deferred
        else:
            x = defer(ctx.x, ctx.h_res)
        return cls._of((x, y, ctx.h_pre, ctx.h_post, ctx.h_res), deferred)

    def varying_like(self, others: Tree, hidden_axes: tuple[str, ...]) -> Streams:
        """Streams that vary over the mesh axes that they or others vary over."""
        leaves = jax.tree.leaves(others)
        x, y = (varying_like(part, self._x, *leaves) for part in (self._x, self._y))
        gates = (self._h_pre, self._h_post, self._h_res)
        of_gates = (of_tokens(gate, x, hidden_axes) for gate in gates)
        return self._of((x, y, *of_gates), self._deferred)

    def pending(self) -> tuple[jax.Array, Context]:
        """The first operands of `post` and of `post_pre`."""
        x = self._x if self._deferred else None
        return self._y, Context._of(self._x, x, self._h_pre, self._h_post, self._h_res)

    def array(self, *, implementation: Implementation = None) -> Float[jax.Array, "*tokens n C"]:
        """X' `[..., n, C]`, by `post`.

        Args:
            implementation: None, "fused" or "reference"; see `pre`. None is plain JAX where the
                streams were made for it.

        Raises:
            ValueError, TypeError, RuntimeError: what `post` raises.
        """
        if implementation is None and not self._deferred:
            implementation = "reference"
        y, ctx = self.pending()
        if self._deferred and not use_fused("post", implementation, self.dtype):
            return post_deferred(self._x, y, ctx.h_post, ctx.h_res)
        return post(y, ctx, implementation=implementation)

    @property
    def is_deferred(self) -> bool:
        """Whether the cotangent of X is deferred, as the fused ops do it."""
        return self._deferred

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., n, C)`."""
        return self._x.shape

    @property
    def ndim(self) -> int:
        """The number of dimensions, those of tokens and two."""
        return self._x.ndim

    @property
    def dtype(self) -> np.dtype:
        """The dtype of X'."""
        return self._x.dtype

    @property
    def streams(self) -> int:
        """The number of streams, n."""
        return self._x.shape[-2]

    def map_tokens(self, function: Callable[[jax.Array], jax.Array]) -> Streams:
        """Streams of moved tokens.

        Args:
            function: what moves or chooses tokens, alike in all parts, each of which has other
                dimensions behind those of tokens: indexing, a constraint of sharding, `jnp.roll`
                along a leading dimension.

        Raises:
            ValueError: parts whose tokens differ afterwards, or whose other dimensions changed.
        """
        parts = [function(part) for part in self.tree_flatten()[0]]
        (_, *was), (tokens, *now) = self._shapes(self.tree_flatten()[0]), self._shapes(parts)
        if now != was or len(tokens) > 1:
            raise Refusal(ValueError, "Streams.map_tokens", "function").expected(
                "a function that moves tokens alone, alike in all parts",
                f"parts {[list(part.shape) for part in parts]}",
                "Let it act on leading dimensions: lambda part: part[0].",
            )
        return self._of(parts, self._deferred)

    @staticmethod
    def _shapes(parts: Sequence[jax.Array]) -> tuple[set[tuple[int, ...]], tuple[int, ...]]:
        """The dimensions of tokens that the parts have, and all others."""
        tokens: set[tuple[int, ...]] = set()
        others: list[int] = []
        for part, rank in zip(parts, _RANKS, strict=True):
            tokens.add(part.shape[: part.ndim - rank])
            others += part.shape[part.ndim - rank :]
        return tokens, tuple(others)

    def __getitem__(self, index: object) -> Streams:
        """Streams of some tokens: an index of leading dimensions."""
        num = self.ndim - 2
        indices = index if isinstance(index, tuple) else (index,)
        used = sum(1 for each in indices if each is not None and each is not Ellipsis)
        if used > num or Ellipsis in [each for each in indices if not hasattr(each, "shape")]:
            raise Refusal(ValueError, "Streams", "index").expected(
                f"one of the {num} leading dimensions",
                typed(index),
                "Take the array for streams and channels: x.array()[...].",
            )
        return self.map_tokens(lambda part: part[index])

    def reshape(self, *tokens: int) -> Streams:
        """Streams with other leading dimensions of as many tokens: `x.reshape(batch * length)`."""
        return self._of(
            (
                part.reshape(*tokens, *part.shape[part.ndim - rank :])
                for part, rank in zip(self.tree_flatten()[0], _RANKS, strict=True)
            ),
            self._deferred,
        )

    def __repr__(self) -> str:
        """Dtype and shape."""
        return f"Streams({self._x.dtype.name}{list(self.shape)})"

    def _refuse(self, what: str) -> NoReturn:
        raise Refusal(TypeError, "Streams", what).expected(
            "an array",
            repr(self),
            "Take x.array() for arithmetic; mhc_residual(layer, x, params) adds a layer's output.",
        )

    def __add__(self, _: object) -> NoReturn:
        self._refuse("x + y")

    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __add__

    def __jax_array__(self) -> NoReturn:
        self._refuse("operand")

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("operand")

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], bool]:
        """For JAX."""
        return (self._x, self._y, self._h_pre, self._h_post, self._h_res), self._deferred

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[object, object], ...], bool]:
        """For JAX."""
        leaves, deferred = self.tree_flatten()
        key = jax.tree_util.GetAttrKey
        return tuple((key(n), leaf) for n, leaf in zip(_NAMES, leaves, strict=True)), deferred

    @classmethod
    def tree_unflatten(cls, deferred: bool, leaves: Iterable[Any]) -> Streams:
        """For JAX."""
        return cls._of(leaves, deferred)


jax.export.register_pytree_node_serialization(
    Streams,
    serialized_name="jax_mhc.Streams",
    serialize_auxdata=lambda deferred: b"1" if deferred else b"0",
    deserialize_auxdata=lambda text: text == b"1",
)


def as_streams(
    x: Float[jax.Array, "*tokens n C"] | Streams,
    *,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
) -> Streams:
    """Streams of an array, before the first sublayer.

    The post that they carry gives the array back exactly: X = x, y = 0, h_post = 0, h_res = I.

    Args:
        x: the streams `[..., n, C]`, or Streams, which are returned as they are.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: that of the sublayers to come; see `pre`. With "reference" all of it is
            plain JAX, differentiable in every mode; sublayers of another implementation give the
            same values and gradients.

    Returns:
        The streams.

    Raises:
        ValueError, TypeError, RuntimeError: x that is no streams; what `pre` raises.
    """
    if isinstance(x, Streams):
        return x
    op = "as_streams"
    return first_streams(op, _check.streams(op, "x", x), hidden_axis_name, implementation)


def first_streams(
    op: str, x: jax.Array, hidden_axis_name: object, implementation: Implementation
) -> Streams:
    """Streams x before the first sublayer."""
    axes = _check.hidden_axes(op, hidden_axis_name, x)
    deferred = use_fused(op, implementation, x.dtype, axes)
    y, h_post, h_res = no_sublayer(x, axes)
    first = jnp.broadcast_to(jax.nn.one_hot(0, x.shape[-2], dtype=h_post.dtype), h_post.shape)
    return Streams._of((x, y, of_tokens(first, x, axes), h_post, h_res), deferred)
