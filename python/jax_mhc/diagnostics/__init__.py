"""Effects of the mixing of streams on the signal: gain, errors, entropy, similarity.

    ctx = mhc.pre(x, params)[1]
    h_res = diagnostics.sample_tokens(ctx.h_res, 64)  # of one sublayer
    gain = diagnostics.amax_gain(h_res)
    products = diagnostics.composite(all_h_res)       # of the first 1, 2, ... of many
    gain = diagnostics.amax_gain(products)
    diagnostics.watch_gain(gain, step=step)           # warns of what is out of bounds
    diagnostics.summary(all_h_res)                    # numbers to log, by name
    diagnostics.plot_gain({"mHC": gain}).savefig("gain.png")

`stream_similarity` is a function of the streams; all others are of matrices h_res `[..., n, n]`,
one for each token, where `h_res[i, j]` is the weight of stream j in new stream i, and have their
dtype. docs/diagnostics.md says what is normal.

They are figures to log, in plain JAX: they work in `jit`, `vmap` and `scan`, and stay where the
tokens are on meshes, but gradients may be NaN, as of the distance of the identity itself. They cost
n² to n³ operations a token; `sample_tokens` takes a few tokens, which are enough. What is no
number gives figures of that token that are none either. The plots need matplotlib, the extra
`jax-mhc[plots]`.
"""

from jax_mhc.diagnostics._numbers import (
    Gain,
    Mixing,
    amax_gain,
    composite,
    logit_range,
    mixing,
    sample_tokens,
    stream_similarity,
    summary,
)
from jax_mhc.diagnostics._plots import plot_gain, plot_mixing
from jax_mhc.diagnostics._watch import GainWarning, watch_gain

__all__ = [
    "Gain",
    "GainWarning",
    "Mixing",
    "amax_gain",
    "composite",
    "logit_range",
    "mixing",
    "plot_gain",
    "plot_mixing",
    "sample_tokens",
    "stream_similarity",
    "summary",
    "watch_gain",
]
