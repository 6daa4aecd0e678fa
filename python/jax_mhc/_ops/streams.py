"""Streams that carry the post of their last sublayer, for the next sublayer to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jax_mhc import _check, _errors, reference
from jax_mhc._axes import varying_like
from jax_mhc._call import Implementation, configuration_of, reverse_mode_only, use_fused
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
# Structures of Streams by whether the cotangent of X is deferred, in the words of JAX's error where
# two of them meet in a loop or a branch.
_MADE_FOR = {True: "made for the fused ops", False: "made for implementation='reference'"}

# Methods that Python's operators call, and how the operators are written.
_OPERATORS = {
    f"__{name}__": text
    for name, text in {
        **{"lt": "x < y", "le": "x <= y", "gt": "x > y", "ge": "x >= y"},
        **{"eq": "x == y", "ne": "x != y", "neg": "-x", "pos": "+x", "invert": "~x"},
        **{"abs": "abs(x)", "round": "round(x)", "bool": "bool(x)", "float": "float(x)"},
        **{"int": "int(x)", "complex": "complex(x)", "len": "len(x)", "iter": "iter(x)"},
        **{"divmod": "divmod(x, y)", "rdivmod": "divmod(y, x)", "contains": "y in x"},
    }.items()
} | {
    f"__{side}{name}__": f"{x} {sign} {y}"
    for side, x, y in (("", "x", "y"), ("r", "y", "x"))
    for name, sign in {
        **{"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%"},
        **{"matmul": "@", "pow": "**", "and": "&", "or": "|", "xor": "^"},
        **{"lshift": "<<", "rshift": ">>"},
    }.items()
}


@jax.tree_util.register_pytree_with_keys_class
class Streams:
    """The residual streams X' `[..., n, C]` between two sublayers; a pytree.

        X'[i] = Σ_j h_res[i, j] X[j] + h_post[i] · y

    X' is not computed: the streams hold X, and y and the coefficients of the last sublayer. The
    next `mhc_residual` runs that post together with its own pre (`post_pre`), in one pass over the
    streams and not two. In a loop, a scan or a chain of modules the structure stays what `expand`
    or `as_streams` made it; what begins as an array stays one.

    `x.array()` gives X' as an array; `x.shape`, `x.dtype` and `x.streams` (n) tell of it without
    computing. `x[index]` and `x.reshape(*tokens)` act on the leading dimensions, those of tokens,
    and `x.map_tokens` does on each part what it is told. Streams are no array: arithmetic and the
    functions of `jax.numpy` are refused, as they would have to act on X'.

    Differentiable as `post` is. The leaves of a gradient with respect to Streams belong together
    and are no gradients of X; differentiate with respect to an array for those.
    """

    __slots__ = ("_deferred", "_first", "_h_post", "_h_pre", "_h_res", "_of_channels", "_x", "_y")

    _x: jax.Array
    _y: jax.Array
    _h_pre: jax.Array
    _h_post: jax.Array
    _h_res: jax.Array
    _deferred: bool
    # Whether there is no sublayer before these: `pre` and `array` then take X itself. Loops forget
    # it: it is no part of the pytree, which has one structure before and after a sublayer.
    _first: bool
    # Whether the sublayer before is of form "channels", whose h_pre they do not carry. Loops forget
    # it, too.
    _of_channels: bool

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Refuses: Streams come of `as_streams`."""
        raise Refusal(TypeError, "Streams", "Streams(...)").expected(
            "a call of jax_mhc.expand or jax_mhc.as_streams",
            "a call of the class",
            "Make streams of an array [..., n, C] with jax_mhc.as_streams(x).",
        )

    @classmethod
    def _of(
        cls,
        leaves: Iterable[Any],
        deferred: bool,
        first: bool = False,
        of_channels: bool = False,
    ) -> Streams:
        """Streams of their parts. deferred: whether the cotangent of X is (_ops/deferred.py)."""
        self = object.__new__(cls)
        self._x, self._y, self._h_pre, self._h_post, self._h_res = leaves
        self._deferred, self._first, self._of_channels = deferred, first, of_channels
        return self

    def _with(self, leaves: Iterable[Any]) -> Streams:
        """The same streams of other parts."""
        return self._of(leaves, self._deferred, self._first, self._of_channels)

    @classmethod
    def after(cls, y: jax.Array, ctx: Context, deferred: bool) -> Streams:
        """Streams after a sublayer: the context of its pre, and the layer's output."""
        if ctx.h_post.ndim == ctx.x.ndim:
            # Streams carry an h_post of streams, and this one is of channels.
            return cls._before(post(y, ctx), (), deferred, of_channels=True)
        if not deferred:
            x = ctx.x
        elif ctx._deferred is not None:
            x = ctx._deferred
        else:
            x = defer(*reverse_mode_only("as_streams", ctx.x, ctx.h_res))
        return cls._of((x, y, ctx.h_pre, ctx.h_post, ctx.h_res), deferred)

    @classmethod
    def _before(
        cls,
        x: jax.Array,
        hidden_axes: tuple[str, ...],
        deferred: bool,
        h_pre: jax.Array | None = None,
        *,
        of_channels: bool = False,
    ) -> Streams:
        """Streams x as they are, with no sublayer before them, or after one with this h_pre."""
        y, h_post, h_res = no_sublayer(x, hidden_axes)
        if h_pre is None:
            first = jax.nn.one_hot(0, x.shape[-2], dtype=h_post.dtype)
            h_pre = jnp.broadcast_to(first, h_post.shape)
        parts = x, y, of_tokens(h_pre, x, hidden_axes), h_post, h_res
        return cls._of(parts, deferred, True, of_channels)

    def varying_like(self, others: Tree, hidden_axes: tuple[str, ...]) -> Streams:
        """Streams that vary over the mesh axes that they or others vary over."""
        leaves = jax.tree.leaves(others)
        x, y = (varying_like(part, self._x, *leaves) for part in (self._x, self._y))
        coefficients = self._h_pre, self._h_post, self._h_res
        of_all = (of_tokens(h, x, hidden_axes) for h in coefficients)
        return self._with((x, y, *of_all))

    def pending(self) -> tuple[jax.Array, Context]:
        """The first operands of `post` and of `post_pre`.

        Raises:
            ValueError: parts that do not belong together.
        """
        self.check_parts()
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
        if self._first:
            use_fused("post", implementation, self.dtype)  # which checks it
            return _check.streams("post", "x", self._x)
        if self._deferred:
            of_x = configuration_of(self._x)
            if not use_fused("post", implementation, self.dtype, configuration=of_x):
                return self.plain_array()
        return post(y, ctx, implementation=implementation)

    def plain_array(self) -> jax.Array:
        """X' by post in plain JAX, whatever the streams were made for."""
        y, ctx = self.pending()
        if not self._deferred:
            return reference.post(y, ctx)
        x, others = reverse_mode_only("as_streams", self._x, (y, ctx.h_post, ctx.h_res))
        return post_deferred(x, *others)

    def check_parts(self) -> None:
        """Checks that the parts belong together, whatever `jax.tree.map` made of them.

        Raises:
            ValueError: they do not.
        """
        parts = self.tree_flatten()[0]
        if all(hasattr(part, "shape") for part in parts) and self._x.ndim >= 2:
            *_, n, hidden = self._x.shape
            tokens, others = self._shapes(parts)
            wide = _check.accumulation_dtype(self._x.dtype)
            dtypes = [part.dtype for part in parts]
            if (
                len(tokens) == 1
                and others == (n, hidden, hidden, n, n, n, n)
                and dtypes == [self._x.dtype] * 2 + [wide] * 3
            ):
                return
        raise Refusal(ValueError, "Streams", "parts").expected(
            "arrays that belong together, as jax_mhc made them",
            self._shown(parts),
            "Move tokens by x[index], x.reshape and x.map_tokens; for anything else take x.array() "
            "and, of its result, jax_mhc.as_streams.",
        )

    @property
    def is_first(self) -> bool:
        """Whether no sublayer is known to be before these streams, so that `array` is free."""
        return self._first

    @property
    def is_deferred(self) -> bool:
        """Whether the cotangent of X is deferred, as the fused ops do it."""
        return self._deferred

    @property
    def h_pre(self) -> jax.Array:
        """h_pre of the last sublayer `[..., n]`, with which the delayed schedule goes on.

        Before the first sublayer it is 1 for stream 0 and 0 for all others.

        Raises:
            ValueError: the last sublayer is of form "channels". Its h_pre has a value for each
                channel, which streams do not carry; where a loop or `jax.jit` has handed them on,
                they are as before the first sublayer.
        """
        if self._of_channels:
            raise Refusal(ValueError, "Streams", "h_pre").expected(
                "a last sublayer whose h_pre has one weight for each stream",
                "one of form 'channels'",
                "Neither the delayed schedule nor collapse goes on from it: give weights, h_pre=.",
            )
        return self._h_pre

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
            ValueError: parts whose tokens differ afterwards, or whose other dimensions or dtypes
                changed.
            TypeError: no function of an array, or no array of it.
        """
        op, remedy = "Streams.map_tokens", "Let it act on leading dimensions: lambda part: part[0]."
        _errors.function(op, "function", function, "a function of an array", remedy)
        before = self.tree_flatten()[0]
        parts = [_check.call(op, "function", "one array", function, part) for part in before]
        if not all(hasattr(part, "shape") for part in parts):
            got = self._shown(parts)
            raise Refusal(TypeError, op, "function").expected("one that gives arrays", got, remedy)
        (_, *was), (tokens, *now) = self._shapes(before), self._shapes(parts)
        same_dtypes = all(a.dtype == b.dtype for a, b in zip(before, parts, strict=True))
        if now != was or len(tokens) > 1 or not same_dtypes:
            raise Refusal(ValueError, op, "function").expected(
                "a function that moves tokens alone, alike in all parts", self._shown(parts), remedy
            )
        return self._with(parts)

    @staticmethod
    def _shapes(parts: Sequence[jax.Array]) -> tuple[set[tuple[int, ...]], tuple[int, ...]]:
        """The dimensions of tokens that the parts have, and all others."""
        tokens: set[tuple[int, ...]] = set()
        others: list[int] = []
        for part, rank in zip(parts, _RANKS, strict=True):
            num = max(part.ndim - rank, 0)
            tokens.add(part.shape[:num])
            others += part.shape[num:]
        return tokens, tuple(others)

    @staticmethod
    def _shown(parts: Sequence[Any]) -> str:
        """Parts in a message."""
        texts = (
            f"{part.dtype.name}{list(part.shape)}" if hasattr(part, "shape") else typed(part)
            for part in parts
        )
        return f"parts {', '.join(texts)}"

    def __getitem__(self, index: object) -> Streams:
        """Streams of some tokens: an index of leading dimensions."""
        num = self.ndim - 2
        indices = index if isinstance(index, tuple) else (index,)
        # A mask stands for as many dimensions as it has.
        used = sum(
            each.ndim if hasattr(each, "dtype") and each.dtype == np.bool_ else 1
            for each in indices
            if each is not None
        )
        if used > num or any(isinstance(each, EllipsisType | Streams) for each in indices):
            raise Refusal(ValueError, "Streams", "index").expected(
                f"one of the {num} leading dimensions",
                typed(index),
                "Take the array for streams and channels: x.array()[...].",
            )
        return self.map_tokens(lambda part: part[index])

    def reshape(self, *tokens: int | Sequence[int]) -> Streams:
        """Streams with other leading dimensions of as many tokens: `x.reshape(batch * length)`.

        Args:
            tokens: their sizes, of which one may be -1; or one sequence of these.

        Raises:
            ValueError: sizes of another number of tokens.
        """
        sizes = tokens[0] if len(tokens) == 1 and isinstance(tokens[0], Sequence) else tokens
        try:
            return self._with(
                part.reshape(*sizes, *part.shape[part.ndim - rank :])
                for part, rank in zip(self.tree_flatten()[0], _RANKS, strict=True)
            )
        except (TypeError, ValueError) as error:
            raise Refusal(ValueError, "Streams.reshape", "tokens").expected(
                f"sizes of leading dimensions that hold the tokens {list(self.shape[:-2])}",
                typed(tokens),
                f"The last dimensions, {list(self.shape[-2:])}, stay: leave them out.",
            ) from error

    def __repr__(self) -> str:
        """Dtype and shape; or the parts where these are no arrays, as in a tree of specs."""
        parts = self.tree_flatten()[0]
        if all(hasattr(part, "shape") for part in parts):
            return f"Streams({self._x.dtype.name}{list(self.shape)})"
        return f"Streams{parts}"

    def _refuse(self, what: str) -> NoReturn:
        raise Refusal(TypeError, "Streams", what).expected(
            "an array",
            repr(self),
            "Take x.array() for what arrays do; mhc_residual(layer, x, params) adds layer(u).",
        )

    @property
    def __jax_array__(self) -> NoReturn:
        # No method: where JAX only asks whether there is one, it would then give an error of its
        # own, without the remedy.
        self._refuse("operand")

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("operand")

    if not TYPE_CHECKING:  # where it would stand for attributes of any name

        def __getattr__(self, name: str) -> NoReturn:
            """Refuses what arrays have and Streams do not."""
            if name.startswith("_") or name in dir(Streams) or not hasattr(jax.Array, name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise Refusal(AttributeError, "Streams", f"x.{name}").expected(
                "an array", repr(self), f"Take x.array().{name}."
            )

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], str]:
        """For JAX."""
        parts = self._x, self._y, self._h_pre, self._h_post, self._h_res
        return parts, _MADE_FOR[self._deferred]

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[object, object], ...], str]:
        """For JAX."""
        leaves, made_for = self.tree_flatten()
        key = jax.tree_util.GetAttrKey
        return tuple((key(n), leaf) for n, leaf in zip(_NAMES, leaves, strict=True)), made_for

    @classmethod
    def tree_unflatten(cls, made_for: str, leaves: Iterable[Any]) -> Streams:
        """For JAX."""
        return cls._of(leaves, made_for == _MADE_FOR[True])


def _refusing(text: str) -> Callable[..., NoReturn]:
    """An operator that is refused as `text`."""

    def refuse(self: Streams, *args: object) -> NoReturn:
        self._refuse(text)

    return refuse


for _name, _text in _OPERATORS.items():
    setattr(Streams, _name, _refusing(_text))


jax.export.register_pytree_node_serialization(
    Streams,
    serialized_name="jax_mhc.Streams",
    serialize_auxdata=lambda made_for: b"1" if made_for == _MADE_FOR[True] else b"0",
    deserialize_auxdata=lambda text: _MADE_FOR[text == b"1"],
)


def as_streams(
    x: Float[jax.Array, "*tokens n C"] | Streams,
    *,
    h_pre: Float[jax.Array, "*tokens n"] | None = None,
    hidden_axis_name: str | Sequence[str] | None = None,
    implementation: Implementation = None,
) -> Streams:
    """Streams of an array, before the first sublayer.

    The post that they carry gives the array back exactly: X = x, y = 0, h_post = 0, h_res = I.

    Args:
        x: the streams `[..., n, C]`, or Streams, which are returned as they are.
        h_pre: the weights `[..., n]` that the next sublayer of the delayed schedule takes, where
            the array has left Streams amid the sublayers: their `h_pre`. None: stream 0 alone.
        hidden_axis_name: the mesh axes over which C is split inside `jax.shard_map`; see `pre`.
        implementation: that of the sublayers to come; see `pre`. With "reference" all of it is
            plain JAX, differentiable in every mode; sublayers of another implementation give the
            same values and gradients.

    Returns:
        The streams.

    Raises:
        ValueError, TypeError, RuntimeError: x that is no streams; h_pre beside Streams, which carry
            their own; what `pre` raises.
    """
    op = "as_streams"
    _check.implementation(op, implementation)
    if isinstance(x, Streams):
        if h_pre is not None:
            raise Refusal(ValueError, op, "h_pre").expected(
                "None beside Streams, which carry their own", typed(h_pre), "Leave it out."
            )
        _check.hidden_axes(op, hidden_axis_name, jax.tree.leaves(x)[0])
        return x
    x = _check.streams(op, "x", x)
    if h_pre is not None:
        h_pre = _check.given_weights(op, h_pre, x)
    return first_streams(op, x, hidden_axis_name, implementation, h_pre)


def first_streams(
    op: str,
    x: jax.Array,
    hidden_axis_name: object,
    implementation: Implementation,
    h_pre: jax.Array | None = None,
) -> Streams:
    """Streams x before the first sublayer, or after one with this h_pre."""
    axes = _check.hidden_axes(op, hidden_axis_name, x)
    deferred = use_fused(op, implementation, x.dtype, axes)
    return Streams._before(x, axes, deferred, h_pre)
