"""Times a sublayer in all configurations that models have, beside plain JAX and the bytes' floor.

Writes benches/results/<gpu>/<date>-configurations.json and .md. With an option that leaves
something out they are called <date>-configurations-part, which the pages and the package's table do
not read. A configuration whose check fails is not timed; the records are then called -wrong, and
the program exits with 1.

- fwd, fb and stack: `jax_mhc._measure.sublayer` has the programs. Of a stack, of four sublayers,
  the kernels named mhc_ count alone. Of a head fwd is the head, and fb the head with its gradients.
- X has about 2^27 elements, but where a row is of few tokens.
- Floor: the bytes that must move at the bandwidth of a copy in the same run.
- Plain JAX: `jax_mhc._measure.plain`, or `jax_mhc.reference` for constraints that it has not. The
  latter, which implementation=None takes, is timed beside it where plain JAX is less than half
  again as slow as the kernels.
- Check: all results on a few tokens against float64, on the CPU.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import common
import jax
import numpy as np
import tyro
from rich.progress import Progress
from tabulate import tabulate

import jax_mhc as mhc
from jax_mhc._measure import plain, times
from jax_mhc._measure.sublayer import (
    DONATED,
    FUSED,
    Case,
    Constraint,
    Dtype,
    What,
    above_limits,
    compile_program,
    errors,
    floor_us,
    inputs,
)

Implementation = Literal["fused", "plain"]

ELEMENTS, FEW_TOKENS = 2**27, 32
# Configurations that are compiled at once, each with all its programs.
CHUNK = 16
# Times of plain JAX over the kernels below which `jax_mhc.reference` is timed too.
NEAR = 1.5
# Fields that tell configurations apart.
KEY = ("streams", "hidden", "dtype", "constraint", "norm", "tokens")


def of(
    streams: int,
    hidden: int,
    dtype: Dtype = "bfloat16",
    constraint: Constraint = "birkhoff",
    *,
    norm: bool = False,
    few: int | None = None,
) -> Case:
    """A configuration; `few` are its tokens where they are few."""
    most = ELEMENTS // (streams * hidden)
    tokens = few or max(1024, 2 ** int(np.log2(most)))
    return Case(streams, hidden, tokens, dtype, constraint, norm)


def key(case: Case) -> tuple[Any, ...]:
    """Values that tell its row from others."""
    return tuple(getattr(case, name) for name in KEY)


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def cases() -> list[Case]:
    """All configurations."""
    widths = (
        512, 768, 1000, 1024, 1280, 1536, 1600, 2048, 2050, 2304, 2560, 3072, 3584, 4096, 4104,
        4608, 5120, 6144, 7168, 8192, 12288, 16384,
    )  # fmt: skip
    found = [of(4, hidden) for hidden in widths]
    found += [of(n, hidden) for n in (1, 2, 3, 8, 16) for hidden in (2048, 4096)]
    found += [of(n, 2048) for n in (5, 6, 7, 12)]
    found += [
        of(4, hidden, dtype) for dtype in ("float16", "float32") for hidden in (1024, 2048, 4096)
    ]
    found += [of(4, 4096, dtype, "identity") for dtype in ("float16", "float32")]
    for constraint in ("identity", "permutations"):
        found += [of(4, hidden, constraint=constraint) for hidden in (1024, 2048, 4096, 6144, 8192)]
    for constraint in ("none", "static"):
        found += [of(4, hidden, constraint=constraint) for hidden in (2048, 6144)]
    found += [of(4, hidden, norm=True) for hidden in (1024, 2048, 4096, 7168)]
    found += [of(n, 4096, constraint="head") for n in (1, 2, 3, 4, 8, 16)]
    # Where kernels have less to do than their launches take.
    found += [of(n, 2048, few=FEW_TOKENS) for n in (1, 3, 5, 16)]
    return [*found, of(4, 2050, few=FEW_TOKENS)]


TINY = [
    of(4, 64, few=37), of(3, 33, "float32", few=37), of(4, 32, "float32", "identity", few=37),
    of(2, 16, constraint="static", few=37), of(4, 16, norm=True, few=37),
    of(4, 16, constraint="head", few=37),
]  # fmt: skip


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    streams: tuple[int, ...] = ()
    """Numbers of streams to run; all of them if none is given, as for the three that follow."""
    hidden: tuple[int, ...] = ()
    """Widths to run."""
    dtype: tuple[Dtype, ...] = ()
    """Dtypes to run."""
    constraint: tuple[Constraint, ...] = ()
    """Constraints to run."""
    norm: bool | None = None
    """Whether to run configurations with a norm, or without one, alone."""
    what: tuple[What, ...] = get_args(What)
    """Programs to time."""
    implementations: tuple[Implementation, ...] = get_args(Implementation)
    """Implementations to time."""
    repeats: int = 4
    """Runs of a program whose kernels are timed."""
    seconds: float = float("inf")
    """Seconds after which no other configuration is timed, and the record is written as a part."""
    add: Path | None = None
    """Record from the same GPU and versions whose rows are kept, each with its commit. Run are
    configurations without a row, or those that other options choose. Implementations that are not
    chosen keep their times."""
    output: Path | None = None
    """Folder for the records, each in <gpu>/; by default benches/results, and none if tiny."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    tiny: bool = False
    """Tiny sizes on the CPU that try every path; their times mean nothing."""

    def __post_init__(self) -> None:
        if self.output is None and not self.tiny:
            self.output = Path("benches/results")
        self.commit = self.commit or common.commit()

    @functools.cached_property
    def added(self) -> dict[str, Any]:
        """The record that is added to; without one a record without rows."""
        if self.add is None:
            return {"rows": []}
        record = json.loads(self.add.read_text())
        for row in record["rows"]:
            row.setdefault("commit", record["commit"])
        return record

    def cases(self) -> list[Case]:
        """The configurations that are chosen, or where all are, those that were not run before."""
        allowed = {
            name: getattr(self, name) for name in ("streams", "hidden", "dtype", "constraint")
        }
        found = [
            case
            for case in self.all_cases()
            if all(not some or getattr(case, name) in some for name, some in allowed.items())
            and self.norm in (None, case.norm)
        ]
        before = {row_key(row) for row in self.added["rows"]}
        is_all = len(found) == len(self.all_cases())
        return [case for case in found if not (is_all and key(case) in before)]

    def all_cases(self) -> list[Case]:
        return TINY if self.tiny else cases()

    def is_part(self, rows: list[dict[str, Any]]) -> bool:
        """Whether rows leave out a configuration, or what there is of each."""
        wanted = {key(case): case for case in self.all_cases()}
        if {row_key(row) for row in rows} != wanted.keys():
            return True
        return any(is_row_part(wanted[row_key(row)], row) for row in rows)


# ---- programs -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Programs of a configuration, compiled.

    Attributes:
        make: from a key to the inputs.
        programs: by implementation and what is timed, functions of the inputs.
        error: the largest relative errors, of streams and of gradients of parameters.
    """

    make: Any
    programs: dict[tuple[str, What], Any]
    error: tuple[float, float]


def has_program(case: Case, implementation: Implementation, what: What) -> bool:
    return what != "stack" or (implementation == "fused" and case.constraint != "head")


def compile_case(case: Case, options: Options) -> Compiled:
    """Compiles all of a configuration, and checks its kernels."""
    ops = {"fused": FUSED, "plain": case.plain_ops}
    programs = {
        (name, what): compile_program(case, ops[name], what)
        for name in options.implementations
        for what in options.what
        if has_program(case, name, what)
    }
    make = jax.jit(inputs(case)).lower(jax.random.key(0)).compile()
    error = errors(case) if "fused" in options.implementations else (0.0, 0.0)
    return Compiled(make, programs, error)


# ---- times --------------------------------------------------------------------------------------


def time_case(case: Case, compiled: Compiled, rate: float, options: Options) -> dict[str, Any]:
    """The row of a configuration."""
    arguments = compiled.make(jax.random.key(0))
    row: dict[str, Any] = {
        "streams": case.streams, "hidden": case.hidden, "dtype": case.dtype,
        "constraint": case.constraint, "norm": case.norm, "tokens": case.tokens,
        "commit": options.commit, "floor_us": {},
    }  # fmt: skip
    if "fused" in options.implementations:
        row["error"] = dict(zip(("streams", "parameters"), compiled.error, strict=True))
    for (name, what), run in compiled.programs.items():
        only = "mhc_" if what == "stack" else ""
        row["floor_us"][what] = floor_us(case, what, rate)
        us, kernels = times.time_us(run, arguments, options.repeats, donated=DONATED, only=only)
        row.setdefault(name, {})[what] = us
        if name == "fused":
            longest = list(kernels.items())[:6]
            row.setdefault("kernels", {})[what] = {name: round(us, 1) for name, us in longest}
    return row


def ratio(row: dict[str, Any], above: str, below: str, what: str) -> float | None:
    """A time over another; None where one of them was not measured."""
    times = row.get(above, {}).get(what), row.get(below, {}).get(what)
    return None if None in times else times[0] / times[1]


def is_near(row: dict[str, Any]) -> bool:
    """Whether plain JAX is so near to the kernels that the form in the package is timed too."""
    slower = [ratio(row, "plain", "fused", what) for what in ("fwd", "fb")]
    return any(value is not None and value < NEAR for value in slower)


def wants_reference(case: Case, row: dict[str, Any]) -> bool:
    """Whether the form in the package is still to be timed."""
    return is_near(row) and case.plain_ops is plain and "reference" not in row


def is_row_part(case: Case, row: dict[str, Any]) -> bool:
    """Whether a row leaves out something."""
    whats = {
        implementation: {what for what in get_args(What) if has_program(case, implementation, what)}
        for implementation in get_args(Implementation)
    }
    is_whole = all(row.get(name, {}).keys() == of for name, of in whats.items())
    return not is_whole or wants_reference(case, row)


def described(row: dict[str, Any]) -> str:
    """The row as one line, for those who wait."""
    parts = []
    for above, below, whats in (
        ("floor_us", "fused", get_args(What)),
        ("plain", "fused", ("fwd", "fb")),
        ("reference", "fused", ("fwd", "fb")),
    ):
        found = {what: ratio(row, above, below, what) for what in whats}
        told = [f"{what} {value:.2f}" for what, value in found.items() if value is not None]
        if told:
            parts.append(f"{above.removesuffix('_us')}/{below}: {' '.join(told)}")
    return " | ".join(parts)


def figures(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    cells = [
        [
            row["streams"], row["hidden"], row["tokens"], row["dtype"], row["constraint"],
            "yes" if row["norm"] else "",
            *(figures(ratio(row, "floor_us", "fused", what)) for what in get_args(What)),
            *(figures(ratio(row, "plain", "fused", what)) for what in ("fwd", "fb")),
            *(figures(ratio(row, "reference", "fused", what)) for what in ("fwd", "fb")),
        ]
        for row in rows
    ]  # fmt: skip
    headers = [
        "n", "C", "T", "dtype", "constraint", "norm", "floor / fused: fwd", "fb", "stack",
        "plain JAX / fused: fwd", "fb", "reference / fused: fwd", "fb",
    ]  # fmt: skip
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def markdown(record: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"# Configurations, {record['gpu']}, {record['date']}",
            "",
            f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
            f"commit {record['commit']}; copy {record['copy_gb_per_s'] / 1e3:.2f} TB/s. "
            "benches/configurations.py tells what is timed.",
            "",
            table(record["rows"]),
            "",
        ]
    )


# ---- the run ------------------------------------------------------------------------------------


class Run:
    """A run: its progress, the seconds of its phases, and what is wrong with a configuration."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.wrong: dict[Case, str] = {}
        self.late: set[Case] = set()

    def phase(
        self, name: str, function: Callable[[Case], Any], of: Iterable[Case], threads: int | None
    ) -> dict[Case, Any]:
        """Results of a function by configuration; an error ends a configuration, not the run."""
        start, of = time.perf_counter(), list(of)
        number = self.progress.add_task(name, total=len(of))

        def one(case: Case) -> Any:
            try:
                return function(case)
            except Exception as error:  # of any kind: the others are to be timed
                self.refuse(case, f"{type(error).__name__}: {error}")
            finally:
                self.progress.advance(number)

        with ThreadPoolExecutor(threads) as pool:
            results = dict(zip(of, pool.map(one, of), strict=True))
        seconds = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.tell(f"{name}: {seconds:.0f} s")
        left_out = self.wrong.keys() | self.late
        return {case: result for case, result in results.items() if case not in left_out}

    def refuse(self, case: Case, reason: str) -> None:
        self.wrong[case] = f"{case}: {reason}"
        self.tell(self.wrong[case])

    def tell(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)


def run_all(options: Options, run: Run) -> dict[str, Any]:
    """The record."""

    def compile_one(case: Case) -> Compiled:
        own = compile_case(case, options)
        if complaint := above_limits(case, own.error):
            run.refuse(case, complaint)
        return own

    rate = times.copied_bytes_per_us(2**18 if options.tiny else 2**32)

    def is_late(case: Case) -> bool:
        if late := time.monotonic() - run.started > options.seconds:
            run.late.add(case)
        return late

    def time_one(case: Case) -> dict[str, Any]:
        if is_late(case):
            return {}
        row = time_case(case, compiled[case], rate, options)
        # Implementations that are not chosen keep their times: plain JAX is that of every commit.
        others = {"fused", "plain", "reference"} - {*options.implementations}
        before = rows.get(case, {})
        row |= {name: before[name] for name in others & before.keys()}
        run.tell(f"{case} {described(row)}")
        return row

    compiled: dict[Case, Compiled] = {}
    by_key = {key(case): case for case in options.all_cases()}
    rows = {by_key[row_key(row)]: row for row in options.added["rows"]}
    chosen = options.cases()
    # Some at a time, so that a run that ends early has rows.
    for first in range(0, len(chosen), CHUNK):
        chunk = [case for case in chosen[first : first + CHUNK] if not is_late(case)]
        compiled |= (ready := run.phase("compilation", compile_one, chunk, None))
        rows |= run.phase("timing", time_one, ready, 1)
    near = [case for case, row in rows.items() if wants_reference(case, row) and not is_late(case)]

    def compile_reference(case: Case) -> tuple[Any, dict[What, Any]]:
        whats = rows[case]["plain"]
        programs = {what: compile_program(case, mhc.reference, what) for what in whats}
        return jax.jit(inputs(case)).lower(jax.random.key(0)).compile(), programs

    references = run.phase("compilation of jax_mhc.reference", compile_reference, near, None)

    def time_reference(case: Case) -> None:
        make, programs = references[case]
        arguments = make(jax.random.key(0))
        rows[case]["reference"] = {
            what: times.time_us(program, arguments, options.repeats, donated=DONATED)[0]
            for what, program in programs.items()
        }
        run.tell(f"{case} {described(rows[case])}")

    run.phase("timing of jax_mhc.reference", time_reference, references, 1)
    found = [rows[case] for case in by_key.values() if case in rows and case not in run.wrong]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": ", ".join(dict.fromkeys(row["commit"] for row in found)) or options.commit,
        **common.versions(),
        "copy_gb_per_s": rate / 1e3,
        "seconds": run.seconds,
        "rows": found,
    }


def main(options: Options) -> None:
    # float64 is computed on the CPU.
    jax.config.update("jax_platforms", "cpu" if options.tiny else "cuda,cpu")
    if not options.commit:
        raise SystemExit("expected a git repository, got none; give --commit")
    if options.add is None and not options.cases():
        raise SystemExit("configurations.py: expected options that leave some, got none")
    if options.add is not None:
        here = {name: common.versions()[name] for name in ("gpu", "driver", "jax")}
        there = {name: options.added[name] for name in here}
        if here != there:
            raise SystemExit(f"configurations.py: --add: expected a record of {here}, got {there}")
    with Progress(transient=True) as progress:
        run = Run(progress)
        record = run_all(options, run)
    complaints, is_part = list(run.wrong.values()), options.is_part(record["rows"])
    text = markdown(record)
    print(text)
    if options.output is not None:
        suffix = "-configurations" + "-part" * is_part + "-wrong" * bool(complaints)
        common.write(record, text, options.output / common.gpu_folder(record), suffix)
    if complaints:
        raise SystemExit("Wrong fused results.\n" + "\n".join(complaints))


if __name__ == "__main__":
    main(tyro.cli(Options))
