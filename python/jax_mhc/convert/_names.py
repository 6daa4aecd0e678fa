"""Names of tensors in checkpoints, and the hyper-connection that each is of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from jax_mhc._errors import Refusal
from jax_mhc.convert import _arrays

# Patterns of names, whose groups are stack (layers; mtp: modules that predict further tokens),
# layer, site and part; those of a head have stack and layer where it is a module's. They stand for:
# state dicts of transformers, its files and those of DeepSeek, Hy4's files, Megatron Core, MaxText,
# whose trees are flattened with any separator, and whose stacks _scanned.py resolves.
_LAYER = r"(?:\w+\.)*?(?P<stack>layers|mtp|mtp\.layers)\.(?P<layer>\d+)\."
_PART = r"(?P<part>fn|base|scale)"
NAMES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (names, re.compile(pattern))
    for names, pattern in (
        ("hc", rf"{_LAYER}(?P<site>attn|ffn)_hc\.{_PART}"),
        ("hc", rf"{_LAYER}hc_(?P<site>attn|ffn|head)_{_PART}"),
        ("hc", rf"{_LAYER}(?:hc_pre\.)?hc_(?P<site>attn|mlp)_layer\.hc_{_PART}"),
        ("hc", rf"(?:\w+[./-])*?(?P<site>hc_head)(?:_|[./-]hc_|\.hc_head_){_PART}"),
        (
            "megatron",
            rf"{_LAYER}(?:\w+_layer\.)?(?P<site>self_attention|mlp)_hyper_connection\."
            r"(?P<part>mapping_proj\.weight|alpha_pre|alpha_post|alpha_res|bias)",
        ),
        (
            "maxtext",
            r"(?:\w+[./-])*?(?P<stack>(?:scanned_blocks[./-])?layers(?:_\d+)?"
            r"|(?:dense|moe)_layers(?:_engram_\d+|(?:_\d+){0,2}))[./-]mhc_(?P<site>attention|mlp)[./-]"
            r"(?P<part>(?:pre|post|res)_(?:alpha|beta|alpha_scale)|mhc_norm[./-]scale)",
        ),
    )
)
SITES = {
    "attn": "attn", "self_attention": "attn", "attention": "attn", "ffn": "ffn", "mlp": "ffn",
    "head": "head", "hc_head": "head",
}  # fmt: skip
# Names that look like those of hyper-connections, all above among them: where none of the patterns
# fits one, it is of another model, or of a quantised tensor.
SUSPECT = re.compile(r"(^|[./-])m?hc_|_m?hc[./-]|hyper_connection")


class Place(NamedTuple):
    """The hyper-connection or head that a tensor is of: `layers[3].attn`, or `head`."""

    stack: str
    layer: int
    site: str

    def __str__(self) -> str:
        """The place in a message."""
        return f"{self.stack}[{self.layer}].{self.site}" if self.stack else self.site


def places_of(op: str, names: Iterable[str]) -> tuple[str, dict[Place, dict[str, str]]]:
    """The row of `NAMES` that fits, and the names of each place by their ends."""
    found: dict[str, dict[Place, dict[str, str]]] = {}
    strange = []
    for name in filter(SUSPECT.search, map(str, names)):
        match = next(
            ((kind, fit) for kind, pattern in NAMES if (fit := pattern.fullmatch(name))), None
        )
        if match is None:
            strange.append(name)
            continue
        kind, fit = match
        groups = {"stack": "", "layer": "0", **fit.groupdict()}
        stack = "mtp" if "mtp" in groups["stack"] else re.sub("[/-]", ".", groups["stack"])
        place = Place(stack, int(groups["layer"]), SITES[groups["site"]])
        parts, part = found.setdefault(kind, {}).setdefault(place, {}), groups["part"]
        part = re.sub("[/-]", ".", part)
        if part in parts:
            raise Refusal(ValueError, op, name).expected(
                f"one name for {part} of {place}",
                f"{parts[part]}, too",
                "Pass the tensors of one model, under one spelling.",
            )
        parts[part] = name
    heads = {}
    if len(found) > 1 and all(place.site == "head" for place in found.get("hc", ())):
        heads = found.pop("hc", {})  # Megatron and MaxText have DeepSeek's names of the head
    if strange or len(found) != 1:
        got = _arrays.few(strange) if strange else f"names of {len(found)} kinds of models"
        raise Refusal(ValueError, op, "path_or_mapping").expected(
            "the hyper-connections of one model that is known, such as layers.0.hc_attn_fn",
            got,
            "The docstring of load has the names that are known: flatten a tree, and multiply "
            "quantised tensors by their scales. The other functions of jax_mhc.convert take arrays "
            "under any name.",
        )
    ((kind, places),) = found.items()
    return kind, dict(sorted({**places, **heads}.items()))
