"""Write hy4.npz: what Hugging Face transformers computes for the hyper-connections of Hy4.

Run by hand when the vectors shall change, in an environment of its own (the tests only read the
file):

    pip install "torch==2.15.0" "transformers==5.24.0"
    python tests/vectors/make_hy4.py

The pieces are those of make_deepseek_v4.py, whose `layer` is here the forward pass of
`HYV4DecoderLayer`, and so are entries, dtypes and cotangents.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from make_deepseek_v4 import parameters, run, with_parameters
from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config
from transformers.models.hy_v4.modeling_hy_v4 import (
    HYV4DecoderLayer,
    HYV4HyperConnection,
    HYV4HyperHead,
)

# name: (tokens, streams, hidden, standard deviation of the logits, magnitude of h_post)
CASES = {
    "unit": ((2, 3), 4, 5, 1.0, 2.0),
    "peaked_6": ((2, 3), 4, 5, 6.0, 2.0),
    "three_streams": ((1, 4), 3, 7, 3.0, 1.5),
}


def inputs(case):
    """The arrays of a case, rounded to float32."""
    tokens, streams, hidden, sigma, _ = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    arrays = {"x": rng.normal(size=(*tokens, streams, hidden))}
    for prefix, sizes in (
        ("", (2 * streams, 2)),
        ("ffn_", (2 * streams, 2)),
        ("hc_", (streams, 1)),
    ):
        values = parameters(rng, *sizes, streams * hidden, sigma)
        arrays |= {prefix + k: v for k, v in zip(("fn", "base", "scale"), values, strict=True)}
    return {k: v.astype(np.float32) for k, v in arrays.items()}


def connection(config, x, fn, base, scale):
    """One hyper-connection."""
    post, collapsed = with_parameters(HYV4HyperConnection(config), fn, base, scale)(x)
    return {"collapsed": collapsed, "post": post}


class Layer(HYV4DecoderLayer):
    """The decoder layer with tanh and sin in the places of attention and experts, without norms."""

    def __init__(self, attn_hc, ffn_hc):
        torch.nn.Module.__init__(self)
        self.attn_hc, self.ffn_hc = attn_hc, ffn_hc
        self.input_layernorm = self.post_attention_layernorm = torch.nn.Identity()

    def self_attn(self, hidden_states, **_):
        return torch.tanh(hidden_states), None, None

    def mlp(self, hidden_states):
        return torch.sin(hidden_states)


def layer(config, x, fn, base, scale, ffn_fn, ffn_base, ffn_scale):
    """One decoder layer: two hyper-connections, the first of them that of `connection`."""
    attn = with_parameters(HYV4HyperConnection(config), fn, base, scale)
    ffn = with_parameters(HYV4HyperConnection(config), ffn_fn, ffn_base, ffn_scale)
    return {"out": Layer(attn, ffn)(x)[0]}


def head(config, x, hc_fn, hc_base, hc_scale):
    """The exit."""
    module = with_parameters(HYV4HyperHead(config), hc_fn, hc_base, hc_scale, "hc_")
    return {"out": module(x)}


def main():
    """Run all cases and write the file beside this script."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    entries = {"versions": np.array(versions)}
    for case, (_, streams, hidden, _, magnitude) in CASES.items():
        config = HYV4Config(hidden_size=hidden, hc_mult=streams, hc_magnitude=magnitude)
        assert (config.hc_eps, config.rms_norm_eps) == (1e-6, 1e-5)
        arrays = inputs(case)
        entries |= {f"{case}/inputs/{key}": value for key, value in arrays.items()}
        for piece in (connection, layer, head):
            for dtype, suffix in ((torch.float64, ""), (torch.float32, "_float32")):
                results = run(piece, config, arrays, dtype)
                name = piece.__name__ + suffix
                entries |= {f"{case}/{name}/{key}": value for key, value in results.items()}
    path = Path(__file__).with_name("hy4.npz")
    np.savez_compressed(path, **entries)
    print(f"{path.name}: {len(entries)} arrays, {path.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
