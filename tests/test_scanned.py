"""Trees of MaxText whose layers are scanned: read as layers, and stacked again, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import traverse_util
from formats import tensors_of

from jax_mhc import convert, presets
from jax_mhc.convert import load, save

N, C = 4, 3
SITES = {"mhc_attention": "attn", "mhc_mlp": "ffn"}
# Stacks of MaxText's decoders, and the layers of each. One number, not in a list, is not scanned.
TREES = {
    "one kind of layers": {"layers": [0, 1, 2]},
    "deepseek": {"dense_layers": [0], "moe_layers": [1, 2, 3]},
    "deepseek without dense layers": {"moe_layers": [0, 1]},
    "deepseek with engrams": {
        "dense_layers_0_1": [0, 1], "moe_layers_engram_2": 2, "moe_layers_3_5": [3, 4, 5],
        "moe_layers_engram_6": 6,
    },
    "deepseek4": {
        "layers_0": 0, "layers_1": 1,
        "scanned_blocks.layers_0": [2, 4, 6], "scanned_blocks.layers_1": [3, 5, 7],
    },
    "not scanned": {"dense_layers_0": 0, "moe_layers_0": 1, "moe_layers_1": 2},
}  # fmt: skip


def tree(stacks, model="maxtext", dtype=np.float32):
    """Tensors of a decoder, flattened, and the parameters of each layer and site."""
    rng = np.random.default_rng(0)
    tensors = {"params.params.decoder.layers.self_attention.kernel": np.zeros((2, 3), dtype)}
    expected = {}
    for stack, layers in stacks.items():
        for site, ours in SITES.items():
            numbers = layers if isinstance(layers, list) else [layers]
            each = []
            for layer in numbers:
                drawn = tensors_of(model, N, C)
                drawn = {k: (v + rng.normal(size=v.shape)).astype(dtype) for k, v in drawn.items()}
                expected[layer, ours] = convert.from_maxtext(drawn)
                each.append(drawn)
            for part in each[0]:
                arrays = [drawn[part] for drawn in each]
                whole = np.stack(arrays, axis=1) if isinstance(layers, list) else arrays[0]
                tensors[f"params.params.decoder.{stack}.{site}.{part}"] = whole
    return tensors, expected


def assert_saved(saved, tensors):
    assert saved.keys() == {name for name in tensors if ".mhc_" in name}
    for name, value in saved.items():
        assert (value.dtype, value.shape) == (tensors[name].dtype, tensors[name].shape), name
        assert value.tobytes() == tensors[name].tobytes(), name


@pytest.mark.parametrize(
    "name, model, dtype",
    [
        *((name, "maxtext", "float32") for name in TREES),
        ("deepseek", "maxtext", "bfloat16"),
        ("deepseek4", "maxtext_lite", "float32"),
    ],
)
def test_layers_are_those_of_the_tree(name, model, dtype):
    tensors, expected = tree(TREES[name], model, jnp.dtype(dtype))
    checkpoint = load(tensors, model)
    assert checkpoint.config == getattr(presets, model.upper())
    assert {(i, site) for i, sites in enumerate(checkpoint.layers) for site in sites} == set(
        expected
    )
    for (layer, site), params in expected.items():
        jax.tree.map(np.testing.assert_array_equal, checkpoint.layers[layer][site], params)
    save(checkpoint, saved := {})
    assert_saved(saved, tensors)


@pytest.mark.parametrize("separator", "/-")
def test_other_separators(separator):
    tensors, expected = tree(TREES["deepseek4"])
    tensors = {name.replace(".", separator): value for name, value in tensors.items()}
    checkpoint = load(tensors, "maxtext")
    assert len(checkpoint.layers) == 8
    jax.tree.map(np.testing.assert_array_equal, checkpoint.layers[5]["ffn"], expected[5, "ffn"])


def test_a_trained_layer_is_the_only_one_that_changes():
    tensors, _ = tree(TREES["deepseek"])
    checkpoint = load(tensors, "maxtext")
    layers = list(checkpoint.layers)
    layers[2] = jax.tree.map(lambda leaf: 2 * leaf, layers[2])
    save(dataclasses.replace(checkpoint, layers=tuple(layers)), saved := {})
    for name, value in saved.items():
        expected = tensors[name].copy()
        if ".moe_layers." in name and not name.endswith("mhc_norm.scale"):
            # Columns of phi are divided by the weight of the norm again.
            np.testing.assert_allclose(value[:, 1], 2 * expected[:, 1], rtol=2e-7, err_msg=name)
            expected[:, 1] = value[:, 1]
        np.testing.assert_array_equal(value, expected, name)


# Threads of Orbax; their warnings are not ours.
@pytest.mark.filterwarnings("default")
def test_through_orbax_and_safetensors(tmp_path):
    """Code of docs/models.md, with other tensors in the tree, and a file in between."""
    tensors, expected = tree(TREES["deepseek"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "items", traverse_util.unflatten_dict(tensors, sep="."))
        checkpointer.wait_until_finished()
        flat = traverse_util.flatten_dict(checkpointer.restore(tmp_path / "items"), sep=".")
    checkpoint = load(flat, "maxtext")
    save(checkpoint, tmp_path / "scanned.safetensors")
    assert_saved(safetensors.numpy.load_file(tmp_path / "scanned.safetensors"), tensors)
    again = load(tmp_path / "scanned.safetensors", "maxtext")
    for (layer, site), params in expected.items():
        jax.tree.map(np.testing.assert_array_equal, again.layers[layer][site], params)
    save(again, flat)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", traverse_util.unflatten_dict(flat, sep="."))
        checkpointer.wait_until_finished()
        flat = traverse_util.flatten_dict(checkpointer.restore(tmp_path / "saved"), sep=".")
    jax.tree.map(np.testing.assert_array_equal, flat, tensors)


def changed(name, value, stacks=TREES["deepseek"]):
    tensors, _ = tree(stacks)
    found = f"params.params.decoder.{name}"
    return tensors | {found: value(tensors[found])}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            lambda: {k: np.moveaxis(v, 1, 0) for k, v in tree(TREES["deepseek"])[0].items()},
            r"expected 12 layers along the second axis, got shape \[.*param_scan_axis",
        ),
        (
            lambda: changed("moe_layers.mhc_mlp.res_beta", lambda v: v[:, :2]),
            r"moe_layers\.mhc_mlp\.res_beta: expected 3 layers .*, got shape \[4, 2, 4\]",
        ),
        (
            lambda: changed("moe_layers.mhc_mlp.mhc_norm.scale", lambda v: v[:, 0]),
            r"mhc_mlp\.mhc_norm\.scale: expected 3 layers .*, got shape \[12\]",
        ),
        (
            lambda: changed("moe_layers.mhc_mlp.post_beta", lambda v: v[:3]),
            r"post_beta\[:, 0\]: expected shape \[4\], got \[3\]",
        ),
        (
            lambda: tree({"layers": [0, 1], "layers_1": 1})[0],
            r"layers_1\.mhc_attention\.\w+: expected one tensor for \w+ of layers\[1\]\.attn, "
            r"got .*layers\.mhc_attention\.\w+\[:, 1\], too",
        ),
        (
            lambda: tree({"layers_0": 0, "scanned_blocks.layers_0": [1, 3]})[0],
            r"got none of layers\[2\]\.attn\.pre_alpha",
        ),
        (
            lambda: tree({"moe_layers_engram_0": 0, "moe_layers_2_3": [2, 3]})[0],
            r"got none of layers\[1\]\.attn\.pre_alpha",
        ),
    ],
    ids=["first axis", "fewer", "not scanned", "shape", "twice", "half a block", "a gap"],
)
def test_trees_that_do_not_fit_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        load(tensors(), "maxtext")
