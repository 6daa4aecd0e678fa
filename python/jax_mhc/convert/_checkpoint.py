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
from jax_mhc._limits import MAX_STREAMS
from jax_mhc._types import HeadParams, MHCConfig, MHCParams
from jax_mhc.convert import _arrays
from jax_mhc.convert._files import Files
from jax_mhc.convert._models import MODELS, NAMES, SITES, SUSPECT, Model, Shapes


class Place(NamedTuple):
    """The hyper-connection or head that a tensor is of: `layers[3].attn`, or `head`."""

    stack: str
    layer: int
    site: str

    def __str__(self) -> str:
        """The place in a message."""
        return f"{self.stack}[{self.layer}].{self.site}" if self.stack else self.site


class Stored(NamedTuple):
    """A tensor as it was stored."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
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
    _stored: Mapping[Place, tuple[Stored, ...]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )


def load(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, object],
    model: str | Mapping[str, object] | None = None,
) -> Checkpoint:
    """The hyper-connections of a checkpoint, by layer and site, with their settings.

        checkpoint = convert.load("DeepSeek-V4-Flash")
        attn = checkpoint.layers[0]["attn"]
        x = mhc_residual(attention, x, attn, config=checkpoint.config)

    Names are those of DeepSeek's files (`layers.0.hc_attn_fn`), of transformers' files
    (`model.layers.0.hc_attn_fn`) and state dicts (`model.layers.0.attn_hc.fn`), of Hy4's files, or
    of Megatron Core (`decoder.layers.0.self_attention_hyper_connection.bias`), with any prefix. No
    other tensors are read. Several models have the same names and compute something else with
    them: config.json beside the files tells which it is (`model_type`), and has the settings.
    Without it `model` must say.

    | model | |
    |---|---|
    | "deepseek_v4" | DeepSeek-V4, `presets.DEEPSEEK_V4` |
    | "glm5" | GLM-5.3, `presets.GLM5`: leave by `reduce(x)` |
    | "megatron", "megatron_dev" | Megatron Core, branches main and dev (`from_megatron`) |
    | "deepseek_v41", "hy4" | DeepSeek-V4.1 and Hy4: refused, for want of their settings |

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
    kind, places = _places(op, names)
    word = _model_word(op, model, config, kind)
    row, settings = MODELS[word], _flat(config or {})
    if row.lacks:
        raise Refusal(ValueError, op, "model").expected(
            "one that this version of jax_mhc can compute", repr(word), f"It lacks {row.lacks}."
        )
    _check_names(op, row, places, settings)
    tensors = read([name for parts in places.values() for name in parts.values()])
    arrays = {name: _arrays.floating(op, name, value) for name, value in tensors.items()}
    streams, width = _sizes(op, row, places, arrays, settings)
    for place, parts in places.items():
        for part, shape in _shapes(row, place).items():
            _arrays.shaped(op, parts[part], arrays[parts[part]], shape(streams, width))
    params: dict[Place, Any] = {
        place: (row.layout.read_head if place.site == "head" else row.layout.read)(
            *(arrays[parts[part]] for part in _shapes(row, place))
        )
        for place, parts in places.items()
    }
    stored = {
        place: tuple(
            Stored(parts[part], np.dtype(tensors[parts[part]].dtype), arrays[parts[part]].shape)
            for part in _shapes(row, place)
        )
        for place, parts in places.items()
    }
    return Checkpoint(
        model=word,
        streams=streams,
        config=_configured(row.config, row, settings),
        head_config=_configured(row.head_config, row, settings),
        layers=_stack(params, "layers"),
        head=params.get(Place("", 0, "head")),
        mtp=_stack(params, "mtp"),
        _stored=stored,
    )


def save(
    checkpoint: Checkpoint, path_or_mapping: str | os.PathLike[str] | MutableMapping[str, Any]
) -> None:
    """Writes the tensors of a checkpoint under the names and in the dtypes that they came with.

    What `load` returned is written bit for bit; other parameters are rounded to the stored dtype.
    A file has these tensors alone: `model.load_state_dict(tensors, strict=False)` of PyTorch and
    `mapping.update(tensors)` put them among the others.

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
    tensors = {}
    for place, stored in checkpoint._stored.items():
        value = params[place]
        if place.site == "head":
            arrays = layout.write_head(value)
        else:
            arrays = layout.write(value, checkpoint.streams)
        for (name, dtype, shape), array in zip(stored, arrays, strict=True):
            tensors[name] = np.asarray(_arrays.shaped(op, name, array, shape)).astype(dtype)
    return tensors


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


def _places(op: str, names: Iterable[str]) -> tuple[str, dict[Place, dict[str, str]]]:
    """The row of `NAMES` that fits, and the names of each place by their ends."""
    found: dict[str, dict[Place, dict[str, str]]] = {}
    strange = []
    for name in names:
        match = next(
            ((kind, fit) for kind, pattern in NAMES if (fit := pattern.fullmatch(str(name)))), None
        )
        if match is None:
            if SUSPECT.search(str(name)):
                strange.append(str(name))
            continue
        kind, fit = match
        groups = {"stack": "", "layer": "0", **fit.groupdict()}
        stack = "mtp" if "mtp" in groups["stack"] else groups["stack"]
        place = Place(stack, int(groups["layer"]), SITES[groups["site"]])
        parts = found.setdefault(kind, {}).setdefault(place, {})
        if groups["part"] in parts:
            raise Refusal(ValueError, op, str(name)).expected(
                f"one name for {groups['part']} of {place}",
                f"{parts[groups['part']]}, too",
                "Pass the tensors of one model, under one spelling.",
            )
        parts[groups["part"]] = str(name)
    heads = {}
    if "megatron" in found and all(place.site == "head" for place in found.get("hc", ())):
        heads = found.pop("hc", {})  # whose names are DeepSeek's there, too
    if strange or len(found) != 1:
        got = _arrays.few(strange) if strange else f"names of {len(found)} kinds of models"
        raise Refusal(ValueError, op, "path_or_mapping").expected(
            "the hyper-connections of one model that is known, such as layers.0.hc_attn_fn",
            got,
            "The docstring of load has the names that are known; the other functions of "
            "jax_mhc.convert take arrays under any name.",
        )
    ((kind, places),) = found.items()
    return kind, dict(sorted({**places, **heads}.items()))


def _model_word(op: str, model: object, config: dict[str, Any] | None, kind: str) -> str:
    """The model that the caller or config.json tells, and not by its names."""
    words = [word for word, row in MODELS.items() if row.names == kind]
    told = _types(config or {})
    by_config = [word for word, row in MODELS.items() if told & set(row.types)]
    if model is not None:
        word = _errors.choice(op, "model", model, tuple(MODELS), "None", "a config.json")
        if word not in words or (by_config and word not in by_config):
            raise Refusal(ValueError, op, "model").expected(
                f"one of {', '.join(map(repr, by_config or words))}, as "
                f"{'config.json' if by_config else 'the names of the tensors'} tells",
                repr(word),
                "Models that share names compute something else with them.",
            )
        return word
    if len(by_config) == 1 and by_config[0] in words:
        return by_config[0]
    got = f"a config.json of {', '.join(sorted(told))}" if told else "None and no config.json"
    raise Refusal(ValueError, op, "model").expected(
        f"one of {', '.join(map(repr, words))}, whose tensors have these names",
        got,
        "Models that share names compute something else with them: say which it is.",
    )


def _types(config: Mapping[str, Any]) -> set[str]:
    """What config.json calls the model, and the part of it that is a language model."""
    text = config.get("text_config")
    types = [config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None]
    return {value for value in types if isinstance(value, str)}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the language model."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def _shapes(row: Model, place: Place) -> Shapes:
    return row.layout.head_shapes if place.site == "head" else row.layout.shapes


def _check_names(
    op: str, row: Model, places: dict[Place, dict[str, str]], settings: dict[str, Any]
) -> None:
    """Every layer has its two sites, every site its tensors, and the head is as the model's."""
    wanted = []
    given = [f"{place}.{part}" for place, parts in places.items() for part in parts]
    for stack in ("layers", "mtp"):
        num = 1 + max((place.layer for place in places if place.stack == stack), default=-1)
        if stack == "layers":
            # Modules that predict further tokens may be the last layers.
            fewest = _integer(settings, "num_hidden_layers") or max(num, 1)
            further = _integer(settings, "num_nextn_predict_layers") or 0
            num = min(max(num, fewest), fewest + further)
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
            "Pass the whole checkpoint, and the model that it is of.",
        )


def _sizes(
    op: str,
    row: Model,
    places: dict[Place, dict[str, str]],
    arrays: dict[str, jax.Array],
    settings: dict[str, Any],
) -> tuple[int, int]:
    """The number of streams and the hidden width, by config.json and the first projection."""
    first = next(iter(row.layout.shapes))
    name = places[Place("layers", 0, "attn")][first]
    rows, columns = (0, 0, *arrays[name].shape)[-2:]
    counts = {row.layout.count(n): n for n in range(1, MAX_STREAMS + 1)}
    n = counts.get(rows, 1)
    told = _integer(settings, "hc_mult"), _integer(settings, "hidden_size")
    if (
        rows not in counts
        or arrays[name].ndim != 2
        or (columns // n) * n != columns
        or not columns
        or told[0] not in (None, n)
        or told[1] not in (None, columns // n)
    ):
        words = [
            str(known) if known else unknown for known, unknown in zip(told, "nC", strict=True)
        ]
        raise Refusal(ValueError, op, name).expected(
            f"a projection of {words[0]} streams of {words[1]} channels",
            f"shape {list(arrays[name].shape)}",
            "The tensors and config.json belong together.",
        )
    return n, columns // n


def _integer(settings: Mapping[str, Any], key: str) -> int | None:
    """A number of config.json that is above 0; None where it has none."""
    value = settings.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _configured(config: MHCConfig, row: Model, settings: dict[str, Any]) -> MHCConfig:
    """Settings of a model with those that its config.json has."""
    values = {
        field: settings[key]
        for key, fields in row.settings.items()
        if settings.get(key) is not None
        for field in fields
    }
    return dataclasses.replace(config, **values)


def _stack(params: dict[Place, Any], stack: str) -> tuple[dict[str, Any], ...]:
    """Parameters by layer and site."""
    num = 1 + max((place.layer for place in params if place.stack == stack), default=-1)
    layers: tuple[dict[str, Any], ...] = tuple({} for _ in range(num))
    for place, value in params.items():
        if place.stack == stack:
            layers[place.layer][place.site] = value
    return layers
