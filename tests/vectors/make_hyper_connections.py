"""Write hyper_connections.npz: what a public implementation computes for hyper-connections.

Run by hand when the vectors shall change, in an environment of its own (the tests only read the
file):

    pip install "torch==2.15.0" "hyper-connections==0.1.5"
    python tests/vectors/make_hyper_connections.py

`HyperConnections` of that package follows algorithm 2 of arXiv 2409.19606, appendix J. (Versions
0.2.1 to 0.3.0 drop the mixed streams.) It runs around a sine in float64, with gradients by autograd
of a random cotangent. Entries are the parameters by their names there, `x` and `x_new`
`[..., n, C]`, `ct`, the cotangent of x_new, and `d_<name>`, the gradients.
"""

from pathlib import Path

import numpy as np
import torch
from hyper_connections.hyper_connections import HyperConnections

TOKENS, STREAMS, HIDDEN = (2, 3), 4, 5


def main():
    """Run it and write the file beside this script."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    module = HyperConnections(STREAMS, dim=HIDDEN, layer_index=1, tanh=True)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(*TOKENS, STREAMS, HIDDEN, requires_grad=True)
    batch, length = TOKENS
    # There, streams are part of the batch.
    packed = x.permute(0, 2, 1, 3).reshape(batch * STREAMS, length, HIDDEN)
    u, add = module(packed)
    packed = add(torch.sin(u))
    x_new = packed.reshape(batch, STREAMS, length, HIDDEN).permute(0, 2, 1, 3)
    ct = torch.randn_like(x_new)
    x_new.backward(ct)
    leaves = {"x": x, **dict(module.named_parameters())}
    entries = {
        **{name: leaf.detach().numpy() for name, leaf in leaves.items()},
        **{f"d_{name}": leaf.grad.numpy() for name, leaf in leaves.items()},
        "x_new": x_new.detach().numpy(),
        "ct": ct.numpy(),
    }
    path = Path(__file__).with_name("hyper_connections.npz")
    np.savez_compressed(path, **entries)
    print(f"{path.name}: {len(entries)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
