"""Policies for what a backward pass of many sublayers keeps and recomputes (section 4.3.2)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax

from jax_mhc import _errors

if TYPE_CHECKING:
    from jax.extend.core import Primitive

# A policy of `jax.checkpoint`: of a primitive, the types of its operands and its parameters,
# whether its results are kept.
Policy: TypeAlias = Callable[..., bool]

# Values that are computed again: the streams alone, or all that mHC makes but y.
Recomputed: TypeAlias = Literal["streams", "mhc"]
NAMES: dict[Recomputed, tuple[str, ...]] = {
    "streams": ("mhc_streams",),
    "mhc": ("mhc_streams", "mhc_layer_input", "mhc_coefficients"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recompute:
    """Values that the backward pass of `stack` computes again rather than keeps; hashable.

    Sublayers are run in stretches. The streams before a stretch are kept; the backward pass
    computes those within it again, a stretch at a time, and runs no layer (section 4.3.2 of arXiv
    2512.24880). The defaults keep the streams before every sublayer.

    Attributes:
        every: the sublayers of a stretch. In a stack with xs a divisor of those of a block, or
            those of several blocks that divide num_blocks. "auto": the possible number nearest to
            sqrt(n L / (n + 2)) of all L sublayers, which needs the least memory.
        policy: what a stretch computes again beside the streams within it: "streams": nothing;
            "mhc": the layers' inputs and the coefficients, as in the paper (see `remat_policy`); or
            what of it is kept, a policy of `jax.checkpoint`.

    Raises:
        ValueError, TypeError: a number of sublayers below 1; a policy that is none.
    """

    every: int | Literal["auto"] = 1
    policy: Recomputed | Policy = "streams"

    def __post_init__(self) -> None:
        """Checks both; stores plain Python values, so that equal ones hash alike."""
        op, every, policy = "Recompute", self.every, self.policy
        if isinstance(every, str) and every == "auto":
            every = "auto"
        else:
            remedy = "Give 1 to keep the streams before every sublayer, or 'auto'."
            every = _errors.integer(op, "every", every, 1, None, remedy)
        if callable(policy):
            check_policy(op, "policy", policy)
        else:
            names: tuple[Recomputed, ...] = ("streams", "mhc")
            policy = _errors.choice(op, "policy", policy, names, "a function")
        object.__setattr__(self, "every", every)
        object.__setattr__(self, "policy", policy)


#: Nothing is computed again.
NOTHING = Recompute()


def remat_policy(
    recompute: Recomputed = "streams",
    *,
    streams: int,
    hidden: int,
    layers: Policy | None = None,
) -> Policy:
    """A policy for `jax.checkpoint` under which mHC is computed again, and no layer is.

        @functools.partial(jax.checkpoint, policy=mhc.remat_policy(streams=4, hidden=C))
        def block(x, params):
            for layer, p in zip(layers, params, strict=True):
                x = mhc.mhc_residual(layer, x, p)
            return x

    keeps the streams before the block, of each sublayer y, and what the layer itself keeps; the
    backward pass runs the kernels again for the streams within the block. `stack` does the same
    faster, with a `Recompute`, whose `policy` takes these names. For L sublayers with n
    streams, blocks of about sqrt(n L / (n + 2)) sublayers need the least memory (arXiv 2512.24880,
    section 4.3.2).

    Args:
        recompute: "streams": X alone, n·C values a token and sublayer. "mhc", as in the paper: the
            layers' inputs, C values, and the coefficients, too; the kernels then run once more a
            block.
        streams: n.
        hidden: C, inside `jax.shard_map` that of one device. A policy is told shapes and not whose
            values it decides about: other arrays `[..., n, C]` are computed again, too.
        layers: a policy for what is not mHC's, such as `jax.checkpoint_policies.dots_saveable`.
            None: everything is kept but float32 copies of half precision, which norms make.

    Returns:
        The policy.

    Raises:
        ValueError, TypeError: an unknown name; streams or hidden out of range; layers that is no
            policy.
    """
    op = "remat_policy"
    recompute = _errors.choice(op, "recompute", recompute, tuple(NAMES))
    n = _errors.num_streams(op, "streams", streams)
    hidden = _errors.width(op, hidden)
    if layers is not None:
        check_policy(op, "layers", layers)
    return policy_of((n, hidden), recompute, layers)


def check_policy(op: str, argument: str, policy: object) -> None:
    """A policy of `jax.checkpoint`.

    JAX asks it about a primitive, with any number of operands and settings, and may know it by its
    type or identity: it cannot be wrapped in a function that checks more.
    """
    is_policy = callable(policy) and _errors.takes(policy, None, None, None, setting=None)
    if not is_policy or not isinstance(policy, Hashable):
        raise _errors.Refusal(TypeError, op, argument).expected(
            "a policy of jax.checkpoint",
            _errors.shown(policy),
            "Take one of jax.checkpoint_policies, or a hashable function (primitive, *avals, "
            "**settings) -> bool.",
        )


@functools.cache
def policy_of(
    shape: tuple[int, ...], recompute: Recomputed, layers: Policy | None = None
) -> Policy:
    """The policy for streams of `shape`, in front of which there may be other axes (vmap's)."""

    def is_streams(other: Iterable[int]) -> bool:
        return tuple(other)[-len(shape) :] == shape

    def keep(primitive: Primitive, *avals: jax.core.ShapedArray, **options: Any) -> bool:
        if primitive.name == "name" and options["name"].startswith("mhc_"):
            return options["name"] not in NAMES[recompute]
        # Of the reference, what a product that JAX differentiates by our rule gives, too.
        results = getattr(options.get("call_jaxpr"), "out_avals", ())
        shapes = [getattr(aval, "shape", ()) for aval in (*avals, *results)]
        shapes.append(options.get("shape") or ())
        # And identities, which would only be copies.
        if (
            primitive.name.startswith("mhc_")
            or primitive.name == "optimization_barrier"
            or any(map(is_streams, shapes))
        ):
            return False
        return (
            keep_all(primitive, *avals, **options)
            if layers is None
            else layers(primitive, *avals, **options)
        )

    return keep


def keep_all(primitive: Primitive, *avals: jax.core.ShapedArray, **options: Any) -> bool:
    """The policy for layers: all but float32 copies of values in half precision."""
    if primitive.name == "convert_element_type":
        return options["new_dtype"].itemsize <= avals[0].dtype.itemsize
    return True


def best_length(streams: int, num_sublayers: int, lengths: list[int]) -> int:
    """Returns the element of `lengths` nearest, in ratio, to the L_r of least memory.

    Kept: n C values a token for each of L / L_r stretches; for a stretch, while the backward pass
    is in it, (n + 2) C L_r. Their sum is least at sqrt(n L / (n + 2)).
    """
    best = math.sqrt(streams * max(num_sublayers, 1) / (streams + 2))
    return min(lengths, key=lambda length: abs(math.log(length / best)))
