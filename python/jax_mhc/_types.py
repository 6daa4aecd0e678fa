"""Types that users hold: settings, parameters, and the context from pre to post."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, assert_never, get_args, get_type_hints

import jax
import jax.export

from jax_mhc import _errors
from jax_mhc._limits import MAX_PERMUTED_STREAMS, MAX_SINKHORN_ITERS

if TYPE_CHECKING:
    from jaxtyping import Float

#: A layer: of u `[..., C]` and what else it takes, y `[..., C]` and what else it returns.
Layer: TypeAlias = Callable[..., Any]
#: A pytree of arrays.
Tree: TypeAlias = Any

# The settings that are no integers.
NUMBERS = ("sinkhorn_eps", "norm_eps", "pre_eps", "post_scale", "post_eps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MHCConfig:
    """Settings of one hyper-connection; the defaults are the paper's (arXiv 2512.24880).

    Hashable, so it can be a static argument of `jax.jit`. Published variants are in
    `jax_mhc.presets`. docs/mathematics.md shows where each setting enters.

    Attributes:
        constraint: where H_res lives. ``"birkhoff"``: doubly stochastic matrices, by Sinkhorn-Knopp
            (the paper). ``"none"``: any matrix, H_res = z_res; all else stays as it is in mHC (for
            hyper-connections as published see `form`). ``"identity"``: H_res = I, without
            coefficients for it.
            ``"permutations"``: H_res = Σ_p softmax(z_res)_p P_p over the n! permutation matrices,
            doubly stochastic without iterations (mHC-lite, arXiv 2601.05732), for up to 4 streams.
            Their order is that of `itertools.permutations(range(n))`, the identity first, and
            permutation p has P[i, p[i]] = 1. The settings of Sinkhorn have no meaning then.
        sinkhorn_iters: t_max of equation 9: the number of times that both axes are normalised, 0
            to 10000 (the backward pass holds the matrices of all of them).
            0 leaves exp(z).
        sinkhorn_eps: see `sinkhorn_eps_mode`; 0 is the paper.
        sinkhorn_eps_mode: ``"add"``: after the first softmax eps is added, and every division is
            by (sum + eps). ``"clamp"``: every division is by max(sum, eps).
        order: ``"column_row"``: each iteration divides by the sums over i of h_res[i, j] first, and
            ends with rows that sum to 1, so every new stream is a weighted mean of the old ones.
            ``"row_column"``: the other way round.
        norm_eps: see `norm_eps_mode`.
        norm_eps_mode: ``"inside"``: r = 1 / sqrt(mean(x²) + eps). ``"outside"``:
            r = 1 / (sqrt(mean(x²)) + eps). With 0 a token of zeros gives NaN.
        pre_eps: added to h_pre after the sigmoid.
        post_scale: h_post = post_scale · sigmoid(z_post) + post_eps.
        post_eps: added to h_post after that.
        form: what the coefficients are made of. ``"mhc"``: equations 14 to 19, by kernels where
            there are some. The others are plain JAX. ``"hyper_connections"``: as published in
            arXiv 2409.19606, α · tanh of each stream's own projection (docs/mathematics.md); it
            wants ``constraint="none"``, and the terms and factors of h_pre and h_post as they are
            by default. ``"channels"``: h_pre and h_post have a value for each channel of each
            stream, the same for all tokens, which static parameters hold.
        schedule: whose h_pre a sublayer's input is taken with. ``"immediate"``: its own (the
            paper). ``"delayed"``: that of the sublayer before it, and before the first one stream 0
            alone (DeepSeek-V4.1), for form "mhc". Sublayers then take `Streams`, which carry
            h_pre, and `jax_mhc.collapse` leaves these with the last one.

    The ops refuse numbers that their coefficients cannot hold: for all but float64 streams those
    that are infinity in float32 or, other than 0, below its normal numbers (1.2e-38).

    Raises:
        TypeError, ValueError: a setting of the wrong type or outside its range.
    """

    constraint: Literal["birkhoff", "none", "identity", "permutations"] = "birkhoff"
    sinkhorn_iters: int = 20
    sinkhorn_eps: float = 0.0
    sinkhorn_eps_mode: Literal["add", "clamp"] = "add"
    order: Literal["column_row", "row_column"] = "column_row"
    norm_eps: float = 1e-6
    norm_eps_mode: Literal["inside", "outside"] = "inside"
    pre_eps: float = 0.0
    post_scale: float = 2.0
    post_eps: float = 0.0
    form: Literal["mhc", "hyper_connections", "channels"] = "mhc"
    schedule: Literal["immediate", "delayed"] = "immediate"

    def __post_init__(self) -> None:
        """Checks every setting; stores plain Python values, so that equal configs hash alike."""
        op = "MHCConfig"
        plain: dict[str, object] = {
            field: _errors.choice(op, field, getattr(self, field), of)
            for field, of in WORDS.items()
        }
        plain["sinkhorn_iters"] = _errors.integer(
            op, "sinkhorn_iters", self.sinkhorn_iters, 0, MAX_SINKHORN_ITERS, "The paper uses 20."
        )
        for field in NUMBERS:
            positive = field == "post_scale"
            plain[field] = _errors.number(op, field, getattr(self, field), positive=positive)
        for field, value in plain.items():
            object.__setattr__(self, field, value)
        for field, only in _ONLY[self.form].items():
            if getattr(self, field) != only:
                raise _errors.Refusal(ValueError, op, field).expected(
                    f"{only!r} for form {self.form!r}",
                    repr(getattr(self, field)),
                    f"Pass {field}={only!r}, or take another form.",
                )

    def num_coefficients(
        self,
        streams: int,
        *,
        hidden: int | None = None,
        op: str = "MHCConfig.num_coefficients",
    ) -> int:
        """K, the number of coefficients of a token.

        It is 2n + n², 2n for constraint "identity", and 2n + n! for "permutations"; with 2nC in
        place of 2n for form "channels".

        Args:
            streams: n, from 1 to 16.
            hidden: C, which form "channels" wants to know.
            op: what an error names.

        Raises:
            ValueError, TypeError: streams that are no such number; more than the constraint is for;
                no C where that is wanted.
        """
        streams = _errors.num_streams(op, "streams", streams)
        if self.form == "channels":
            hidden = _errors.width(op, hidden)
        else:
            hidden = 1
        return 2 * streams * hidden + self._num_res(streams, op)

    def _num_res(self, streams: int, op: str) -> int:
        """The number of coefficients that make up H_res."""
        if self.constraint == "identity":
            return 0
        if self.constraint == "permutations":
            if streams > MAX_PERMUTED_STREAMS:
                raise _errors.Refusal(ValueError, op, "config.constraint").expected(
                    f"one for {streams} streams (this one has a coefficient for each of n! "
                    f"permutations, and is for up to {MAX_PERMUTED_STREAMS})",
                    repr(self.constraint),
                    "Take fewer streams, or 'birkhoff'.",
                )
            return math.factorial(streams)
        if self.constraint == "birkhoff" or self.constraint == "none":
            return streams**2
        assert_never(self.constraint)

    def _described(self) -> str:
        """What decides the shapes of parameters, in a message."""
        of_form = "" if self.form == "mhc" else f"form {self.form!r} and "
        return f"{of_form}constraint {self.constraint!r}"

    def _phi_shape(self, streams: int, hidden: int, op: str) -> tuple[int, int]:
        """The shape of phi: its rows are those of all streams, or of one that they share."""
        if self.form == "hyper_connections":
            return hidden, streams + 2
        return streams * hidden, self.num_coefficients(streams, hidden=hidden, op=op)

    def num_gates(self) -> int:
        """The number of gates alpha: 3 of pre, post and res; 2 where res has no coefficients.

        It has none for constraint "identity".
        """
        return 2 if self.constraint == "identity" else 3


# Of each form, the only values of settings that have others elsewhere. The delayed schedule reads
# the streams with one weight for each, which those of channels are not; hyper-connections as
# published have none of what came later.
_ONLY: dict[str, dict[str, object]] = {
    "mhc": {},
    "hyper_connections": {
        "constraint": "none",
        "pre_eps": 0.0,
        "post_scale": 2.0,
        "post_eps": 0.0,
        "schedule": "immediate",
    },
    "channels": {"schedule": "immediate"},
}

#: The words of each setting that has some.
WORDS: dict[str, tuple[str, ...]] = {
    field: get_args(of) for field, of in get_type_hints(MHCConfig).items() if get_args(of)
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MHCParams:
    """The learned parameters of one hyper-connection (equations 14 to 19); a pytree.

    Columns are always ordered pre, post, res; the n² columns of res hold z[i, j] row by row (for
    constraint "permutations" there are n!, one for each in their order). All are float32, or
    float64 where the streams are float64. Static coefficients, from the bias alone, have
    phi = None and alpha = None. Those of form "channels" have 2nC + n² (or 2nC + n!, or 2nC):
    the bias holds the logits of h_pre `[n, C]`, of h_post `[n, C]` and of h_res, each row by row.

    Attributes:
        phi: projection `[nC, K]`, or None; for form "hyper_connections" `[C, n + 2]`, with a column
            for h_pre, one for h_post, and one for each new stream.
        alpha: gates of pre, post and res `[3]`, of pre and post `[2]` where res has no columns
            (constraint "identity"), or None.
        bias: static part `[K]`.
    """

    phi: Float[jax.Array, "n*C K"] | None
    alpha: Float[jax.Array, " A"] | None
    bias: Float[jax.Array, " K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadParams:
    """The learned parameters of the head; a pytree, float32 (float64 for float64 streams).

    Attributes:
        phi: projection `[nC, n]`.
        alpha: gate `[1]`.
        bias: static part `[n]`.
    """

    phi: Float[jax.Array, "n*C n"]
    alpha: Float[jax.Array, " 1"]
    bias: Float[jax.Array, " n"]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Context:
    """Streams and their coefficients, which `pre` hands to `post`; a pytree.

    Any number of `post` and `post_pre` may read a context, or none, and its fields may enter other
    computations; gradients are right in every case. `dataclasses.replace(ctx, h_res=...)` changes
    a field, and `Context(x, h_pre, h_post, h_res)` makes a context by hand.

    A context of the fused ops has one leaf more: the streams once again, for `post` alone. They are
    the same array, which costs nothing, and the backward pass moves fewer bytes. Consequences:

    - Arithmetic on all leaves, such as `jax.tree.map(lambda leaf: 2 * leaf, ctx)`, has no defined
      gradient. What moves tokens (indexing, reshaping leading axes) and JAX's transformations have.
    - A context from `replace`, from a call by hand or from the reference has another structure as a
      pytree. Those in the carry of a `jax.lax.scan` must be alike: replace fields right before
      `post`, not in the carry.
    - The leaves of the gradient with respect to a whole context belong together. For the gradient
      of the streams alone, differentiate with respect to x.

    Attributes:
        x: the streams `[..., n, C]`.
        h_pre: weight of each stream in the layer's input `[..., n]`; for form "channels" one for
            each channel, the same for all tokens: `[1, ..., 1, n, C]`.
        h_post: weight of the layer's output in each stream `[..., n]`, or `[1, ..., 1, n, C]`.
        h_res: `h_res[..., i, j]` is the weight of stream j in new stream i `[..., n, n]`.
    """

    x: Float[jax.Array, "*tokens n C"]
    h_pre: Float[jax.Array, "*tokens n"]
    h_post: Float[jax.Array, "*tokens n"]
    h_res: Float[jax.Array, "*tokens n n"]
    # x again, or None. Its cotangent is, by convention, that of the streams which post makes of it:
    # pre's backward applies the transposed h_res (_ops/deferred.py).
    _deferred: jax.Array | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    @classmethod
    def _of(
        cls,
        x: jax.Array,
        deferred: jax.Array | None,
        h_pre: jax.Array,
        h_post: jax.Array,
        h_res: jax.Array,
    ) -> Context:
        """Returns a context with its private field set."""
        ctx = cls(x, h_pre, h_post, h_res)
        object.__setattr__(ctx, "_deferred", deferred)
        return ctx

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[object, object], ...], None]:
        """For JAX."""
        names = ("x", "_deferred", "h_pre", "h_post", "h_res")
        key = jax.tree_util.GetAttrKey
        return tuple((key(name), getattr(self, name)) for name in names), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Iterable[Any]) -> Context:
        """For JAX."""
        return cls._of(*leaves)


for _type in (MHCParams, HeadParams, Context):
    # So that exported programs which take or return these can be serialised.
    jax.export.register_pytree_node_serialization(
        _type,
        serialized_name=f"jax_mhc.{_type.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )
