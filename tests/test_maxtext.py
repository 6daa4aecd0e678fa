"""examples/maxtext, against stored results of MaxText and, where it is installed, in its trainer.

tests/vectors/make_maxtext.py says what the vectors hold.
"""

import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close
from flax import nnx
from test_examples import EXAMPLES

FOLDER = EXAMPLES / "maxtext"
FUSED = types.SimpleNamespace(**runpy.run_path(str(FOLDER / "fused.py")))
VECTORS = np.load(Path(__file__).parent / "vectors" / "maxtext.npz")

# Largest difference over the largest value; both round to float32.
OUT, GRADIENT = 1e-6, 1e-5

pytestmark = [
    pytest.mark.usefixtures("default_dtypes"),
    pytest.mark.cpu("MaxText's results are those of a CPU"),
]


def attention(inputs_q, inputs_kv):
    return inputs_q * jnp.tanh(inputs_kv), None


def dense(inputs):
    return jnp.tanh(inputs)


def experts(inputs):
    return jnp.tanh(inputs), jnp.mean(inputs), None


# What the connection of each case is around, mHC-lite or not, and its Sinkhorn iterations.
LAYERS = {"attention": attention, "mlp_dense": dense, "mlp_moe": experts}
CASES = {
    "attention": ("attention", False, 20),
    "experts": ("mlp_moe", False, 3),
    "lite": ("mlp_dense", True, 20),
    "lite_three_streams": ("attention", True, 20),
}


class Module(nnx.Module):
    """A module with the attributes of MaxText's that the example reads."""

    def __init__(self, params, **attributes):
        for name, value in params.items():
            outer, _, inner = name.partition(".")
            setattr(self, outer, Module({inner: value}) if inner else nnx.Param(value))
        for name, value in attributes.items():
            setattr(self, name, value)


def check(run, case):
    """Outputs and all gradients of `run(params, x)` are those of the case."""
    stored = {k.partition("/")[2]: VECTORS[k] for k in VECTORS.files if k.startswith(f"{case}/")}
    leaves = {name.removeprefix("d_") for name in stored if name.startswith("d_")}
    params = {name: stored[name] for name in leaves - {"x"}}
    (out, loss), pullback = jax.vjp(jax.jit(run), params, stored["x"])
    d_params, d_x = pullback((stored["ct"], jnp.ones_like(loss)))
    for name, value in {"out": out, "loss": loss}.items():
        assert_close(value, stored[name], OUT, name)
    for name, value in {"x": d_x, **d_params}.items():
        assert_close(value, stored[f"d_{name}"], GRADIENT, f"d_{name}")


@pytest.mark.parametrize("case", CASES)
def test_connections_are_those_of_maxtext(case):
    kind, lite, iterations = CASES[case]
    config = types.SimpleNamespace(
        enable_mhc_lite=lite, sinkhorn_iterations=iterations, normalization_layer_epsilon=1e-3
    )

    def run(params, x):
        mhc_type = types.SimpleNamespace(value=kind)
        module = Module(params, config=config)
        out, added = FUSED.connection(module, jnp.sin, LAYERS[kind], x, mhc_type)
        assert [*added] == ["load_balance_loss", "moe_bias_updates"][: 2 * (kind == "mlp_moe")]
        return out, added.get("load_balance_loss", 0.0)

    check(run, case)


def test_the_head_is_that_of_maxtext():
    def run(params, x):
        return FUSED.leave(Module(params, eps=1e-6, dtype=jnp.float32), x), 0.0

    check(run, "head")


# ---- MaxText's trainer ---------------------------------------------------------------------------

IS_INSTALLED = any(found.name == "maxtext" for found in importlib.metadata.distributions())

RUN = (
    "run_name=test steps=4 dataset_type=synthetic enable_checkpointing=false hardware=cpu "
    "skip_jax_distributed_system=true per_device_batch_size=1 max_target_length=32 vocab_size=256 "
    "learning_rate=0.01 warmup_steps_fraction=0 dtype=float32 weight_dtype=float32 "
    "matmul_precision=highest sparse_matmul=false megablox=false attention=dot_product "
    "sharding_tolerance=1.0 enable_goodput_recording=false monitor_goodput=false "
    "override_model_config=true"
).split()

# One dense layer and two of experts.
DEEPSEEK = (
    "model_name=deepseek-custom engram_layers=[] use_indexer=false base_emb_dim=32 "
    "base_num_query_heads=4 base_num_kv_heads=4 base_mlp_dim=64 base_moe_mlp_dim=32 "
    "base_num_decoder_layers=3 num_experts=4 q_lora_rank=16 kv_lora_rank=16 qk_nope_head_dim=8 "
    "qk_rope_head_dim=8 v_head_dim=16"
).split()
TRAININGS = {
    "scanned": DEEPSEEK,
    # Of streams that XLA splits: docs/maxtext.md.
    "tensor": [*DEEPSEEK, "ici_fsdp_parallelism=2", "ici_tensor_parallelism=2"],
}


def train(trainer, folder, options):
    """The losses of a training, and what it logs."""
    base = importlib.metadata.distribution("maxtext").locate_file("maxtext/configs/base.yml")
    folder.mkdir()
    metrics = folder / "metrics.jsonl"
    arguments = [*trainer, base, *RUN, *options, f"metrics_file={metrics}"]
    num_devices = 4 if any("ici_" in option for option in options) else 1
    done = subprocess.run(
        [sys.executable, *map(str, arguments), f"base_output_directory={folder}"],
        env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"},
        cwd=folder, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    records = map(json.loads, metrics.read_text().splitlines())
    return [record["learning/loss"] for record in records], done.stdout + done.stderr


@pytest.mark.skipif(not IS_INSTALLED, reason="needs the package maxtext, of Python 3.12 or newer")
@pytest.mark.parametrize("training", TRAININGS)
def test_trainings_have_the_losses_of_maxtext(training, tmp_path):
    """Its trainer with recomputation and experts, with and without the example, on meshes too."""
    options = TRAININGS[training]
    plain, _ = train(["-m", "maxtext.trainers.pre_train.train"], tmp_path / "plain", options)
    fused, log = train([FOLDER / "train.py"], tmp_path / "fused", options)
    assert len(fused) == len(plain) == 4
    assert plain[-1] < plain[0] - 0.01
    np.testing.assert_allclose(fused, plain, rtol=1e-5)
    assert ("XLA splits the streams" in log) == (training == "tensor")
