"""Cost of mHC in a model on a GPU that need not be here: `python -m jax_mhc.estimate`."""

from jax_mhc.estimate._estimate import Estimate, estimate
from jax_mhc.estimate._gpus import GPUS, Gpu

__all__ = ["GPUS", "Estimate", "Gpu", "estimate"]
