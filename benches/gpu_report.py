"""The record of gpu.py as text."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from common import STREAMS
from gpu_ops import DTYPE, IMPLEMENTATIONS
from tabulate import tabulate

import jax_mhc as mhc


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _kernel_us(row: dict[str, Any], implementation: str) -> float:
    """Kernel time; wall time where there is no profile."""
    return row[implementation]["kernel_us"] or row[implementation]["wall_us"]


def _worst(found: dict[str, float], coefficients: bool) -> str:
    chosen = [error for name, error in found.items() if name.startswith("h_") == coefficients]
    return f"{max(chosen):.1e}" if chosen else ""


def markdown(record: dict[str, Any]) -> str:
    rows, first = record["rows"], record["first_call_ms"]
    others = [found for found in record["peers"] if "us" in found]
    libraries = sorted({found["library"] for found in others})

    def shape(row: dict[str, Any]) -> str:
        return f"{row['tokens']} × {row['hidden']}"

    def peer(row: dict[str, Any], library: str) -> str:
        key = (library, row["tokens"], row["hidden"])
        found = [o for o in others if (o["library"], o["tokens"], o["hidden"]) == key]
        return _us(found[0]["us"].get(row["op"])) if found else ""

    def memory_in_streams(row: dict[str, Any]) -> list[str]:
        stream_bytes = row["tokens"] * row["hidden"] * jnp.dtype(DTYPE).itemsize
        sizes = [
            row[implementation]["memory"].get(f"{what}_bytes")
            for what in ("saved", "temp", "peak")
            for implementation in IMPLEMENTATIONS
        ]
        return ["" if size is None else f"{size / stream_bytes:.2f}" for size in sizes]

    times = [
        [
            shape(row), row["op"], _us(_kernel_us(row, "fused")), _us(row["fused"]["wall_us"]),
            _us(row["floor_us"]), f"{row['floor_us'] / _kernel_us(row, 'fused'):.2f}",
            _us(row["goal_us"]), _us(_kernel_us(row, "plain")),
            f"{_kernel_us(row, 'plain') / _kernel_us(row, 'fused'):.1f}",
            *(peer(row, library) for library in libraries),
            _worst(row["fused"]["errors"], False), _worst(row["fused"]["errors"], True),
            _worst(row["plain"]["errors"], False), _worst(row["plain"]["errors"], True),
        ]
        for row in rows
    ]  # fmt: skip
    time_headers = [
        "T × C", "op", "fused, µs", "wall, µs", "floor, µs", "floor / fused", "goal, µs",
        "plain JAX, µs", "faster by", *(f"{library}, µs" for library in libraries),
        "error", "error of h", "plain JAX error", "of h",
    ]  # fmt: skip
    results = list(dict.fromkeys(name for row in record["peaked"] for name in row["fused"]))
    peaked = [
        [
            row["hidden"], row["op"], f"{row['sigma']:.0f}", name,
            *(f"{row[name][key]:.1e}" if key in row[name] else "" for key in results),
        ]
        for row in record["peaked"]
        for name in IMPLEMENTATIONS
    ]  # fmt: skip
    decode = [
        [
            shape(row), _us(row["graph"]["us"]), _us(row["graph"]["goal_us"]),
            _us(row["graph"]["wall_us"]),
            "?" if row["graph"]["launches"] is None else row["graph"]["launches"],
            _us(_kernel_us(row, "fused")), _us(_kernel_us(row, "plain")),
            round(sum(kernel["launches"] for kernel in row["plain"]["kernels"].values())),
            _us(row["plain"]["wall_us"]),
        ]
        for row in rows
        if "graph" in row
    ]  # fmt: skip
    decode_headers = [
        "T × C", "fused in a graph, µs", "goal, µs", "wall, µs", "graphs", "fused, µs of kernels",
        "plain JAX, µs of kernels", "its kernels", "its wall time, µs",
    ]  # fmt: skip
    memories = [[shape(row), row["op"], *memory_in_streams(row)] for row in rows]
    memory_headers = [
        f"{what}, {name}"
        for what in ("saved", "temporary", "peak")
        for name in ("fused", "plain JAX")
    ]
    kernels = [
        [shape(row), row["op"], name, f"{kernel['launches']:.3g}", _us(kernel["us"])]
        for row in rows
        for name, kernel in row["fused"]["kernels"].items()
    ]
    stages = [
        [name, *(f"{first[key][stage]:.1f}" for stage in ("lower", "compile", "first", "again"))]
        for key, name in {
            "x_plus_1": "x + 1", "pre": "first fused pre", "next_shape": "pre of another shape",
        }.items()
    ]  # fmt: skip
    copies = ", ".join(f"{name} {rate:.0f}" for name, rate in record["copy_gb_per_s"].items())
    names = ", ".join(sorted({f"{found['library']} {found['version']}" for found in others}))
    failed = [found["error"] for found in record["peers"] if "error" in found]
    table = functools.partial(tabulate, tablefmt="github", disable_numparse=True)
    return "\n".join(
        [
            f"# {record['gpu']}, {record['date']}",
            "",
            f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
            f"Python {record['python']}, commit {record['commit']} (library: "
            f"{record['library_commit']}). n = {STREAMS}, {DTYPE}, "
            f"{mhc.presets.PAPER.sinkhorn_iters} Sinkhorn iterations. Copy bandwidth: "
            f"{copies} GB/s; the floor is the bytes that must move at the faster of the two. "
            "Errors: largest relative L2 error of any result against float64; of h: coefficients.",
            "",
            table(times, time_headers),
            "",
            "µs: summed kernel time; wall: medians of calls queued one after the other. "
            + (f"Other libraries ({names}): CUDA graph replay." if names else "")
            + (f" Not timed: {'; '.join(failed)}." if failed else ""),
            "",
            "## Decode: pre of few tokens",
            "",
            "In a graph: a call among 150 in one program, from the start of the first kernel to "
            "the end of the last; wall: the same with the launch; graphs: the number of launches.",
            "",
            table(decode, decode_headers),
            "",
            "## Errors by the deviation σ of the logits of h_res",
            "",
            f"On all of {record['peaked'][0]['tokens']} tokens.",
            "",
            table(peaked, ["C", "op", "σ", "", *results]),
            "",
            "## Memory, in streams (u = 2·C bytes a token)",
            "",
            "Saved: from the forward to the backward pass, beyond x, y and the parameters. "
            "Temporary and peak: of the compiled program; inputs and results are part of the peak.",
            "",
            table(memories, ["T × C", "op", *memory_headers]),
            "",
            "## Kernels",
            "",
            table(kernels, ["T × C", "op", "kernel", "launches", "µs"]),
            "",
            "## First call of a process, ms",
            "",
            table(stages, ["", "tracing and lowering", "XLA's compilation", "first run", "next"]),
            "",
            f"Import: {first['import']:.1f} ms. The first call of pre costs "
            f"{first['beyond_compile_ms']:.1f} ms more than that of x + 1, compilation left out.",
            "",
        ]
    )
