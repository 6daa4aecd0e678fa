"""Whole checkpoints, read by their names and written back."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from formats import tensors_of

from jax_mhc import convert, presets
from jax_mhc.convert import load, save

N, C, LAYERS = 4, 3, 2
K = N * N + 2 * N
SHAPES = {"fn": (K, N * C), "base": (K,), "scale": (3,)}
HEAD = {"fn": (N, N * C), "base": (N,), "scale": (1,)}
MEGATRON = {
    "mapping_proj.weight": (K, N * C),
    "alpha_pre": (1,), "alpha_post": (1,), "alpha_res": (1,),
    "bias": (K,),
}  # fmt: skip

CONFIG = {
    "model_type": "deepseek_v4", "hidden_size": C, "num_hidden_layers": LAYERS, "hc_mult": N,
    "hc_eps": 1e-6, "hc_sinkhorn_iters": 20, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1,
}  # fmt: skip


def drawn(names, dtype=np.float32):
    """Tensors for the shapes of names."""
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in names.items()}


def named(connection, head=None, mtp=None, *, of_site=SHAPES, sites=("attn", "ffn")):
    """Shapes by name, from templates; other tensors of a model are among them."""
    shapes = {"model.embed_tokens.weight": (7, C), "layers.0.attn.hc.weight": (1,)}
    for site in sites:
        for part, shape in of_site.items():
            for i in range(LAYERS):
                shapes[connection.format(i=i, site=site, part=part)] = shape
            if mtp:
                shapes[mtp.format(i=0, site=site, part=part)] = shape
    for part, shape in HEAD.items():
        if mtp:
            shapes[mtp.format(i=0, site="head", part=part)] = shape
        if head:
            shapes[head.format(part=part)] = shape
    return shapes


# The spellings of DeepSeek-V4's tensors: a state dict of transformers, its files, DeepSeek's.
STATE_DICT = named("model.layers.{i}.{site}_hc.{part}", "model.hc_head.hc_{part}")
FILES = named("model.layers.{i}.hc_{site}_{part}", "model.hc_head.hc_{part}")
DEEPSEEK = named("layers.{i}.hc_{site}_{part}", "hc_head_{part}", "mtp.{i}.hc_{site}_{part}")
GLM5 = named("model.language_model.layers.{i}.hc_{site}_{part}")
SPELLINGS = {"state_dict": STATE_DICT, "files": FILES, "deepseek": DEEPSEEK}
# Those of Hy4: a state dict of transformers, and its own files.
OF_HY4 = {"fn": (2 * N, N * C), "base": (2 * N,), "scale": (2,)}
HY4 = {
    "state_dict": named(
        "model.layers.{i}.{site}_hc.{part}", "model.hc_head.hc_{part}", of_site=OF_HY4
    ),
    "files": named(
        "model.layers.{i}.hc_pre.hc_{site}_layer.hc_{part}", "model.hc_head.hc_head_{part}",
        of_site=OF_HY4, sites=("attn", "mlp"),
    ),
}  # fmt: skip


def assert_saved(checkpoint, tensors):
    """The tensors of the hyper-connections come back bit for bit, and no others."""
    save(checkpoint, saved := {})
    assert saved.keys() == {name for name in tensors if "hc_" in name or "_hc" in name}
    for name, value in saved.items():
        assert value.dtype == tensors[name].dtype
        assert value.tobytes() == np.asarray(tensors[name]).tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_deepseek_v4(spelling, dtype):
    tensors = drawn(SPELLINGS[spelling], jnp.dtype(dtype))
    checkpoint = load(tensors, CONFIG)
    assert (checkpoint.model, checkpoint.streams) == ("deepseek_v4", N)
    assert checkpoint.config == checkpoint.head_config == presets.DEEPSEEK_V4
    assert len(checkpoint.layers) == LAYERS
    for i, sites in enumerate(checkpoint.layers):
        for site, params in sites.items():
            ours = [f"{i}.{site}_hc.", f"{i}.hc_{site}_"]
            arrays = [
                next(v for name, v in tensors.items() if name.endswith(tuple(o + p for o in ours)))
                for p in SHAPES
            ]
            expected = convert.from_deepseek_v4(*arrays)
            jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert_saved(checkpoint, tensors)
    assert bool(checkpoint.mtp) == (spelling == "deepseek")
    for module in checkpoint.mtp:
        assert module.keys() == {"attn", "ffn", "head"}


def test_settings_are_those_of_the_config():
    config = {**CONFIG, "hc_eps": 1e-4, "hc_sinkhorn_iters": 3, "rms_norm_eps": 1e-3}
    expected = dataclasses.replace(
        presets.DEEPSEEK_V4, pre_eps=1e-4, sinkhorn_eps=1e-4, sinkhorn_iters=3, norm_eps=1e-3
    )
    assert load(drawn(FILES), config).config == expected
    assert load(drawn(FILES), "deepseek_v4").config == presets.DEEPSEEK_V4


def test_glm5_has_its_settings_in_a_part_of_its_config_and_no_head():
    text = {**CONFIG, "model_type": "glm5_next_text", "rms_norm_eps": 1e-5}
    tensors = drawn(GLM5)
    checkpoint = load(tensors, {"model_type": "glm5_next", "text_config": text})
    assert (checkpoint.model, checkpoint.config, checkpoint.head) == ("glm5", presets.GLM5, None)
    assert_saved(checkpoint, tensors)


@pytest.mark.parametrize("spelling", HY4)
def test_hy4_has_two_gates_and_settings_of_its_own(spelling):
    config = {
        "model_type": "hy_v4", "hidden_size": C, "num_hidden_layers": LAYERS, "hc_mult": N,
        "hc_eps": 1e-4, "hc_magnitude": 1.5, "rms_norm_eps": 1e-3,
    }  # fmt: skip
    tensors = drawn(HY4[spelling])
    checkpoint = load(tensors, config)
    assert (checkpoint.model, checkpoint.streams) == ("hy4", N)
    assert checkpoint.config == checkpoint.head_config
    assert checkpoint.config == dataclasses.replace(
        presets.HY4, norm_eps=1e-3, pre_eps=1e-4, post_eps=1e-4, post_scale=1.5
    )
    assert load(tensors, "hy4").config == presets.HY4
    name = {"state_dict": "1.ffn_hc.", "files": "1.hc_pre.hc_mlp_layer.hc_"}[spelling]
    expected = convert.from_hy4(*(tensors[f"model.layers.{name}{part}"] for part in OF_HY4))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.layers[1]["ffn"], expected)
    assert checkpoint.head is not None
    assert_saved(checkpoint, tensors)
    with pytest.raises(ValueError, match=r"a projection of 4 streams of 3 channels"):
        load(tensors, CONFIG)


def test_deepseek_v41_has_its_schedule_and_no_head():
    tensors = drawn(named("layers.{i}.hc_{site}_{part}"))
    config = {**CONFIG, "model_type": "deepseek_v41_text", "rms_norm_eps": 1e-4}
    checkpoint = load(tensors, {"model_type": "deepseek_v41", "text_config": config})
    expected = dataclasses.replace(presets.DEEPSEEK_V41, norm_eps=1e-4)
    assert (checkpoint.model, checkpoint.config) == ("deepseek_v41", expected)
    assert checkpoint.head is None
    assert_saved(checkpoint, tensors)
    told = load(tensors, "deepseek_v41")
    assert told.config == presets.DEEPSEEK_V41
    # The parameters are those of V4, which the config alone tells from it.
    as_glm5 = load(tensors, "glm5")
    jax.tree.map(np.testing.assert_array_equal, told.layers, as_glm5.layers)
    assert as_glm5.config.schedule == "immediate"


def test_modules_that_predict_further_tokens_may_be_the_last_layers():
    checkpoint = load(drawn(FILES), {**CONFIG, "num_hidden_layers": LAYERS - 1})
    assert len(checkpoint.layers) == LAYERS


@pytest.mark.parametrize("model", ["megatron", "megatron_dev"])
def test_megatron(model):
    """Both branches have the same names, so that the caller has to say."""
    shapes = {f"decoder.hc_head_{part}": shape for part, shape in HEAD.items()}
    for i in range(LAYERS):
        for site in ("self_attention", "mlp"):
            for part, shape in MEGATRON.items():
                shapes[f"decoder.layers.{i}.{site}_hyper_connection.{part}"] = shape
    tensors = drawn(shapes)
    checkpoint = load(tensors, model)
    config = {"megatron": presets.MEGATRON, "megatron_dev": presets.MEGATRON_DEV}[model]
    assert (checkpoint.config, checkpoint.head_config) == (config, presets.DEEPSEEK_V4)
    prefix = "decoder.layers.1.mlp_hyper_connection."
    weight, *gates, bias = (tensors[prefix + part] for part in MEGATRON)
    alpha = np.concatenate(gates)
    expected = {
        "megatron": lambda: convert.from_megatron(weight, alpha, bias),
        "megatron_dev": lambda: convert.from_deepseek_v4(weight, bias, alpha),
    }[model]()
    jax.tree.map(np.testing.assert_array_equal, checkpoint.layers[1]["ffn"], expected)
    save(checkpoint, saved := {})
    assert saved.keys() == tensors.keys()
    for name, value in saved.items():
        assert value.tobytes() == tensors[name].tobytes(), name


@pytest.mark.parametrize("separator", ".-/")
@pytest.mark.parametrize("model", ["maxtext", "maxtext_lite"])
def test_maxtext_without_scanned_layers(model, separator):
    """Names of its trees, flattened; the weight of its norm, folded into phi, comes back too."""
    stacks = {"params.decoder.dense_layers_0": 0, "params.decoder.moe_layers_0": 1}
    tensors = {f"params.decoder.hc_head.hc_{part}": shape for part, shape in HEAD.items()}
    tensors = drawn({**tensors, "params.decoder.hc_head.hc_fn": (N * C, N)})
    sites = {"mhc_attention": "attn", "mhc_mlp": "ffn"}
    parts = {(stack, site): tensors_of(model, N, C) for stack in stacks for site in sites}
    for number, ((stack, site), values) in enumerate(parts.items()):
        values["pre_beta"] += number
        tensors |= {f"{stack}.{site}.{name}": value for name, value in values.items()}
    tensors = {name.replace(".", separator): value for name, value in tensors.items()}
    checkpoint = load(tensors, model)
    assert checkpoint.config == getattr(presets, model.upper())
    for (stack, site), values in parts.items():
        params = checkpoint.layers[stacks[stack]][sites[site]]
        jax.tree.map(np.testing.assert_array_equal, params, convert.from_maxtext(values))
    assert checkpoint.head.phi.shape == (N * C, N)
    save(checkpoint, saved := {})
    assert saved.keys() == tensors.keys()
    for name, value in saved.items():
        assert value.tobytes() == tensors[name].tobytes(), name


def write(folder, tensors, *, num_files=1, index=True, config=None):
    """A checkpoint of one file, or of several with an index."""
    names = sorted(tensors)
    files = {f"model-{k}.safetensors": names[k::num_files] for k in range(num_files)}
    for file, of_file in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in of_file}, folder / file)
    if num_files > 1 and index:
        weight_map = {name: file for file, of_file in files.items() for name in of_file}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model, settings", [("deepseek_v4", {}), ("hy4", {"post_scale": 1.5})])
def test_what_transformers_saved(model, settings):
    """Whole models, config.json and all (vectors/README.md)."""
    folder = Path(__file__).parent / "vectors" / f"{model}_tiny"
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    checkpoint = load(folder)
    expected = dataclasses.replace(getattr(presets, model.upper()), **settings)
    assert (checkpoint.model, checkpoint.streams) == (model, N)
    assert checkpoint.config == checkpoint.head_config == expected
    assert len(checkpoint.layers) == 4 and checkpoint.head is not None
    assert_saved(checkpoint, tensors)


@pytest.mark.parametrize("num_files, index", [(1, False), (3, True), (3, False)])
def test_files(num_files, index, tmp_path):
    tensors = drawn(FILES, jnp.bfloat16)
    write(tmp_path, tensors, num_files=num_files, index=index, config=CONFIG)
    checkpoint = load(tmp_path)
    assert_saved(checkpoint, tensors)
    some = {1: "model-0.safetensors", 3: "model.safetensors.index.json"}[num_files]
    if num_files == 1 or index:
        assert_saved(load(str(tmp_path / some)), tensors)
    save(checkpoint, tmp_path / "ours.safetensors")
    again = load(tmp_path / "ours.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.layers, checkpoint.layers)
    jax.tree.map(np.testing.assert_array_equal, again.head, checkpoint.head)
    loaded = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    assert all(value.tobytes() == tensors[name].tobytes() for name, value in loaded.items())


def test_trained_parameters_are_saved_in_the_stored_dtype():
    tensors = drawn(FILES, jnp.bfloat16)
    checkpoint = load(tensors, CONFIG)
    layers = jax.tree.map(lambda leaf: 1.01 * leaf, checkpoint.layers)
    save(dataclasses.replace(checkpoint, layers=layers), saved := {})
    for name, value in saved.items():
        factor = 1 if "head" in name else 1.01
        assert value.dtype == jnp.bfloat16
        expected = (factor * tensors[name].astype(np.float32)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(value.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "deepseek_v41", "text_config": CONFIG},
        {**CONFIG, "model_type": "deepseek_v41"},
        {**CONFIG, "architectures": ["DeepseekV41ForCausalLM"]},
    ],
)
def test_a_folder_with_the_config_of_v41_is_never_taken_for_v4(config, tmp_path):
    """Its names and shapes are V4's, and so may be a part of its config."""
    write(tmp_path, drawn(named("model.layers.{i}.hc_{site}_{part}")), config=config)
    others = ["deepseek_v4", "glm5"]
    for model in (None, "deepseek_v41"):
        if "architectures" in config:  # which is of another model than its type
            others.append(model)
        else:
            assert load(tmp_path, model).config.schedule == "delayed"
    for model in others:
        with pytest.raises(ValueError, match=r"convert\.load: model: .*deepseek_v41"):
            load(tmp_path, model)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="None and no config.json"):
        load(tmp_path)
    assert load(tmp_path, "deepseek_v41").config.schedule == "delayed"
    # It has no head, which V4 has.
    with pytest.raises(ValueError, match="none of head.fn"):
        load(tmp_path, "deepseek_v4")


def test_a_word_stands_in_for_a_type_that_is_not_known(tmp_path):
    config = {**CONFIG, "model_type": "a_model_of_mine", "rms_norm_eps": 1e-4}
    write(tmp_path, drawn(FILES), config=config)
    with pytest.raises(ValueError, match="config.json of a_model_of_mine"):
        load(tmp_path)
    assert load(tmp_path, "deepseek_v4").config.norm_eps == 1e-4
