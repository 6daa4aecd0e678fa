"""Table of the models whose checkpoints can be read: their names, settings and layout.

A model that is added has a row in `MODELS`, and in `NAMES` of `_names.py` where its tensors have
names of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jax_mhc import presets
from jax_mhc._limits import MAX_STREAMS
from jax_mhc._types import HeadParams, MHCConfig, MHCParams
from jax_mhc.convert import _arrays, _maxtext
from jax_mhc.convert._deepseek_v4 import (
    from_deepseek_v4,
    head_from_deepseek_v4,
    head_to_deepseek_v4,
    to_deepseek_v4,
)
from jax_mhc.convert._hy4 import from_hy4, to_hy4
from jax_mhc.convert._megatron import from_megatron, to_megatron

#: Tensors of one hyper-connection, or of a head, in the order of the layout.
Tensors: TypeAlias = tuple[jax.Array, ...]
#: Shapes of tensors by the ends of their names, for n streams of C channels.
Shapes: TypeAlias = Mapping[str, Callable[[int, int], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Tensors of a hyper-connection and of a head, and what makes our parameters of them.

    Attributes:
        shapes: of the tensors.
        sizes: n and C by the shape of the first tensor; None where they cannot be.
        read: of the tensors, the parameters.
        write: of the parameters, n and the tensors that were read, the tensors.
        keeps: whether `write` reads the tensors, since parameters do not determine them.
        head_shapes: of the tensors of a head.
        read_head: of these, the parameters of the head.
        write_head: of the parameters of the head, the tensors.
    """

    shapes: Shapes
    sizes: Callable[[tuple[int, ...]], tuple[int, int] | None]
    read: Callable[..., MHCParams]
    write: Callable[[MHCParams, int, Mapping[str, jax.Array]], Tensors]
    keeps: bool = False
    head_shapes: Shapes = dataclasses.field(
        default_factory=lambda: {
            "fn": lambda n, c: (n, n * c),
            "base": lambda n, c: (n,),
            "scale": lambda n, c: (1,),
        }
    )
    read_head: Callable[..., HeadParams] = head_from_deepseek_v4
    write_head: Callable[[HeadParams], Tensors] = head_to_deepseek_v4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model.

    Attributes:
        names: the rows of `NAMES` that its tensors are of.
        types: what `model_type` and `architectures` of its config.json may be.
        layout: of its tensors.
        config: settings of its hyper-connections, but for those that its config.json has.
        head_config: settings of its head, likewise.
        settings: keys of config.json, and the fields of MHCConfig that they set.
        has_head: whether it has a head; None: it may.
    """

    names: str
    types: tuple[str, ...] = ()
    layout: Layout
    config: MHCConfig = presets.DEEPSEEK_V4
    head_config: MHCConfig = presets.DEEPSEEK_V4
    settings: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    has_head: bool | None = None


def _of_rows(
    shape: tuple[int, ...], count: _arrays.Count = _arrays.square
) -> tuple[int, int] | None:
    """Sizes n and C by a projection `[K, nC]`."""
    n = _arrays.streams_of(shape[0], count) if len(shape) == 2 else 0
    return (n, shape[1] // n) if n and shape[1] and shape[1] % n == 0 else None


def _of_columns(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Sizes n and C by a projection `[nC, n]`."""
    n = shape[1] if len(shape) == 2 and shape[1] <= MAX_STREAMS else None
    return (n, shape[0] // n) if n and shape[0] and shape[0] % n == 0 else None


def _concatenated(turn: Callable[..., MHCParams]) -> Callable[..., MHCParams]:
    """Parameters of Megatron's tensors by a function of weight, alpha and bias."""

    def read(weight: jax.Array, *gates_and_bias: jax.Array) -> MHCParams:
        *gates, bias = gates_and_bias
        return turn(weight, jnp.concatenate(gates), bias)

    return read


def _split(weight: jax.Array, alpha: jax.Array, bias: jax.Array) -> Tensors:
    return weight, *jnp.split(alpha, 3), bias


def _write_megatron_dev(params: MHCParams, streams: int, _: object) -> Tensors:
    weight, bias, alpha = to_deepseek_v4(params, streams=streams)
    return _split(weight, alpha, bias)


def _read_maxtext(*tensors: jax.Array) -> MHCParams:
    return _maxtext.from_maxtext(dict(zip(_maxtext.NAMES, tensors, strict=True)))


def _write_maxtext(params: MHCParams, streams: int, like: Mapping[str, jax.Array]) -> Tensors:
    written = _maxtext.to_maxtext(params, like=like, streams=streams)
    return tuple(written[name] for name in _maxtext.NAMES)


_DEEPSEEK_V4 = Layout(
    shapes={
        "fn": lambda n, c: (n * n + 2 * n, n * c),
        "base": lambda n, c: (n * n + 2 * n,),
        "scale": lambda n, c: (3,),
    },
    sizes=_of_rows,
    read=from_deepseek_v4,
    write=lambda params, streams, _: to_deepseek_v4(params, streams=streams),
)
_HY4 = Layout(
    shapes={
        "fn": lambda n, c: (2 * n, n * c),
        "base": lambda n, c: (2 * n,),
        "scale": lambda n, c: (2,),
    },
    sizes=lambda shape: _of_rows(shape, _arrays.unmixed),
    read=from_hy4,
    write=lambda params, streams, _: to_hy4(params, streams=streams),
)
_MEGATRON = Layout(
    shapes={
        "mapping_proj.weight": lambda n, c: (n * n + 2 * n, n * c),
        **dict.fromkeys(("alpha_pre", "alpha_post", "alpha_res"), lambda n, c: (1,)),
        "bias": lambda n, c: (n * n + 2 * n,),
    },
    sizes=_of_rows,
    read=_concatenated(from_megatron),
    write=lambda params, streams, _: _split(*to_megatron(params, streams=streams)),
)
_MEGATRON_DEV = dataclasses.replace(
    _MEGATRON,
    read=_concatenated(lambda weight, alpha, bias: from_deepseek_v4(weight, bias, alpha)),
    write=_write_megatron_dev,
)

_MAXTEXT = Layout(
    shapes=_maxtext.shapes(lite=False),
    sizes=_of_columns,
    read=_read_maxtext,
    write=_write_maxtext,
    keeps=True,
    head_shapes={**_DEEPSEEK_V4.head_shapes, "fn": lambda n, c: (n * c, n)},
    read_head=_maxtext.head_from_maxtext,
    write_head=_maxtext.head_to_maxtext,
)

_SETTINGS = {
    "rms_norm_eps": ("norm_eps",),
    "hc_eps": ("pre_eps", "sinkhorn_eps"),
    "hc_sinkhorn_iters": ("sinkhorn_iters",),
}

#: Models by the word that `load` takes.
MODELS: Mapping[str, Model] = {
    "deepseek_v4": Model(
        names="hc",
        types=("deepseek_v4", "DeepseekV4ForCausalLM"),
        layout=_DEEPSEEK_V4,
        settings=_SETTINGS,
        has_head=True,
    ),
    "deepseek_v41": Model(
        names="hc",
        types=("deepseek_v41", "deepseek_v41_text", "DeepseekV41ForCausalLM"),
        layout=_DEEPSEEK_V4,
        config=presets.DEEPSEEK_V41,
        settings=_SETTINGS,
        has_head=False,
    ),
    "glm5": Model(
        names="hc",
        types=("glm5_next", "glm5_next_text"),
        layout=_DEEPSEEK_V4,
        config=presets.GLM5,
        settings=_SETTINGS,
        has_head=False,
    ),
    "hy4": Model(
        names="hc",
        types=("hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
        layout=_HY4,
        config=presets.HY4,
        head_config=presets.HY4,
        settings={
            "rms_norm_eps": ("norm_eps",),
            "hc_eps": ("pre_eps", "post_eps"),
            "hc_magnitude": ("post_scale",),
        },
        has_head=True,
    ),
    "megatron": Model(
        names="megatron", layout=_MEGATRON, config=presets.MEGATRON, head_config=presets.DEEPSEEK_V4
    ),
    "megatron_dev": Model(
        names="megatron",
        layout=_MEGATRON_DEV,
        config=presets.MEGATRON_DEV,
        head_config=presets.DEEPSEEK_V4,
    ),
    "maxtext": Model(
        names="maxtext",
        layout=_MAXTEXT,
        config=presets.MAXTEXT,
        head_config=presets.MAXTEXT,
    ),
    "maxtext_lite": Model(
        names="maxtext",
        layout=dataclasses.replace(_MAXTEXT, shapes=_maxtext.shapes(lite=True)),
        config=presets.MAXTEXT_LITE,
        head_config=presets.MAXTEXT,
    ),
}
