"""Hyper-connections of whole checkpoints, read by their names and written back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_mhc import _errors
from jax_mhc._errors import Refusal
from jax_mhc._types import HeadParams, MHCConfig, MHCParams
from jax_mhc.convert import _arrays, _scanned, _settings
from jax_mhc.convert._files import Files
from jax_mhc.convert._models import MODELS, Model, Shapes
from jax_mhc.convert._names import Place, places_of
from jax_mhc.convert._scanned import Source


class Stored(NamedTuple):
    """A tensor as it was stored.

    Attributes:
        source: its name, and the layer of a scanned one.
        dtype: its dtype.
        shape: its shape.
        value: the tensor, where parameters do not determine it.
    """

    source: Source
    dtype: np.dtype
    shape: tuple[int, ...]
    value: jax.Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """The hyper-connections and the head of a model.

    `dataclasses.replace(checkpoint, layers=..., head=...)` is one with other parameters, such as
    trained ones, which `save` writes under the names of this one.

    Attributes:
        model: the model, by the word that `load` takes.
        streams: n.
        config: settings of the hyper-connections.
        head_config: settings of the head.
        layers: of each layer, the parameters by site: "attn" and "ffn".
        head: parameters of the head; None for models that leave the streams without one.
        mtp: the same as `layers` of the modules that predict further tokens, where the checkpoint
            has them in a stack of their own; a head of theirs is the site "head".
    """

    model: str
    streams: int
    config: MHCConfig
    head_config: MHCConfig
    layers: tuple[dict[str, MHCParams], ...]
    head: HeadParams | None = None
    mtp: tuple[dict[str, MHCParams | HeadParams], ...] = ()
    _stored: Mapping[Place, dict[str, Stored]] = dataclasses.field(default_factory=dict, repr=False)


def load(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, object],
    model: str | Mapping[str, object] | None = None,
) -> Checkpoint:
    """The hyper-connections of a checkpoint, by layer and site, with their settings.

        checkpoint = convert.load("DeepSeek-V4-Flash")
        attn = checkpoint.layers[0]["attn"]
        x = mhc_residual(attention, x, attn, config=checkpoint.config)

    Names are those of DeepSeek's files (`layers.0.hc_attn_fn`), of transformers' files
    (`model.layers.0.hc_attn_fn`) and state dicts (`model.layers.0.attn_hc.fn`), of Hy4's files, of
    Megatron Core (`decoder.layers.0.self_attention_hyper_connection.bias`), or of MaxText's trees,
    flattened (`params.decoder.layers_0.mhc_attention.pre_alpha`), with any prefix. No other tensors
    are read. Scanned layers of MaxText (`moe_layers.mhc_attention.pre_alpha`, `[nC, L, n]`) are
    layers like others, which `save` stacks again. Several models have the same names and compute
    something else with them: config.json beside the files tells which it is (`model_type`), and has
    the settings.
    Without it `model` must say.

    | model | |
    |---|---|
    | "deepseek_v4" | DeepSeek-V4, `presets.DEEPSEEK_V4` |
    | "deepseek_v41" | DeepSeek-V4.1, `presets.DEEPSEEK_V41`: leave by `collapse(x)` |
    | "glm5" | GLM-5.3, `presets.GLM5`: leave by `reduce(x)` |
    | "hy4" | Tencent's Hy4, `presets.HY4` |
    | "megatron", "megatron_dev" | Megatron Core, branches main and dev (`from_megatron`) |
    | "maxtext", "maxtext_lite" | MaxText, and its mHC-lite (`from_maxtext`) |

    Args:
        path_or_mapping: a safetensors file, an index of such files, a folder with either, or a
            mapping from names to arrays, such as a state dict. Files need the package safetensors.
        model: the model's word, or the contents of its config.json, such as
            `transformers_model.config.to_dict()`; None: as config.json tells. The word stands in
            for a `model_type` that is not in the table, and must not be another than that of one
            that is.

    Raises:
        TypeError: arguments of other types; tensors that are no floating-point numbers, such as
            quantised ones.
        ValueError: names that are missing, doubled or of another model; shapes that disagree with
            each other or with config.json; a model that is not known or not told. Nothing is
            returned then.
        ImportError: the package safetensors is not installed.
    """
    op = "convert.load"
    names, read, config = _source(op, path_or_mapping)
    if isinstance(model, Mapping):
        config, model = {str(key): value for key, value in model.items()}, None
    kind, named = places_of(op, names)
    word = _settings.model_word(op, model, config, kind)
    row, settings = MODELS[word], _settings.of_language_model(config or {})
    stored = read([name for parts in named.values() for name in parts.values()])
    is_maxtext = kind == "maxtext"
    places = _scanned.in_one_stack(op, named, stored) if is_maxtext else _scanned.as_named(named)
    _check_names(op, row, places, settings)
    tensors = {
        source: source.of(stored[source.name])
        for parts in places.values()
        for source in parts.values()
    }
    arrays = {source: _arrays.floating(op, str(source), tensors[source]) for source in tensors}
    streams, width = _sizes(op, row, places, arrays, settings)
    for place, parts in places.items():
        for part, shape in _shapes(row, place).items():
            _arrays.shaped(op, str(parts[part]), arrays[parts[part]], shape(streams, width))
    params: dict[Place, Any] = {
        place: (row.layout.read_head if place.site == "head" else row.layout.read)(
            *(arrays[parts[part]] for part in _shapes(row, place))
        )
        for place, parts in places.items()
    }
    kept = {
        place: {
            part: Stored(
                source := parts[part],
                np.dtype(tensors[source].dtype),
                arrays[source].shape,
                arrays[source] if row.layout.keeps and place.site != "head" else None,
            )
            for part in _shapes(row, place)
        }
        for place, parts in places.items()
    }
    return Checkpoint(
        model=word,
        streams=streams,
        config=_settings.configured(row.config, row, settings),
        head_config=_settings.configured(row.head_config, row, settings),
        layers=_stack(params, "layers"),
        head=params.get(Place("", 0, "head")),
        mtp=_stack(params, "mtp"),
        _stored=kept,
    )


def save(
    checkpoint: Checkpoint, path_or_mapping: str | os.PathLike[str] | MutableMapping[str, Any]
) -> None:
    """Writes the tensors of a checkpoint under the names and in the dtypes that they came with.

    What `load` returned is written bit for bit; other parameters are rounded to the stored dtype.
    A file has these tensors alone; a mapping keeps its others.

    Args:
        checkpoint: what `load` returned, or one with other parameters of the same shapes.
        path_or_mapping: path of a safetensors file, which must not be there yet, or a mapping
            from names to arrays, which gets NumPy's.

    Raises:
        TypeError: arguments of other types.
        ValueError: parameters of other layers, sites or shapes than those that were loaded; a
            path that is there.
        ImportError: the package safetensors is not installed.
    """
    op = "convert.save"
    if not isinstance(checkpoint, Checkpoint):
        raise Refusal(TypeError, op, "checkpoint").expected(
            "jax_mhc.convert.Checkpoint", _errors.typed(checkpoint), "It is what load returns."
        )
    if isinstance(path_or_mapping, MutableMapping):
        path_or_mapping.update(_tensors(op, checkpoint))
        return
    path = _path(op, path_or_mapping)
    if path.exists():
        raise Refusal(ValueError, op, "path_or_mapping").expected(
            "a path where nothing is yet",
            repr(str(path)),
            "A checkpoint has other tensors, too, which would be lost: give a name of its own.",
        )
    _errors.require(op, "safetensors", "safetensors")
    from safetensors.numpy import save_file

    save_file(_tensors(op, checkpoint), path, metadata={"format": "pt"})


def _tensors(op: str, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Tensors by name in the dtypes that they were stored in."""
    layout = MODELS[checkpoint.model].layout
    stacks: dict[str, tuple[dict[str, Any], ...]] = {
        "layers": checkpoint.layers,
        "mtp": checkpoint.mtp,
    }
    params: dict[Place, Any] = {
        Place(stack, layer, site): value
        for stack, layers in stacks.items()
        for layer, sites in enumerate(layers)
        for site, value in sites.items()
    }
    if checkpoint.head is not None:
        params[Place("", 0, "head")] = checkpoint.head
    if params.keys() != checkpoint._stored.keys():
        raise Refusal(ValueError, op, "checkpoint").expected(
            "the layers and sites that were loaded",
            _arrays.difference(checkpoint._stored, params),
            "Replace the parameters of a checkpoint that load returned.",
        )
    tensors: dict[Source, np.ndarray] = {}
    for place, stored in checkpoint._stored.items():
        value = params[place]
        if place.site == "head":
            arrays = layout.write_head(value)
        else:
            like = {part: each.value for part, each in stored.items() if each.value is not None}
            arrays = layout.write(value, checkpoint.streams, like)
        for each, array in zip(stored.values(), arrays, strict=True):
            checked = _arrays.shaped(op, str(each.source), array, each.shape)
            tensors[each.source] = np.asarray(checked).astype(each.dtype)
    return _scanned.joined(tensors)


def _source(
    op: str, source: object
) -> tuple[
    Iterable[str],
    Callable[[list[str]], Mapping[str, Any]],
    dict[str, Any] | None,
]:
    """Names of all tensors, what reads some of them, and the contents of config.json."""
    if isinstance(source, Mapping):
        return (
            source,
            lambda names: {name: _arrays.plain(op, name, source[name]) for name in names},
            None,
        )
    files = Files(op, _path(op, source))
    return files.names, files.read, files.config


def _path(op: str, value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise Refusal(TypeError, op, "path_or_mapping").expected(
            "a path, or a mapping from names to arrays",
            _errors.typed(value),
            "Pass the path of a safetensors file or of a checkpoint's folder.",
        )
    return Path(value)


def _shapes(row: Model, place: Place) -> Shapes:
    return row.layout.head_shapes if place.site == "head" else row.layout.shapes


def _check_names(
    op: str, row: Model, places: dict[Place, dict[str, Source]], settings: dict[str, Any]
) -> None:
    """Every layer has its two sites, every site its tensors, and the head is as the model's."""
    wanted = []
    given = [f"{place}.{part}" for place, parts in places.items() for part in parts]
    for stack in ("layers", "mtp"):
        num = 1 + max((place.layer for place in places if place.stack == stack), default=-1)
        if stack == "layers":
            # Modules that predict further tokens may be the last layers.
            fewest = _settings.integer(op, settings, "num_hidden_layers") or max(num, 1)
            further = _settings.integer(op, settings, "num_nextn_predict_layers", 0) or 0
            num = min(max(num, fewest), fewest + further)
        num = min(num, len(places) + 1)  # of which one is missing, whatever the numbers are
        wanted += [Place(stack, layer, site) for layer in range(num) for site in ("attn", "ffn")]
    wanted += [place for place in places if place.stack == "mtp" and place.site == "head"]
    head = Place("", 0, "head")
    if row.has_head or (row.has_head is None and head in places):
        wanted.append(head)
    expected = [f"{place}.{part}" for place in wanted for part in _shapes(row, place)]
    if set(given) != set(expected):
        raise Refusal(ValueError, op, "path_or_mapping").expected(
            "all tensors of the model's hyper-connections and no others",
            _arrays.difference(expected, given),
            "Pass the whole checkpoint, and the model that it is of: DeepSeek-V4 and Hy4 have a "
            "head, DeepSeek-V4.1 and GLM-5.3 have none.",
        )


def _sizes(
    op: str,
    row: Model,
    places: dict[Place, dict[str, Source]],
    arrays: dict[Source, jax.Array],
    settings: dict[str, Any],
) -> tuple[int, int]:
    """The number of streams and the hidden width, of which config.json has no others."""
    first = places[Place("layers", 0, "attn")][next(iter(row.layout.shapes))]
    told = [_settings.integer(op, settings, key) for key in ("hc_mult", "hidden_size")]
    sizes = row.layout.sizes(arrays[first].shape)
    if sizes is None or any(t not in (None, size) for t, size in zip(told, sizes, strict=True)):
        raise Refusal(ValueError, op, str(first)).expected(
            f"a projection of {told[0] or 'n'} streams of {told[1] or 'C'} channels",
            f"shape {list(arrays[first].shape)}",
            "The tensors and config.json belong together.",
        )
    return sizes


def _stack(params: dict[Place, Any], stack: str) -> tuple[dict[str, Any], ...]:
    """Parameters by layer and site."""
    num = 1 + max((place.layer for place in params if place.stack == stack), default=-1)
    layers: tuple[dict[str, Any], ...] = tuple({} for _ in range(num))
    for place, value in params.items():
        if place.stack == stack:
            layers[place.layer][place.site] = value
    return layers
