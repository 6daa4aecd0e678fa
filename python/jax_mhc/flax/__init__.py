"""Modules for Flax: `jax_mhc.flax.nnx` and `jax_mhc.flax.linen`. They need jax-mhc[flax]."""

from jax_mhc._errors import require

require("flax", "flax", "flax")
