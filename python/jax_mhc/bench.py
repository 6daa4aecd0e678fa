"""Cost of mHC on this machine: the fused kernels, plain JAX and the floor, in one table.

    python -m jax_mhc.bench --tokens 8192 --hidden 4096 --picture bench.svg

Timed are a sublayer forward (pre and post, with nothing between them), the same with all gradients,
and a stack of sublayers with all gradients. The floor is the time in which a copy, measured in the
same run, moves the bytes that must move. Before anything is timed, the kernels' results on a few
tokens are checked against float64.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax

from jax_mhc import _errors, reference
from jax_mhc._call import dispatch, library
from jax_mhc._errors import Refusal
from jax_mhc._limits import MAX_PERMUTED_STREAMS
from jax_mhc._measure import sublayer, times
from jax_mhc._measure.sublayer import DONATED, FUSED, Case, Dtype, What

_OP = "bench.measure"
DTYPES = get_args(Dtype)
CONSTRAINTS = ("birkhoff", "permutations", "none", "identity", "static")
SUBLAYERS_PER_LAYER = 2
_MOST_LAYERS = 1000
# Sizes of a copy in bytes, so that no cache holds it and small machines have room.
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


def measure(
    *,
    hidden: int,
    tokens: int,
    streams: int = 4,
    dtype: str = "bfloat16",
    constraint: str = "birkhoff",
    layers: int = 2,
    report: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Times the fused kernels and plain JAX on JAX's default device.

    On NVIDIA GPUs a time is the sum over a program's kernels, elsewhere the median wall time. Plain
    JAX is the fastest form known to us: on GPUs one that rounds phi to the streams' dtype, on CPUs
    `jax_mhc.reference`. The layers of the stack return what they read.

    Args:
        hidden: C.
        tokens: T, at least 1.
        streams: n, from 1 to 16.
        dtype: of the streams: "bfloat16", "float16" or "float32".
        constraint: that of the config, or "static" for static coefficients.
        layers: of the stack, each of attention and MLP, so of two sublayers.
        report: called with what is being done, before it is.

    Returns:
        A dictionary that `json.dumps` takes:

        - `device`, `jax`, `library_commit` and `copy_gb_per_s`, read and written;
        - the arguments, and `sublayers` of the stack;
        - `error`: largest relative L2 errors against float64 of `streams` and of gradients of
          `parameters`;
        - `rows`: of each pass its name (`what`) and the microseconds `plain_us`, `fused_us` and
          `floor_us`.

    Raises:
        ValueError, TypeError: sizes or names out of range, or sizes that need more memory than
            there is.
        RuntimeError: the kernels cannot be used, or their results are wrong.
    """
    case = _case(hidden, tokens, streams, dtype, constraint)
    remedy = "Each has two sublayers; a few are enough."
    layers = _errors.integer(_OP, "layers", layers, 1, _MOST_LAYERS, remedy)
    sublayers = SUBLAYERS_PER_LAYER * layers
    platform = dispatch.default_platform()
    if reason := library.missing(platform):
        raise Refusal(RuntimeError, _OP, "the default device").expected(
            "one that the fused kernels can use", f"{platform}: {reason}", "See jax_mhc.info."
        )
    report("check of the results")
    error = sublayer.errors(case)
    if complaint := sublayer.above_limits(case, error):
        raise RuntimeError(f"jax_mhc.{_OP}: wrong results of the kernels: {complaint}.")
    report("bandwidth of a copy")
    rate = times.copied_bytes_per_us(_COPY_BYTES[platform])
    implementations = {
        "plain_us": reference if platform == "cpu" else case.plain_ops,
        "fused_us": FUSED,
    }
    passes: dict[What, str] = {
        "fwd": "forward",
        "fb": "forward and backward",
        "stack": f"stack of {sublayers}, forward and backward",
    }
    programs = {}
    for what, name in passes.items():
        for implementation, ops in implementations.items():
            report(f"compilation: {name}, {implementation.removesuffix('_us')}")
            program = sublayer.compile_program(case, ops, what, sublayers)
            _check_memory(program, f"{name}, {implementation.removesuffix('_us')}")
            programs[what, implementation] = program
    report("inputs")
    arguments = jax.block_until_ready(jax.jit(sublayer.inputs(case))(jax.random.key(0)))
    rows = []
    for what, name in passes.items():
        row: dict[str, Any] = {"what": name}
        for implementation in implementations:
            report(f"timing: {name}, {implementation.removesuffix('_us')}")
            row[implementation] = _time_us(programs[what, implementation], arguments)
        rows.append(row | {"floor_us": sublayer.floor_us(case, what, rate, sublayers)})
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "library_commit": library.status()["commit"],
        "copy_gb_per_s": rate / 1e3,
        "hidden": case.hidden,
        "tokens": case.tokens,
        "streams": case.streams,
        "dtype": case.dtype,
        "constraint": case.constraint,
        "layers": layers,
        "sublayers": sublayers,
        "error": dict(zip(("streams", "parameters"), error, strict=True)),
        "rows": rows,
    }


def _case(hidden: int, tokens: int, streams: int, dtype: Any, constraint: Any) -> Case:
    dtype = _errors.choice(_OP, "dtype", dtype, DTYPES)
    constraint = _errors.choice(_OP, "constraint", constraint, CONSTRAINTS)
    n = _errors.num_streams(_OP, "streams", streams)
    if constraint == "permutations":
        remedy = "There are n! permutations."
        _errors.integer(_OP, "streams", n, 1, MAX_PERMUTED_STREAMS, remedy)
    hidden = _errors.width(_OP, hidden)
    remedy = "Give those of a batch on one device: sequences times their length."
    tokens = _errors.integer(_OP, "tokens", tokens, 1, _errors.MAX_SIZE, remedy)
    return Case(n, hidden, tokens, dtype, constraint)


def _check_memory(program: Any, what: str) -> None:
    """Checks that a program fits into memory: a process on a CPU would be ended without a word."""
    analysis, device = program.memory_analysis(), jax.devices()[0]
    if analysis is None:
        return
    needed = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    if device.platform == "cpu":
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        there = (device.memory_stats() or {}).get("bytes_limit", needed)
    if needed > there:
        raise Refusal(ValueError, _OP, "tokens").expected(
            f"sizes that need at most the {there / 1e9:.1f} GB that are there",
            f"sizes that need {needed / 1e9:.1f} GB ({what})",
            "Give fewer tokens or layers.",
        )


def _time_us(program: Any, arguments: tuple[Any, ...]) -> float:
    repeats = 4
    if jax.default_backend() == "cpu":
        copy = jax.numpy.copy(arguments[DONATED])
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments[:DONATED], copy, *arguments[DONATED + 1 :]))
        seconds = time.perf_counter() - start
        repeats = max(1 if seconds > 5 else 3, min(15, int(2 / seconds)))
    return times.time_us(program, arguments, repeats, donated=DONATED)[0]


# ---- the report ---------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> str:
    """What `measure` returns, as text."""
    error = measured["error"]
    clock = "median wall times" if measured["device"] == "cpu" else "sums over kernels"
    head = (
        f"{measured['tokens']} tokens, C = {measured['hidden']}, n = {measured['streams']}, "
        f"{measured['dtype']}, {measured['constraint']}\n"
        f"{measured['device']}, jax {measured['jax']}, library {measured['library_commit']}; "
        f"times in ms, {clock}\n"
        f"errors against float64: {error['streams']:.1e} of streams, {error['parameters']:.1e} of "
        f"parameters' gradients\n"
        f"floor: the bytes that must move, at the {measured['copy_gb_per_s']:.0f} GB/s of a copy\n"
    )
    cells = [["", "plain JAX", "fused", "faster by", "floor", "floor / fused"]]
    for row in measured["rows"]:
        plain, fused, floor = (row[f"{name}_us"] / 1e3 for name in ("plain", "fused", "floor"))
        ratios = f"{plain / fused:.1f}", f"{floor / fused:.2f}"
        shown = (_shown(plain), _shown(fused), ratios[0], _shown(floor), ratios[1])
        cells.append([row["what"], *shown])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join([head, *lines])


def _shown(value: float) -> str:
    """A time with three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def picture(measured: dict[str, Any], path: Path) -> None:
    """Draws the table; a file's ending says of what kind. Needs matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, OSError: a kind that matplotlib does not write, or a file that cannot be.
    """
    _errors.require("bench", "matplotlib", "plots")
    from matplotlib.figure import Figure

    bars = {"plain_us": ("plain JAX", "#D55E00"), "fused_us": ("fused", "#0072B2")}
    bars["floor_us"] = ("floor", "#999999")
    rows = measured["rows"]
    figure = Figure(figsize=(8, 1.6 + 0.9 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for at, (key, (label, color)) in enumerate(bars.items()):
        values = [row[key] / 1e3 for row in rows]
        places = [place + 0.27 * (at - 1) for place in range(len(rows))]
        drawn = axes.barh(places, values, 0.25, color=color, label=label)
        axes.bar_label(drawn, [_shown(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row["what"].replace(", ", ",\n") for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    sizes = f"{measured['tokens']} × {measured['hidden']}, n = {measured['streams']}"
    axes.set_title(f"mHC, {sizes}, {measured['dtype']}, {measured['device']}", loc="left")
    figure.savefig(path)


class _Progress:
    """A line on standard error: rewritten on a terminal, one after the other elsewhere."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()

    def __call__(self, what: str) -> None:
        text = f"\r\x1b[K{what} ..." if self.is_terminal else f"{what} ...\n"
        print(text, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jax_mhc.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, required=True, help="T, of a batch on one device")
    parser.add_argument("--hidden", type=int, required=True, help="C, the width of the layers")
    parser.add_argument("--streams", type=int, default=4, help="n, from 1 to 16; default 4")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--constraint", default="birkhoff", help=", ".join(CONSTRAINTS))
    parser.add_argument(
        "--layers", type=int, default=2, help="of the stack, each of two sublayers; default 2"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw it; .svg, .png ...")
    given = vars(parser.parse_args(arguments))
    path, progress = given.pop("picture"), _Progress()
    try:
        if path is not None:  # before the minutes that timing takes
            _errors.require("bench", "matplotlib", "plots")
            _check_writable(path)
        measured = measure(**given, report=progress)
        progress.end()
        print(table(measured))
        if path is not None:
            picture(measured, path)
            print(f"\nDrawn in {path}.")
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        progress.end()
        parser.error(str(error))


def _check_writable(path: Path) -> None:
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise Refusal(ValueError, "bench", "--picture").expected(
            f"a file that ends in {', '.join(f'.{kind}' for kind in sorted(kinds))}",
            _errors.shown(str(path)),
            "Choose one of these.",
        )
    if not path.parent.is_dir():
        raise Refusal(ValueError, "bench", "--picture").expected(
            "a file in a folder that is there", _errors.shown(str(path)), "Make the folder first."
        )


if __name__ == "__main__":
    _main(sys.argv[1:])
