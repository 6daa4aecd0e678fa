"""One wheel on every pair of jaxlib and Python that it is for, each in an environment of its own.

Runs pair.py in each of them: the ops, their gradients and transformations, and the export of a
program; then, in processes that import jax_mhc alone, the programs of all Pythons with the same
jaxlib and of one with each older jaxlib. Ends with a table; what cannot be had here is named in it.
Pythons are looked for on PATH and where pyenv has them, and --pythons adds others.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

# The oldest JAX that the package accepts, and the newest of each later minor; with the oldest
# Python that JAX publishes each for.
JAX = {"0.9.0": 11, "0.10.*": 11, "0.11.*": 12, "0.12.*": 12}
PYTHONS = (11, 12, 13, 14)
PAIR = Path(__file__).with_name("pair.py")


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    wheel: Path
    """The wheel."""
    jax: tuple[str, ...] = tuple(JAX)
    """Versions of jax and jaxlib, from old to new."""
    pythons: tuple[Path, ...] = ()
    """Interpreters beside those that are found."""
    jobs: int = os.cpu_count() or 1
    """Pairs at a time."""


@dataclasses.dataclass
class Pair:
    """One environment, and what came of it."""

    jax: str
    minor: int
    python: Path | None
    skipped: str = ""
    errors: dict[str, str | None] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"jax-{self.jax.removesuffix('.*')}-python-3.{self.minor}"


def find_pythons(others: Iterable[Path]) -> dict[int, Path]:
    """The minor versions of Python 3 that are here, each with an interpreter."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    folders += sorted(Path.home().glob(".pyenv/versions/3.*/bin"))
    found = [folder / f"python3.{minor}" for folder in folders for minor in PYTHONS]
    pythons: dict[int, Path] = {}
    for path in [*others, Path(sys.executable).resolve(), *found]:
        if path.exists():
            command = [path, "-c", "import sys; print(sys.version_info.minor)"]
            told = subprocess.run(command, capture_output=True, text=True)
            if told.returncode == 0:  # a shim may stand for a version that is not active
                pythons.setdefault(int(told.stdout), path)
    return pythons


def make_pairs(options: Options) -> list[Pair]:
    pythons = find_pythons(options.pythons)
    pairs = []
    for jax in options.jax:
        for minor in PYTHONS:
            pair = Pair(jax, minor, pythons.get(minor))
            if minor < (least := JAX.get(jax, 0)):
                pair.skipped = f"JAX publishes it for Python 3.{least} and later"
            elif pair.python is None:
                pair.skipped = f"no python3.{minor} here"
            pairs.append(pair)
    return pairs


def run(pair: Pair, wheel: Path, *arguments: object) -> None:
    """Runs pair.py in the environment; its errors are added to the pair's."""
    start = time.monotonic()
    packages = [f"jax=={pair.jax}", f"jaxlib=={pair.jax}", "flatbuffers", str(wheel)]
    # uv keeps what it unpacked, so that the environments share it.
    command = ["uv", "run", "--quiet", "--isolated", "--no-project", "--no-python-downloads"]
    command += ["--python", str(pair.python), *(f"--with={package}" for package in packages)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*command, "python", str(PAIR), *map(str, arguments)],
        capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    pair.seconds += time.monotonic() - start
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        pair.errors[str(arguments[0])] = f"ended with status {done.returncode}: {last}"
    else:
        pair.errors |= json.loads(done.stdout.splitlines()[-1])["errors"]


def run_all(pairs: list[Pair], options: Options, console: Console, folder: Path) -> None:
    """First all programs are written, then loaded."""
    here = [pair for pair in pairs if not pair.skipped]

    def write(pair: Pair) -> None:
        (folder / pair.name).mkdir()
        run(pair, options.wheel, "write", folder / pair.name)

    def load(pair: Pair) -> None:
        written = [other for other in here if (folder / other.name / "program").exists()]
        same = [other for other in written if other.jax == pair.jax]
        older = options.jax[: options.jax.index(pair.jax)]
        first = [next((o for o in written if o.jax == jax), None) for jax in older]
        others = [*filter(None, first), *same]
        run(pair, options.wheel, "load", *(folder / other.name for other in others))

    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        for label, what in (("ops and exports", write), ("programs of others", load)):
            task = progress.add_task(label, total=len(here))

            with ThreadPoolExecutor(options.jobs) as pool:
                for pair, _ in zip(here, pool.map(what, here), strict=True):
                    bad = sum(map(bool, pair.errors.values()))
                    progress.print(f"{pair.name}: {len(pair.errors) - bad} ok, {bad} failed")
                    progress.advance(task)


def make_table(pairs: list[Pair]) -> Table:
    table = Table()
    for header in ("jax", "Python", "checks", "programs of", "seconds", ""):
        table.add_column(header)
    for pair in pairs:
        own = {name: error for name, error in pair.errors.items() if not name.startswith("jax-")}
        loaded = {name: error for name, error in pair.errors.items() if name.startswith("jax-")}
        counts = [f"{sum(not e for e in of.values())} of {len(of)}" for of in (own, loaded)]
        failed = [f"{name}: {error}" for name, error in pair.errors.items() if error]
        if pair.skipped:
            table.add_row(pair.jax, f"3.{pair.minor}", "", "", "", f"skipped: {pair.skipped}")
        else:
            told = "\n".join(failed) or "ok"
            table.add_row(pair.jax, f"3.{pair.minor}", *counts, f"{pair.seconds:.0f}", told)
    return table


def main(options: Options) -> None:
    console, pairs = Console(), make_pairs(options)
    with tempfile.TemporaryDirectory(prefix="jax-mhc-abi-") as folder:
        run_all(pairs, options, console, Path(folder))
    console.print(make_table(pairs), highlight=False)
    skipped = [pair.name for pair in pairs if pair.skipped]
    failed = [pair.name for pair in pairs if any(pair.errors.values())]
    console.print(
        f"{len(pairs)} pairs: {len(pairs) - len(skipped) - len(failed)} passed, {len(failed)} "
        f"failed, {len(skipped)} skipped"
    )
    if failed or len(skipped) == len(pairs):
        raise SystemExit(f"pairs.py: failed: {', '.join(failed) or 'no pair could be had'}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
