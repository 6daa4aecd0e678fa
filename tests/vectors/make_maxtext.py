"""Write maxtext.npz: what MaxText computes for its hyper-connections and its head.

Run by hand when the vectors shall change, in an environment of its own, of Python 3.12 or newer
(the tests only read the file):

    pip install maxtext==0.2.5 jax==0.11.2 flax==0.12.12 absl-py aqtp chex \\
        cloud-accelerator-diagnostics datasets drjax gcsfs google-cloud-aiplatform \\
        google-cloud-mldiagnostics google-cloud-storage "grain[parquet]" huggingface_hub \\
        jaxtyping jinja2 jsonlines ml-collections ml-goodput-measurement omegaconf optax \\
        orbax-checkpoint pathwaysutils pillow protobuf pydantic qwix sentencepiece sympy \\
        tensorboardx tiktoken tokamax transformers
    python tests/vectors/make_maxtext.py

(The package itself asks for nothing; its extras are for TPUs and for CUDA.)

`ManifoldConstrainedHyperConnections` runs around a sine, its norm, and a layer of each kind, and
`DeepSeek4HyperHead` on streams. It is float32 throughout, since the class has casts of its own;
gradients are of a random cotangent. Entries of a case are `<case>/<name>`: `x`, the parameters by
their names in checkpoints, `out`, `ct`, the cotangent of out, and `d_<name>`, the gradients. The
experts' loss, the mean of their inputs, is `loss`, and has the cotangent 1.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from maxtext.common.common_types import HyperConnectionType
from maxtext.configs import pyconfig
from maxtext.layers import mhc
from maxtext.utils import maxtext_utils

TOKENS, HIDDEN = (2, 3), 5

# Streams, mHC-lite, Sinkhorn iterations, and what the connection is around; None: the head.
CASES = {
    "attention": (4, False, 20, HyperConnectionType.ATTENTION),
    "experts": (3, False, 3, HyperConnectionType.MLP_MOE),
    "lite": (4, True, 20, HyperConnectionType.MLP_DENSE),
    "lite_three_streams": (3, True, 20, HyperConnectionType.ATTENTION),
    "head": (4, False, 20, None),
}
LAYERS = {
    HyperConnectionType.ATTENTION: lambda inputs_q, inputs_kv: (
        inputs_q * jnp.tanh(inputs_kv),
        None,
    ),
    HyperConnectionType.MLP_DENSE: lambda inputs: jnp.tanh(inputs),
    HyperConnectionType.MLP_MOE: lambda inputs: (jnp.tanh(inputs), jnp.mean(inputs), None),
}


def module_of(n, lite, iterations, kind):
    """The module, and MaxText's config with the fields that it reads."""
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config = pyconfig.initialize(
        [None, str(base)], run_name="vectors", model_name="deepseek-custom",
        override_model_config=True, enable_checkpointing=False, per_device_batch_size=1,
        engram_layers=[], use_indexer=False, base_emb_dim=HIDDEN, mhc_expansion_rate=n,
        enable_mhc_lite=lite, sinkhorn_iterations=iterations, normalization_layer_epsilon=1e-3,
        dtype="float32", weight_dtype="float32", matmul_precision="highest",
        skip_jax_distributed_system=True,
    )  # fmt: skip
    mesh = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    if kind is None:
        return mhc.DeepSeek4HyperHead(config, mesh, nnx.Rngs(0))
    return mhc.ManifoldConstrainedHyperConnections(config, HIDDEN, mesh, nnx.Rngs(0))


def vectors(rng, case):
    """The entries of one case."""
    n, *_, kind = CASES[case]
    graph, state, rest = nnx.split(module_of(*CASES[case]), nnx.Param, ...)
    shapes = nnx.to_pure_dict(state)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
    x, ct = rng.normal(size=(2, *TOKENS, n, HIDDEN)).astype(np.float32)
    ct = ct[..., 0, :] if kind is None else ct

    def run(params, x):
        nnx.replace_by_pure_dict(state, params)
        module = nnx.merge(graph, state, rest)
        if kind is None:
            return module(x), 0.0
        out, added = module(jnp.sin, LAYERS[kind], x, kind)
        return out, added.get("load_balance_loss", 0.0)

    (out, loss), pullback = jax.vjp(run, params, x)
    d_params, d_x = pullback((ct, jnp.ones_like(loss)))
    entries = {"x": x, "ct": ct, "out": out, "loss": loss, "d_x": d_x}
    for prefix, tree in (("", params), ("d_", d_params)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = jax.tree_util.keystr
        entries |= {prefix + names(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {f"{case}/{name}": np.asarray(value) for name, value in entries.items()}


def main():
    """Run all cases and write the file beside this script."""
    rng = np.random.default_rng(0)
    entries = {}
    for case in CASES:
        entries |= vectors(rng, case)
    path = Path(__file__).with_name("maxtext.npz")
    np.savez_compressed(path, **entries)
    print(f"{path.name}: {len(entries)} arrays, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
