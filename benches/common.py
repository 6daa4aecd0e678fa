"""Parts that the benchmarks of the CPU and of the GPU kernels share."""

from __future__ import annotations

import functools
import json
import platform
import re
import statistics
import subprocess
import tempfile
import time
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData

import jax_mhc as mhc
from jax_mhc import info
from jax_mhc._types import Context

STREAMS = 4

# The public ops, running the fused kernels. The module `jax_mhc.reference` has the same functions.
FUSED = types.SimpleNamespace(
    **{
        name: functools.partial(getattr(mhc, name), implementation="fused")
        for name in mhc.reference.__all__
    }
)


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


def forward(ops: Any, x: Any, y: Any, params: Any, **options: Any) -> tuple[Any, Any]:
    """pre, with its options, and post of a sublayer whose layer returns y whatever it reads."""
    u, ctx = ops.pre(x, params, **options)
    # Where the layer would be, so that XLA does not fuse across it. Without the streams, or their
    # gradients that are missing would be arrays of zeros.
    coefficients = ctx.h_pre, ctx.h_post, ctx.h_res
    u, y, coefficients = jax.lax.optimization_barrier((u, y, coefficients))
    return u, ops.post(y, Context._of(ctx.x, ctx._deferred, *coefficients))


def gradients(
    ops: Any, x: Any, y: Any, params: Any, d_u: Any, d_x_new: Any, **options: Any
) -> dict[str, Any]:
    """The same, and the gradients of x, y, params and the options.

    These come first, so that a d_x_new that is donated becomes d_x.
    """
    results, vjp = jax.vjp(
        lambda x, y, params, options: forward(ops, x, y, params, **options), x, y, params, options
    )
    results, d_u, d_x_new = jax.lax.optimization_barrier((results, d_u, d_x_new))
    return {"gradients": vjp((d_u, d_x_new)), "results": results}


def relative_error(got: Any, exact: Any) -> float:
    """L2 norm of the difference over that of the exact array."""
    got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def median_us(
    run: Callable[..., Any], repeats: int, prepare: Callable[[], Any] | None = None
) -> float:
    """Median time of run(), or of run(prepare()) without the time to prepare."""
    times = []
    for _ in range(repeats + 1):
        prepared = () if prepare is None else (prepare(),)
        start = time.perf_counter()
        run(*prepared)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e6


class Event(NamedTuple):
    plane: str
    line: str
    name: str
    start_us: float
    us: float

    @property
    def is_kernel(self) -> bool:
        # The other lines group the same time by module, operation or step.
        return "/device:GPU" in self.plane and self.line.startswith("Stream")


def profiled(run: Callable[[], Any]) -> list[Event]:
    """Events that the profiler saw of a run, on the host and on the GPU."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = ProfileData.from_file(str(path))
        return [
            Event(plane.name, line.name, event.name, event.start_ns / 1e3, event.duration_ns / 1e3)
            for plane in profile.planes
            for line in plane.lines
            for event in line.events
        ]


def kernel_times(run: Callable[[], Any], calls: int) -> dict[str, dict[str, float]]:
    """Launches and microseconds of each kernel in one of the calls that run makes."""
    kernels: dict[str, dict[str, float]] = {}
    for event in profiled(run):
        if event.is_kernel:
            kernel = kernels.setdefault(event.name, {"launches": 0.0, "us": 0.0})
            kernel["launches"] += 1 / calls
            kernel["us"] += event.us / calls
    return dict(sorted(kernels.items(), key=lambda item: -item[1]["us"]))


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
