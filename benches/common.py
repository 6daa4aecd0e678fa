"""Parts that the benchmarks of the CPU and of the GPU kernels share."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jax_mhc as mhc
from jax_mhc import info
from jax_mhc._measure.sublayer import FUSED, forward, gradients
from jax_mhc._measure.times import Event, kernel_times, median_us, profiled, relative_error

__all__ = [
    "FUSED", "Event", "forward", "gradients", "kernel_times", "median_us", "profiled",
    "relative_error",
]  # fmt: skip

STREAMS = 4


def inputs(
    key: jax.Array, tokens: int, hidden: int, dtype: str, sigma: float = 1.2
) -> tuple[Any, ...]:
    """Random x, y, params, d_u and d_x_new of a sublayer; sigma is the gate of h_res' logits."""
    keys = jax.random.split(key, 6)
    num = STREAMS**2 + 2 * STREAMS
    scale = float((STREAMS * hidden) ** -0.5)
    params = mhc.MHCParams(
        phi=scale * jax.random.normal(keys[0], (STREAMS * hidden, num), jnp.float32),
        alpha=jnp.asarray([1.0, 0.8, sigma], jnp.float32),
        bias=0.5 * jax.random.normal(keys[1], (num,), jnp.float32),
    )
    x = jax.random.normal(keys[2], (tokens, STREAMS, hidden), dtype)
    y = jax.random.normal(keys[3], (tokens, hidden), dtype)
    d_u = jax.random.normal(keys[4], (tokens, hidden), dtype)
    d_x_new = jax.random.normal(keys[5], (tokens, STREAMS, hidden), dtype)
    return x, y, params, d_u, d_x_new


def memory(program: Any) -> dict[str, int]:
    """Memory that the compiled program needs, in bytes."""
    analysis = program.memory_analysis()
    sizes = {
        name: getattr(analysis, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp")
    }
    peak = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return {**{f"{name}_bytes": size for name, size in sizes.items()}, "peak_bytes": peak}


def versions() -> dict[str, Any]:
    """The machine with an accelerator and what is installed on it."""
    installed = {d.name: d.version for d in metadata.distributions()}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "gpu": jax.devices()[0].device_kind,
        "driver": driver,
        "jax": jax.__version__,
        "plugin": next(
            (f"{n} {v}" for n, v in installed.items() if re.fullmatch(r"jax-cuda\d+-plugin", n)),
            None,
        ),
        "python": platform.python_version(),
        "library_commit": info.collect()["library"]["commit"],
    }


def commit() -> str:
    """The commit of the working tree; empty outside a repository."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def gpu_folder(record: dict[str, Any]) -> str:
    """The name of its GPU's folder in benches/results."""
    return "-".join(record["gpu"].lower().removeprefix("nvidia ").split())


def write(record: dict[str, Any], text: str, folder: Path, suffix: str = "") -> None:
    """Writes <date><suffix>.json and .md, each as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['date']}{suffix}.json"
    contents = {path: json.dumps(record, indent=1) + "\n", path.with_suffix(".md"): text}
    for target, content in contents.items():
        part = target.with_name(f".{target.name}")
        part.write_text(content)
        part.replace(target)
    print(f"Written to {path} and {path.with_suffix('.md').name}.")
