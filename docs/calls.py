"""Writes docs/calls.md from the shared library's description of its table of calls.

python docs/calls.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_suffix(".md")

_HEAD = """\
<!-- Written by docs/calls.py from the table in kernels/src/contract/table.rs: change it there. -->

# The calls

A *call* is one direction of an op, and one custom call of a compiled program. XLA knows `pre_fwd`
as `{target}`, and the others alike. The number at the end is the version of this
table. Compiled programs outlive the library (JAX's persistent cache, exported programs), so any
change of meaning raises it. A call of version 2, 3 or 4 is an error that says to export the program
again.

All leading dimensions of the streams are tokens, `...` below, and are passed as they are. The
letters of the other dimensions:

- `n`: streams, 1 to {streams}.
- `C`: channels of one stream.
- `K`: coefficients, 2n + n² (`birkhoff`, `none`), 2n (`identity`) or 2n + n! (`permutations`, n up
  to {permuted_streams}); n in a head.
- `A`: gates, 3, 2 where H_res has no coefficients (`identity`), or 1 in a head.

Dtypes of the streams:

{dtypes}
All other arrays have the accumulation dtype: float32, or float64 where the streams are float64.
"""

_TAIL = """\
## What the values are

`h_res[i, j]` is the weight of stream j in new stream i. In `post_pre_*` the operands h_post and
h_res are of the sublayer before, and the parameters and all results but x_new of the one after.
In `post_pre_bwd` d_h_post and d_h_res are operands for the sublayer after, and results for the one
before.

m is r · (vec(x) phi), already multiplied by r. For static coefficients r is in the call, but
nothing reads it. rho is 1 / sqrt(mean(u²) + norm_scale_eps) of the u before the layer norm. u and
d_u of the table are those after it. So is u_norm, which `post_pre_bwd` reads where there is a norm.

`collapse_bwd` returns the part of d_h_pre that comes from u alone.

In `post_pre_*` u has the weights h_pre of its own sublayer, or h_given where they are in the call.
Then d_h_pre is all of the gradient of h_pre, and d_h_given[i] = ⟨d_u, x_new[i]⟩ that of the others.

## Deferred cotangents

The gradient of x from post is h_resᵀ G with G = d_x_new. post's backward call does not write it. A
context holds x twice, once in public and once in a private field for post alone, and the cotangent
of the latter is G by convention (`python/jax_mhc/_ops/deferred.py`). pre's backward call takes the
cotangent of either field as d_x_in. The attribute `deferred` says which: d_x = d_x_in + … where it
is 0, and d_x = h_resᵀ d_x_in + … where it is 1. JAX reports while it traces which of the two is
zero. Where neither is, plain JAX adds them up first. The backward call of post_pre takes d_x_new_in
in the same two ways, with h_res_new. It returns d_x_new, the gradient of x_new with all its parts,
which is the deferred cotangent of x of the sublayer before. For a context that a user or the
reference made, post's rule in Python applies h_resᵀ.

d_x_in lies in the memory that becomes d_x, and d_x_new_in in the memory of d_x_new, so that no
addition over n · C values of its own is needed. XLA copies it there first where something else
still reads it.
"""


def text(library: dict[str, Any]) -> str:
    """The page for a library that describes itself so."""
    limits, dtypes, version = library["limits"], library["dtypes"], library["target_version"]
    head = _HEAD.format(
        target=f"jax_mhc_pre_fwd_v{version}",
        dtypes="".join(f"- {name}: {', '.join(of)}.\n" for name, of in dtypes.items()),
        **limits,
    )
    sections = [head, _values(library), _calls(library), _attributes(library), _TAIL]
    return "\n".join(sections)


def _values(library: dict[str, Any]) -> str:
    """The shapes and dtypes, by name; a cotangent has those of its value."""
    rows: dict[str, tuple[str, str]] = {}
    for call in library["calls"]:
        for value in (*call["operands"], *call["results"]):
            dims = [*(["..."] if value["has_tokens"] else []), *value["dims"]]
            row = f"`[{', '.join(dims)}]`", value["precision"]
            # A cotangent that a call adds to has a name that no value has.
            is_added_to = value["name"].endswith("_in")
            name = value["name"] if is_added_to else value["name"].removeprefix("d_")
            if rows.setdefault(name, row) != row:
                raise ValueError(f"{name}: expected one shape in all calls, got {row}")
    table = [(f"`{name}`", *row) for name, row in rows.items()]
    return (
        "## Operands and results\n\n`d_<name>` is the cotangent of `<name>`, with its shape and"
        " dtype.\n\n" + _table(("value", "shape", "dtype"), table)
    )


def _calls(library: dict[str, Any]) -> str:
    """The operands and results of each call, in order, and the groups that it may lack."""
    groups = library["groups"]
    marks = dict(zip(groups, ("¹", "²", "³", "⁴"), strict=False))

    def names(values: Iterable[dict[str, Any]]) -> str:
        return ", ".join(value["name"] + marks.get(value["group"], "") for value in values)

    rows = [
        (f"`{call['name']}`", names(call["operands"]), names(call["results"]))
        for call in library["calls"]
    ]
    notes = [
        f"{marks[name]} Group `{name}`: in the call where the attribute of this name is 1.\n"
        f"{meaning}\n"
        for name, meaning in groups.items()
    ]
    in_place = [
        f"`{call['results'][0]['name']}` of `{call['name']}` may lie where "
        f"`{call['operands'][-1]['name']}` lies, to which the kernel adds.\n"
        for call in library["calls"]
        if call["adds_in_place"]
    ]
    order = (
        "The order is that of the call. Values of an absent group are not in it, and those after"
        "\nthem move up.\n"
    )
    table = _table(("call", "operands", "results"), rows)
    workspace = (
        "On a GPU a call may have one result more, the workspace (float32, one-dimensional). On a"
        "\nCPU a workspace is left alone.\n"
    )
    return "\n".join([order, table, *notes, *in_place, workspace])


def _attributes(library: dict[str, Any]) -> str:
    """The attributes, their types and values, and the calls that have them."""
    described: dict[str, dict[str, Any]] = {}
    calls: dict[str, list[str]] = {}
    for call in library["calls"]:
        for attribute in call["attributes"]:
            described[attribute["name"]] = attribute
            calls.setdefault(attribute["name"], []).append(call["name"])

    def values(attribute: dict[str, Any]) -> str:
        if attribute["type"] == "string":
            return ", ".join(f"`{choice}`" for choice in attribute["choices"])
        if attribute["type"] == "int64":
            return f"0 to {attribute['max']}"
        return "0 or more, finite"

    with_config = [call["name"] for call in library["calls"] if call["has_config"]]
    rows = [
        (
            f"`{name}`",
            attribute["type"],
            values(attribute),
            "all" if calls[name] == with_config else ", ".join(f"`{call}`" for call in calls[name]),
        )
        for name, attribute in described.items()
    ]
    without = ", ".join(f"`{call['name']}`" for call in library["calls"] if not call["attributes"])
    return (
        f"## Attributes\n\nSettings are the fields of `MHCConfig` by their names. Calls without any"
        f" attributes:\n{without}.\n\n"
        + _table(("attribute", "type", "values", "calls with settings"), rows)
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Writes the page."""
    from jax_mhc._call import library

    PATH.write_text(text(library.description()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
