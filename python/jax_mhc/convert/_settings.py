"""Settings that config.json has, and the model that it is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_mhc import _errors
from jax_mhc._errors import Refusal
from jax_mhc._types import MHCConfig
from jax_mhc.convert._models import MODELS, Model


def model_word(op: str, model: object, config: dict[str, Any] | None, kind: str) -> str:
    """The model that the caller or config.json tells, and not by its names."""
    words = [word for word, row in MODELS.items() if row.names == kind]
    told, by_config = _told(config or {})
    if model is not None:
        word = _errors.choice(op, "model", model, tuple(MODELS), "None", "a config.json")
        if word not in words or by_config not in ([], [word]):
            raise Refusal(ValueError, op, "model").expected(
                f"one of {', '.join(map(repr, by_config or words))}, as "
                f"{'config.json' if by_config else 'the names of the tensors'} tells",
                repr(word),
                "Models that share names compute something else with them.",
            )
        return word
    if len(by_config) == 1 and by_config[0] in words:
        return by_config[0]
    got = f"a config.json of {', '.join(told)}" if told else "None and no config.json"
    raise Refusal(ValueError, op, "model").expected(
        f"one of {', '.join(map(repr, words))}, whose tensors have these names",
        got,
        "Models that share names compute something else with them: say which it is.",
    )


def _told(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What config.json calls the model, and the models that are called so.

    Its part for a language model has a word only where the whole has none that is known: the text
    model of DeepSeek-V4.1 may go by the name of another.
    """
    text = config.get("text_config")
    parts = [config, text if isinstance(text, Mapping) else {}]
    words: list[str] = []
    for part in parts:
        architectures = part.get("architectures")
        some = architectures if isinstance(architectures, list) else []
        here = [word for word in (part.get("model_type"), *some) if isinstance(word, str)]
        words += here
        models = [model for model, row in MODELS.items() if set(here) & set(row.types)]
        if models:
            return words, models
    return words, []


def of_language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the language model."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def integer(op: str, settings: Mapping[str, Any], key: str, least: int = 1) -> int | None:
    """A number of config.json that is at least `least`; None where it has none."""
    value = settings.get(key)
    if value is None or (type(value) is int and value >= least):
        return value
    raise Refusal(ValueError, op, f"{key} of config.json").expected(
        f"an integer of at least {least}", _errors.typed(value), "Download or save it again."
    )


def configured(config: MHCConfig, row: Model, settings: dict[str, Any]) -> MHCConfig:
    """Settings of a model with those that its config.json has."""
    values = {
        field: settings[key]
        for key, fields in row.settings.items()
        if settings.get(key) is not None
        for field in fields
    }
    return dataclasses.replace(config, **values)
