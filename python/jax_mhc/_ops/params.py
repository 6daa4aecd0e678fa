"""The parameters of a sublayer as operands of calls, by name."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, PartitionSpec, reshard

from jax_mhc._axes import axes_of
from jax_mhc._call import Values


def operands_of(
    phi: jax.Array | None,
    alpha: jax.Array | None,
    bias: jax.Array,
    norm_scale: jax.Array | None,
) -> Values:
    """The parameters that are there: static coefficients are bias alone."""
    operands = {"phi": phi, "alpha": alpha, "bias": bias, "norm_scale": norm_scale}
    return {name: value for name, value in operands.items() if value is not None}


def packed_phi(phi: jax.Array, streams: int) -> jax.Array:
    """The parameter phi `[n·C, K]` as calls have it, `[n, C, K]`."""
    # Rows of n times C cannot be sharded as C is: explicit axes are gathered first.
    if axes_of(phi, AxisType.Explicit):
        phi = reshard(phi, PartitionSpec())
    return phi.reshape(streams, phi.shape[0] // streams, phi.shape[1])


def unpacked_phi(d_phi: jax.Array, phi: jax.Array) -> jax.Array:
    """The gradient of phi `[n·C, K]` from that of a call, `[n, C, K]`."""
    if axes_of(phi, AxisType.Explicit):
        d_phi = reshard(d_phi, PartitionSpec())
        return reshard(d_phi.reshape(phi.shape), jax.typeof(phi).sharding)
    return d_phi.reshape(phi.shape)
