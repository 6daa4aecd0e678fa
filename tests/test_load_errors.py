"""Checkpoints that do not fit: one error each that says what is wrong, and nothing is loaded."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_load import CONFIG, DEEPSEEK, FILES, HY4, MEGATRON, STATE_DICT, drawn, named, write

from jax_mhc import convert

FN = "model.layers.0.hc_attn_fn"
TENSORS = drawn(FILES)
OF_V41 = drawn(named("model.layers.{i}.hc_{site}_{part}"))
OF_MEGATRON = drawn(
    {
        f"decoder.layers.{i}.{site}_hyper_connection.{part}": shape
        for i in range(2)
        for site in ("self_attention", "mlp")
        for part, shape in MEGATRON.items()
    }
)


def without(*ends):
    return {k: v for k, v in TENSORS.items() if not any(end in k for end in ends)}


def with_fn(value):
    return {**TENSORS, FN: value(TENSORS[FN])}


def config(**settings):
    return {**CONFIG, **settings}


# Tensors, the model or the contents of its config.json, and what the error says.
MISTAKES = {
    # Names that are missing.
    "tensor": (without("1.hc_ffn_base"), CONFIG, r"got none of layers\[1\]\.ffn\.base\."),
    "site": (without("1.hc_ffn"), CONFIG, r"got none of layers\[1\]\.ffn\.fn, "),
    "first layer": (without("layers.0."), CONFIG, r"got none of layers\[0\]\.attn\.fn, .*2 more"),
    "last layer": (without("layers.1."), CONFIG, r"got none of layers\[1\]\.attn\.fn, .*2 more"),
    "most layers": (TENSORS, config(num_hidden_layers=61), r"got none of layers\[2\]\.attn\.fn, "),
    "head": (without("hc_head"), CONFIG, r"none of head\.fn, .*DeepSeek-V4\.1 .* have none"),
    "part of a module": (
        {k: v for k, v in drawn(DEEPSEEK).items() if k != "mtp.0.hc_head_base"},
        CONFIG, r"got none of mtp\[0\]\.head\.base\.",
    ),
    "all": ({"model.embed_tokens.weight": np.zeros((3, 2))}, CONFIG, "names of 0 kinds of models"),
    # Names that are doubled.
    "spellings": ({**TENSORS, **drawn(STATE_DICT)}, CONFIG, r"attn_hc\.fn: .*hc_attn_fn, too"),
    "prefixes": (
        {**TENSORS, **{f"ema.{k}": v for k, v in TENSORS.items()}},
        CONFIG, rf"ema\.{FN}: expected one name for fn of layers\[0\]\.attn, got {FN}, too",
    ),
    # Names of another model.
    "Hy4": (drawn(HY4["files"]), CONFIG, r"projection of 4 streams .*got shape \[8, 12\]"),
    "no Hy4": (TENSORS, config(model_type="hy_v4"), r"got shape \[24, 12\]"),
    "Megatron": (OF_MEGATRON, CONFIG, "one of 'megatron', 'megatron_dev'.* of deepseek_v4"),
    "no Megatron": (TENSORS, "megatron", "'deepseek_v4'.*as the names .* got 'megatron'"),
    "both": ({**TENSORS, **OF_MEGATRON}, "megatron", "names of 2 kinds of models"),
    "gate": ({**TENSORS, "model.layers.0.hc_attn_gate": 0}, CONFIG, r"got model\.layers\.0\.hc_"),
    "more layers": (
        TENSORS, config(num_hidden_layers=1, num_nextn_predict_layers=0),
        r"got besides layers\[1\]\.attn\.fn",
    ),
    "a tree": ({"params": {"decoder": {}}}, "maxtext", "names of 0 kinds.*flatten a tree"),
    # Shapes, and numbers of config.json.
    "streams": (TENSORS, config(hc_mult=2), r"projection of 2 streams of 3 .* \[24, 12\]"),
    "channels": (TENSORS, config(hidden_size=8), r"projection of 4 streams of 8 .* \[24, 12\]"),
    "transposed": (with_fn(np.transpose), CONFIG, rf"{FN}: .* got shape \[12, 24\]"),
    "another layer": (
        {**TENSORS, "model.layers.1.hc_attn_fn": np.zeros((15, 9), np.float32)},
        CONFIG, r"layers\.1\.hc_attn_fn: expected shape \[24, 12\], got \[15, 9\]",
    ),
    "text": (TENSORS, config(hc_mult="4"), r"hc_mult of config\.json: .* got '4' \(str\)"),
    "true": (TENSORS, config(hidden_size=True), r"hidden_size of config\.json: .*True \(bool\)"),
    "negative": (TENSORS, config(num_hidden_layers=-2), r"num_hidden_layers of .*at least 1"),
    "eps": (TENSORS, config(hc_eps="1e-6"), r"sinkhorn_eps: expected a float, got '1e-6'"),
    "iterations": (TENSORS, config(hc_sinkhorn_iters=-1), "sinkhorn_iters: expected an int"),
    # Quantised tensors.
    "int8": (with_fn(lambda v: v.astype(np.int8)), CONFIG, rf"{FN}: .* got int8.*by their scales"),
    "float8": (
        with_fn(lambda v: v.astype(jnp.float8_e4m3fn)), CONFIG, rf"{FN}: .* got float8_e4m3fn"
    ),
    "scales": (
        {**TENSORS, f"{FN}_scale_inv": np.ones((1, 1), np.float32)},
        CONFIG, rf"got {FN}_scale_inv.*multiply quantised tensors by their scales",
    ),
    "no array": (with_fn(np.ndarray.tolist), CONFIG, rf"{FN}: expected an array, got list"),
    # Tensors of DeepSeek-V4.1, whose config.json alone has the schedule.
    "V4.1 alone": (OF_V41, None, "'deepseek_v41'.*got None and no config.json"),
    "V4.1 as V4": (OF_V41, "deepseek_v4", r"none of head\.fn, .*DeepSeek-V4\.1 .* have none"),
    "V4.1 named V4": (OF_V41, CONFIG, r"none of head\.fn, .*DeepSeek-V4\.1 .* have none"),
    "V4 as V4.1": (TENSORS, "deepseek_v41", r"besides head\.fn, .*DeepSeek-V4\.1 .* have none"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(mistake):
    tensors, model, message = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        convert.load(tensors, model)
    assert caught.value.__cause__ is None and str(caught.value).count("jax_mhc.") <= 2


def test_other_tensors_may_be_quantised():
    """A checkpoint in float8 whose hyper-connections are in float32, as they are published."""
    weight = jnp.zeros((7, 3), jnp.float8_e4m3fn)
    other = {"model.layers.0.attn.wq_a.weight": weight, "model.layers.0.attn.wq_a.scale": weight}
    assert len(convert.load({**TENSORS, **other}, CONFIG).layers) == 2


FILE = "model-1.safetensors"


def remove(folder):
    (folder / FILE).unlink()


def cut(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9])


def point_elsewhere(folder):
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    names = (name for name in TENSORS if "hc_" in name)
    name = next(name for name in names if contents["weight_map"][name] != FILE)
    contents["weight_map"][name] = FILE
    index.write_text(json.dumps(contents))


def break_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    "harm, message",
    [
        (remove, f"a whole safetensors file in {FILE}"),
        (cut, f"a whole safetensors file in {FILE}"),
        (point_elsewhere, f"in {FILE}, got none of this name"),
        (break_config, "an object in JSON in config.json"),
    ],
)
def test_files_that_are_harmed_are_told(harm, message, tmp_path):
    write(tmp_path, TENSORS, num_files=3, config=CONFIG)
    harm(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        convert.load(tmp_path)


def test_what_cannot_be_saved_changes_nothing(tmp_path):
    checkpoint = convert.load(TENSORS, CONFIG)
    layers = jax.tree.map(lambda leaf: leaf + 1, checkpoint.layers)
    layers[1]["ffn"] = dataclasses.replace(layers[1]["ffn"], bias=jnp.zeros(23))
    wrong = dataclasses.replace(checkpoint, layers=layers)
    target = dict(TENSORS)
    for place in (target, tmp_path / "new.safetensors"):
        with pytest.raises(ValueError, match=r"bias: expected shape \[24\], got \[23\]"):
            convert.save(wrong, place)
    assert all(target[name] is value for name, value in TENSORS.items())
    assert target.keys() == TENSORS.keys() and not list(tmp_path.iterdir())
