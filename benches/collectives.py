"""The collectives of a compiled program."""

from __future__ import annotations

import collections
import math
import re

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """By kind, how many there are in the text of a program, and the numbers that they give.

    Those in the body of a loop count once, and those that give nothing not at all.
    """
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for types, kind in re.findall(rf"= (\(.*?\)|\S+) ({_KINDS})(?:-done)?\(", text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", types)
        counts[kind][0] += 1
        counts[kind][1] += sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)
    return {kind: (num, size) for kind, (num, size) in counts.items() if size}
