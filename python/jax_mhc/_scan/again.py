"""Values that the backward pass of a scan computes again, rather than keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jax_mhc._call import Settings
from jax_mhc._ops.fused_op import fused_call
from jax_mhc._scan.program import Shorter

if TYPE_CHECKING:
    from jax.extend.core import JaxprEqn


class Again(NamedTuple):
    """Values that are computed again; hashable.

    Attributes:
        every: the sublayers of a stretch: streams are kept that it begins with.
        names: the names of the values within a stretch that are computed again.
        fused: whether nothing but the kernels may do so.
    """

    every: int = 1
    names: tuple[str, ...] = ()
    fused: bool = False

    def dropped(self, makers: Mapping[int, JaxprEqn], named: Mapping[int, str]) -> frozenset[int]:
        """The identities of values that are not kept, of those that have a name.

        A stretch begins with streams and the coefficients of the sublayer before it; both are kept,
        in the carry those of the first stretch.

        makers: the equations of the body, by the identities of what they make.
        """

        def call(key: int) -> int:
            eqn = makers.get(key)
            if eqn is not None and eqn.primitive.name == "optimization_barrier":
                return call(id(eqn.invars[0]))
            return id(eqn)

        streams = [key for key in makers if named.get(key) == "mhc_streams"]
        last = {call(key) for key in streams[self.every - 1 : -1 : self.every]}
        kept = {"mhc_streams", "mhc_coefficients"}
        return frozenset(
            key
            for key, name in named.items()
            if name in self.names and key in makers and not (name in kept and call(key) in last)
        )

    def shorter(self, eqn: JaxprEqn, wanted: frozenset[int]) -> Shorter | None:
        """`post` in place of a `post_pre` of which the streams alone are wanted."""
        if eqn.primitive.name != "custom_vmap_call":
            return None
        _, (operands, *_) = jax.tree.unflatten(eqn.params["in_tree"], eqn.invars)
        results: Any = jax.tree.unflatten(eqn.params["out_tree"], eqn.outvars)
        if not isinstance(results, dict) or wanted != {id(results.get("x_new"))}:
            return None
        names = ("x", "y", "h_post", "h_res")
        if set(operands) == set(names):
            return None

        def post(*values: jax.Array) -> jax.Array:
            of_post = dict(zip(names, values, strict=True))
            return fused_call("post_fwd", Settings(fused=self.fused), of_post)["x_new"]

        return [operands[name] for name in names], post


#: Nothing is computed again.
NOTHING = Again()
