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


def of_language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the language model."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def integer(settings: Mapping[str, Any], key: str) -> int | None:
    """A number of config.json that is above 0; None where it has none."""
    value = settings.get(key)
    return value if isinstance(value, int) and value > 0 else None


def configured(config: MHCConfig, row: Model, settings: dict[str, Any]) -> MHCConfig:
    """Settings of a model with those that its config.json has."""
    values = {
        field: settings[key]
        for key, fields in row.settings.items()
        if settings.get(key) is not None
        for field in fields
    }
    return dataclasses.replace(config, **values)
