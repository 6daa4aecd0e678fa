"""Modules for Flax: `jax_mhc.flax.nnx` and `jax_mhc.flax.linen`. They need jax-mhc[flax]."""

from jax_mhc import _errors

_errors.require("flax", "flax", "flax")
