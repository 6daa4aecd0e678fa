"""Times of programs and of copies, and errors of results."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData


class Event(NamedTuple):
    """An event of a profile."""

    plane: str
    line: str
    name: str
    start_us: float
    us: float

    @property
    def is_kernel(self) -> bool:
        """Whether it is a kernel's run: other lines group the same time by module or operation."""
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


def time_us(
    program: Any, arguments: tuple[Any, ...], repeats: int, *, donated: int, only: str = ""
) -> tuple[float, dict[str, float]]:
    """Time of a program that overwrites the argument `donated`, and that of its kernels.

    On a GPU that is the sum over the kernels whose names begin with `only`; where there is no
    profile of kernels, the median wall time.
    """

    def run(copy: jax.Array) -> None:
        jax.block_until_ready(program(*arguments[:donated], copy, *arguments[donated + 1 :]))

    def copied() -> jax.Array:
        return jax.block_until_ready(jnp.copy(arguments[donated]))

    if jax.default_backend() == "cpu":
        return median_us(run, repeats, copied), {}
    walls = []
    # Before the profile, which would count the copies.
    copies = [copied() for _ in range(repeats + 1)]

    def once() -> None:
        start = time.perf_counter()
        run(copies.pop())
        walls.append(1e6 * (time.perf_counter() - start))

    once()
    walls.clear()

    def all_runs() -> None:
        for _ in range(repeats):
            once()

    kernels = kernel_times(all_runs, repeats)
    us = sum(kernel["us"] for name, kernel in kernels.items() if name.startswith(only))
    return us or statistics.median(walls), {name: k["us"] for name, k in kernels.items()}


def copied_bytes_per_us(num_bytes: int) -> float:
    """Bytes that a copy moves in a microsecond, read and written; it moves `num_bytes` in all."""
    if jax.default_backend() == "cpu":
        return cpu_copied_bytes_per_us(num_bytes, 9)
    source = jnp.ones(num_bytes // 4, jnp.bfloat16)
    program = jax.jit(jnp.copy).lower(source).compile()

    def once() -> float:
        found = kernel_times(lambda: program(source), 1)
        return sum(kernel["us"] for kernel in found.values())

    jax.block_until_ready(program(source))
    least = min(once() for _ in range(5))
    # Where there is no profile of kernels.
    least = least or median_us(lambda: jax.block_until_ready(program(source)), 5)
    return 2 * source.nbytes / least


def cpu_copied_bytes_per_us(num_bytes: int, repeats: int) -> float:
    """The same of all cores of the CPU, from memory to memory that is there already; a median."""
    source = np.ones(num_bytes // 2, np.uint8)
    target = np.empty_like(source)
    threads = os.cpu_count() or 1
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

        return num_bytes / median_us(copy, repeats)


def relative_error(got: Any, exact: Any) -> float:
    """L2 norm of the difference over that of the exact array."""
    got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
