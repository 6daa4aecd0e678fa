"""Times a sublayer in all configurations that models have, beside plain JAX and the bytes' floor.

Writes benches/results/<gpu>/<date>-configurations.json and .md. With an option that leaves
something out they are called <date>-configurations-part, which the pages and the package's table do
not read. A configuration whose check fails is not timed; the records are then called -wrong, and
the program exits with 1.

- fwd: pre and post. fb: both and all gradients, the gradient of the new streams donated. stack:
  forward and gradients of a stack of four sublayers, the kernels named mhc_ alone. Of a head fwd is
  the head, and fb the head with its gradients.
- X has about 2^27 elements, but where a row is of few tokens.
- Floor: the bytes that must move at the bandwidth of a copy in the same run.
- Plain JAX: plain.py; the form of `jax_mhc.reference` for constraints that plain.py has not.
  `jax_mhc.reference`, which implementation=None takes, is timed beside it where plain JAX is less
  than half again as slow as the kernels.
- Check: all results on a few tokens against float64, on the CPU.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import time
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import common
import jax
import jax.numpy as jnp
import numpy as np
import plain
import tyro
from rich.progress import Progress
from tabulate import tabulate

import jax_mhc as mhc

What = Literal["fwd", "fb", "stack"]
Implementation = Literal["fused", "plain"]
Dtype = Literal["bfloat16", "float16", "float32"]
Constraint = Literal["birkhoff", "none", "identity", "permutations", "static", "head"]

ELEMENTS, FEW_TOKENS, CHECKED_TOKENS = 2**27, 32, 19
# Configurations that are compiled at once, each with all its programs.
CHUNK = 16
# Times of plain JAX over the kernels below which `jax_mhc.reference` is timed too.
NEAR = 1.5
# Largest relative L2 error by dtype, of streams and of gradients of parameters: what is above is
# wrong. The tests look closer.
LIMITS = {"bfloat16": (4e-3, 5e-3), "float16": (6e-4, 1e-3), "float32": (2e-5, 1e-4)}
# Fields that tell configurations apart.
KEY = ("streams", "hidden", "dtype", "constraint", "norm", "tokens")


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration; `tokens` are given where they are few."""

    streams: int
    hidden: int
    dtype: Dtype = "bfloat16"
    constraint: Constraint = "birkhoff"
    norm: bool = False
    few: int | None = None

    @property
    def tokens(self) -> int:
        most = ELEMENTS // (self.streams * self.hidden)
        return self.few or max(1024, 2 ** int(np.log2(most)))

    @property
    def config(self) -> mhc.MHCConfig:
        other = self.constraint in ("static", "head")
        return mhc.MHCConfig(constraint="birkhoff" if other else self.constraint)

    @property
    def plain_ops(self) -> Any:
        """The ops in the fastest form of plain JAX."""
        has_own = self.constraint in ("birkhoff", "head")
        return plain if has_own else mhc.reference

    @property
    def key(self) -> tuple[Any, ...]:
        """Values that tell its row from others."""
        return tuple(getattr(self, name) for name in KEY)

    def __str__(self) -> str:
        norm = "norm" if self.norm else ""
        sizes = f"n={self.streams:2d} C={self.hidden:5d} T={self.tokens:6d}"
        return f"{sizes} {self.dtype:8s} {self.constraint:12s} {norm:4s}"


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def cases() -> list[Case]:
    """All configurations."""
    widths = (
        512, 768, 1000, 1024, 1280, 1536, 1600, 2048, 2050, 2304, 2560, 3072, 3584, 4096, 4608,
        5120, 6144, 7168, 8192, 12288, 16384,
    )  # fmt: skip
    found = [Case(4, hidden) for hidden in widths]
    found += [Case(n, hidden) for n in (1, 2, 3, 8, 16) for hidden in (2048, 4096)]
    found += [Case(n, 2048) for n in (5, 6, 7, 12)]
    found += [
        Case(4, hidden, dtype) for dtype in ("float16", "float32") for hidden in (1024, 2048, 4096)
    ]
    found += [Case(4, 4096, dtype, "identity") for dtype in ("float16", "float32")]
    for constraint in ("identity", "permutations"):
        found += [
            Case(4, hidden, constraint=constraint) for hidden in (1024, 2048, 4096, 6144, 8192)
        ]
    for constraint in ("none", "static"):
        found += [Case(4, hidden, constraint=constraint) for hidden in (2048, 6144)]
    found += [Case(4, hidden, norm=True) for hidden in (1024, 2048, 4096, 7168)]
    found += [Case(n, 4096, constraint="head") for n in (1, 2, 3, 4, 8, 16)]
    # Where kernels have less to do than their launches take.
    found += [Case(n, 2048, few=FEW_TOKENS) for n in (1, 3, 5, 16)]
    return [*found, Case(4, 2050, few=FEW_TOKENS)]


TINY = [
    Case(4, 64, few=37), Case(3, 33, "float32", few=37), Case(4, 32, "float32", "identity", few=37),
    Case(2, 16, constraint="static", few=37), Case(4, 16, norm=True, few=37),
    Case(4, 16, constraint="head", few=37),
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
        return [case for case in found if not (is_all and case.key in before)]

    def all_cases(self) -> list[Case]:
        return TINY if self.tiny else cases()

    def is_part(self, rows: list[dict[str, Any]]) -> bool:
        """Whether rows leave out a configuration, or what there is of each."""
        wanted = {case.key: case for case in self.all_cases()}
        if {row_key(row) for row in rows} != wanted.keys():
            return True
        return any(is_row_part(wanted[row_key(row)], row) for row in rows)


# ---- programs -----------------------------------------------------------------------------------


def shapes(case: Case, tokens: int | None = None) -> tuple[Any, ...]:
    """Types of x, y, params, d_u, d_x_new and the options of pre."""
    n, hidden, tokens = case.streams, case.hidden, tokens or case.tokens
    of = jax.ShapeDtypeStruct
    num = n if case.constraint == "head" else case.config.num_coefficients(n)
    gates = of((1 if case.constraint == "head" else case.config.num_gates(),), "float32")
    phi, bias = of((n * hidden, num), "float32"), of((num,), "float32")
    params: Any = mhc.MHCParams(phi, gates, bias)
    if case.constraint == "head":
        params = mhc.HeadParams(phi, gates, bias)
    elif case.constraint == "static":
        params = mhc.MHCParams(None, None, bias)
    x, y = of((tokens, n, hidden), case.dtype), of((tokens, hidden), case.dtype)
    norm = {"norm_scale": of((hidden,), "float32")} if case.norm else {}
    return x, y, params, y, x, norm


def inputs(case: Case, tokens: int | None = None) -> Callable[[jax.Array], tuple[Any, ...]]:
    """A function of a key that makes random ones."""

    def make(key: jax.Array) -> tuple[Any, ...]:
        leaves, structure = jax.tree.flatten(shapes(case, tokens))
        made = []
        for own, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True):
            is_phi = leaf.shape[0] == case.streams * case.hidden and leaf.dtype == jnp.float32
            scale = leaf.shape[0] ** -0.5 if is_phi and len(leaf.shape) == 2 else 1.0
            made.append(
                (scale * jax.random.normal(own, leaf.shape, jnp.float32)).astype(leaf.dtype)
            )
        return jax.tree.unflatten(structure, made)

    return make


def program(case: Case, ops: Any, what: What) -> Callable[..., Any]:
    """A function of the inputs."""
    # The functions of plain.py take no config: they have that of the paper.
    config = {} if ops is plain else {"config": case.config}

    def head(x: Any, y: Any, params: Any, d_u: Any, d_x_new: Any, norm: Any) -> Any:
        u, vjp = jax.vjp(lambda x, params: ops.head(x, params, **config), x, params)
        return u if what == "fwd" else {"gradients": vjp(d_u), "results": u}

    def sublayer(x: Any, y: Any, params: Any, d_u: Any, d_x_new: Any, norm: Any) -> Any:
        own = types.SimpleNamespace(pre=functools.partial(ops.pre, **config), post=ops.post)
        if what == "fwd":
            return common.forward(own, x, y, params, **norm)
        return common.gradients(own, x, y, params, d_u, d_x_new, **norm)

    def stack(x: Any, y: Any, params: Any, d_u: Any, d_x_new: Any, norm: Any) -> Any:
        layers = [lambda u: jax.lax.optimization_barrier(u)] * 4
        scales = [norm["norm_scale"]] * 4 if norm else None

        def run(x: Any, params: Any) -> Any:
            return mhc.stack(
                layers, x, [params] * 4, norm_scale=scales, implementation="fused", **config
            )

        x_new, vjp = jax.vjp(run, x, params)
        return x_new, vjp(d_x_new)

    return head if case.constraint == "head" else stack if what == "stack" else sublayer


def floor_us(case: Case, what: What, bytes_per_us: float) -> float:
    """Time in which the bytes that must move are copied."""
    n = case.streams
    pre, post, seam = n + 1, 2 * n + 1, 2 * n + 2
    post_bwd, pre_bwd, seam_bwd = 2 * n + 2, 3 * n + 1, 3 * n + 3
    parts = {
        "fwd": pre + post,
        "fb": pre + post + post_bwd + pre_bwd,
        "stack": pre + 3 * seam + post + post_bwd + 3 * seam_bwd + pre_bwd,
    }
    if case.constraint == "head":
        parts = {"fwd": pre, "fb": pre + 2 * n + 1}
    return parts[what] * case.tokens * case.hidden * jnp.dtype(case.dtype).itemsize / bytes_per_us


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


def compile_program(case: Case, ops: Any, what: What) -> Any:
    lowered = jax.jit(program(case, ops, what), donate_argnums=4).lower(*shapes(case))
    return lowered.compile()


def compile_case(case: Case, options: Options) -> Compiled:
    """Compiles all of a configuration, and checks its kernels."""
    ops = {"fused": common.FUSED, "plain": case.plain_ops}
    programs = {
        (name, what): compile_program(case, ops[name], what)
        for name in options.implementations
        for what in options.what
        if has_program(case, name, what)
    }
    make = jax.jit(inputs(case)).lower(jax.random.key(0)).compile()
    error = errors(case) if "fused" in options.implementations else (0.0, 0.0)
    return Compiled(make, programs, error)


def errors(case: Case) -> tuple[float, float]:
    """Largest relative errors of the kernels on a few tokens, of streams and of parameters'."""
    few = jax.jit(inputs(case, CHECKED_TOKENS))(jax.random.key(1))
    got = jax.jit(program(case, common.FUSED, "fb"))(*few)
    with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(np.float64)), few)
        # Without optimizations: compiles in half the time.
        quick = {"xla_backend_optimization_level": 0}
        run = jax.jit(program(case, mhc.reference, "fb"), compiler_options=quick)
        exact = jax.tree.map(np.asarray, run(*wide))
    largest = [0.0, 0.0]
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    for leaf, wanted in pairs:
        of_parameters = leaf.dtype == jnp.float32 and leaf.shape[0] != CHECKED_TOKENS
        error = common.relative_error(leaf, wanted)
        # NaN stays.
        largest[of_parameters] = max(error, largest[of_parameters]) if error >= 0 else error
    return largest[0], largest[1]


# ---- times --------------------------------------------------------------------------------------


def time_us(program: Any, arguments: tuple[Any, ...], only: str, repeats: int) -> Any:
    """Kernel time of a program, whose fifth argument is donated, and that of its kernels.

    Wall time where there is no profile.
    """
    donated = [jnp.copy(arguments[4]) for _ in range(repeats + 1)]

    def once() -> None:
        jax.block_until_ready(program(*arguments[:4], donated.pop(), *arguments[5:]))

    once()
    start = time.perf_counter()
    found = common.kernel_times(lambda: [once() for _ in range(repeats)], repeats)
    wall_us = 1e6 * (time.perf_counter() - start) / repeats
    us = sum(kernel["us"] for name, kernel in found.items() if name.startswith(only))
    return us or wall_us, {name: round(k["us"], 1) for name, k in list(found.items())[:6]}


def copied_bytes_per_us(tiny: bool) -> float:
    """Bytes that a copy reads and writes in a microsecond, the best of three runs."""
    source = jnp.ones(2**16 if tiny else 2**30, jnp.bfloat16)
    program = jax.jit(jnp.copy).lower(source).compile()
    jax.block_until_ready(program(source))

    def once() -> float:
        found = common.kernel_times(lambda: program(source), 1)
        return sum(kernel["us"] for kernel in found.values()) or 1.0

    return 2 * source.nbytes / min(once() for _ in range(5))


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
        row.setdefault(name, {})[what], kernels = time_us(run, arguments, only, options.repeats)
        if name == "fused":
            row.setdefault("kernels", {})[what] = kernels
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
        own, limits = compile_case(case, options), LIMITS[case.dtype]
        if not all(error <= most for error, most in zip(own.error, limits, strict=True)):
            found = " and ".join(f"{error:.1e}" for error in own.error)
            run.refuse(case, f"errors of streams and parameters {found}, at most {limits}")
        return own

    rate = copied_bytes_per_us(options.tiny)

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
    by_key = {case.key: case for case in options.all_cases()}
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
            what: time_us(program, arguments, "", options.repeats)[0]
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
