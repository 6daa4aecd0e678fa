"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880) for JAX, with fused kernels.

    import jax_mhc as mhc

    params = mhc.init_params(key, streams=4, hidden=C)   # of one sublayer; a pytree
    x = mhc.expand(u, streams=4)                         # [..., C] -> streams [..., n, C]
    x = mhc.mhc_residual(layer, x, params)               # in place of x + layer(x)
    u = mhc.reduce(x)                                    # or mhc.head(x, head_params)

`stack` runs many sublayers, in a scan too; `pre`, `post` and `post_pre` are the pieces for blocks
of your own, and `sinkhorn` is the projection alone. `MHCConfig` and `presets` hold the settings,
`convert` reads parameters of other implementations, `reference` is the same in plain JAX,
`diagnostics` tells what mixing does to the signal. `python -m jax_mhc.info` describes the
installation, `python -m jax_mhc.bench` times the kernels on this machine, and `estimate`, or
`python -m jax_mhc.estimate`, says what mHC costs a model on a GPU. `jax_mhc.flax.nnx`,
`jax_mhc.flax.linen` and `jax_mhc.equinox`, to be imported by these names, have modules that own the
parameters.
"""

from jax_mhc import convert, diagnostics, presets, reference
from jax_mhc._call import library as _library
from jax_mhc._init import init_head, init_params
from jax_mhc._labels import param_labels
from jax_mhc._ops.collapse import collapse
from jax_mhc._ops.head import head
from jax_mhc._ops.post import post
from jax_mhc._ops.post_pre import post_pre
from jax_mhc._ops.pre import pre
from jax_mhc._ops.sinkhorn import sinkhorn
from jax_mhc._ops.streams import Streams, as_streams
from jax_mhc._residual import expand, mhc_residual, reduce
from jax_mhc._scan.public import scan
from jax_mhc._stack.public import stack, stack_with_samples
from jax_mhc._stack.remat import Recompute, remat_policy
from jax_mhc._types import Context, HeadParams, MHCConfig, MHCParams
from jax_mhc.estimate import estimate

__all__ = [
    "Context",
    "HeadParams",
    "MHCConfig",
    "MHCParams",
    "Recompute",
    "Streams",
    "as_streams",
    "bench",
    "collapse",
    "convert",
    "diagnostics",
    "estimate",
    "expand",
    "head",
    "info",
    "init_head",
    "init_params",
    "mhc_residual",
    "param_labels",
    "post",
    "post_pre",
    "pre",
    "presets",
    "reduce",
    "scan",
    "reference",
    "remat_policy",
    "sinkhorn",
    "stack",
    "stack_with_samples",
]


_library.register()


def __getattr__(name: str) -> object:
    # None of them is needed to compute anything, and all take time to import.
    if name in ("bench", "info"):
        import importlib

        return importlib.import_module(f"jax_mhc.{name}")
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("jax-mhc")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
