"""Times a training step of a language model with each residual connection, and tells its memory.

`make bench-gpu` runs this and writes benches/results/<gpu>/<date>-train-step.json and .md. The
model is that of model.py: 12 layers, C = 2048, 4 x 2048 tokens, with AdamW. n = 4, with the initial
parameters of `init_params`, with which every connection computes what the plain residual one does;
where the losses of the first steps say otherwise they are called <date>-train-step-wrong and it
exits with 1.

- Time: after three steps of warm-up each connection in turn runs a few steps that are queued one
  after the other, and so on round after round, so that a drift of the clocks meets them all.
  Median over the rounds; the spread is that between the slowest and the fastest round.
- Memory: peak of the compiled step as XLA planned it: arguments, results that overwrite none of
  them, and its one block of temporaries. All connections run in one process, where the
  allocator's own peak would be that of the largest.
- Plain JAX: `jax_mhc._measure.plain`, also with `jax.checkpoint` around pre and post.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import common
import jax
import optax
import tyro
from common import STREAMS
from model import (
    FUSED,
    LABELS,
    MODULES,
    TINY,
    WIDTHS,
    Connection,
    Model,
    anywhere,
    has_streams,
    init,
    kind,
    loss,
)
from tabulate import tabulate

WARM_UP = 3

# Largest difference of the losses in the warm-up, which start at log(vocabulary), 10.4 or, tiny,
# 4.9. At first all connections compute the same up to rounding to bfloat16; then those with streams
# learn the parameters of theirs too.
FIRST_LOSS = 2e-3
LATER_LOSSES = 1e-2


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    connections: tuple[Connection, ...] = (
        "residual", "plain", "plain-checkpoint", "mhc", "seams", "seams-norms", "seams-checkpoint",
    )  # fmt: skip
    """Residual connections, the first the one that the others are compared with."""
    steps: int = 40
    """Timed steps of each, in five rounds; a round begins with a launch that nothing hides."""
    output: Path | None = None
    """Folder for the records, each in <gpu>/; by default benches/results, and none if tiny."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    hidden: Literal[768, 1024, 2048, 4096, 8192] = 2048
    """Width of the model, C; wider ones have fewer layers."""
    layers: int | None = None
    """Layers of the model, if not those of the width."""
    tiny: bool = False
    """A tiny model on the CPU that tries every path; its times mean nothing."""

    def __post_init__(self) -> None:
        if self.tiny:
            self.steps = 5
        elif self.output is None:
            self.output = Path("benches/results")

    def begin(self) -> None:
        """Before anything is run."""
        if self.tiny:
            jax.config.update("jax_platforms", "cpu")
        self.commit = self.commit or common.commit()
        if not self.commit:
            raise SystemExit("expected a git repository, got none; give --commit")
        # Steps are traced in threads, where imports of one library would meet.
        for connection in self.connections:
            if connection in MODULES:
                importlib.import_module(MODULES[connection])

    def models(self) -> list[Model]:
        if self.tiny:
            return [TINY]
        model = WIDTHS[self.hidden]
        return [dataclasses.replace(model, layers=self.layers or model.layers)]


# ---- the step -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of all connections; a state is the parameters and what AdamW keeps."""

    model: Model
    optimizer: optax.GradientTransformation = dataclasses.field(
        default_factory=lambda: optax.adamw(3e-4)
    )

    def state(self, connection: Connection) -> Any:
        params = init(jax.random.key(0), self.model, connection)
        return params, self.optimizer.init(params)

    def tokens(self) -> jax.Array:
        shape = self.model.batch, self.model.length
        return jax.random.randint(jax.random.key(1), shape, 0, self.model.vocabulary)

    def step(self, connection: Connection, place: Any = anywhere) -> Any:
        """The function `(state, tokens) -> (state, (loss, what is told))`."""

        def step(state: Any, tokens: jax.Array) -> Any:
            params, optimizer_state = state
            run = functools.partial(loss, connection, self.model, place=place)
            value, d_params = jax.value_and_grad(run, has_aux=True)(params, tokens)
            updates, optimizer_state = self.optimizer.update(d_params, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), value

        return step

    def compile(self, connection: Connection) -> tuple[Any, float]:
        """The compiled step, and its compile time in seconds.

        Raises:
            SystemExit: the program holds custom calls where it should not, or none where it should.
        """
        step = self.step(connection)
        state = jax.eval_shape(functools.partial(self.state, connection))
        start = time.perf_counter()
        tokens = jax.eval_shape(self.tokens)
        program = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
        seconds = time.perf_counter() - start
        calls = len(re.findall(r'custom_call_target="jax_mhc_', program.as_text()))
        if (calls > 0) != (connection in FUSED):
            raise SystemExit(f"train_step.py: {connection}: {calls} custom calls in the program")
        return program, seconds


def run(steps: Steps, options: Options) -> list[dict[str, Any]]:
    """A row for each connection."""
    first, *others = options.connections
    # The first alone: XLA chooses matrix products by timing them, and keeps these choices.
    compiled = {first: steps.compile(first)}
    print(f"{first}: compiled in {compiled[first][1]:.0f} s", flush=True)
    with ThreadPoolExecutor() as pool:
        for name, result in zip(others, pool.map(steps.compile, others), strict=True):
            compiled[name] = result
            print(f"{name}: compiled in {result[1]:.0f} s", flush=True)

    tokens = jax.jit(steps.tokens)()
    new_state = jax.jit(steps.state, static_argnums=0)
    rows: dict[Connection, dict[str, Any]] = {}
    for name, (program, seconds) in compiled.items():
        state, losses = new_state(name), []
        for _ in range(WARM_UP):
            state, value = program(state, tokens)
            losses.append(float(value[0]))
        del state
        rows[name] = {
            "connection": name,
            "losses": losses,
            "compile_s": seconds,
            "memory": common.memory(program),
            "round_ms": [],
        }
        gb = rows[name]["memory"]["peak_bytes"] / 1e9
        print(f"{name}: losses {losses}, peak {gb:.2f} GB", flush=True)

    # The connections with streams share a state: it makes no difference whose step comes next. Of
    # large models there is memory for one state alone.
    states: dict[tuple[bool, bool], Any] = {}

    def take_state(name: Connection) -> Any:
        if kind(name) not in states:
            states.clear()
            states[kind(name)] = new_state(name)
        return jax.block_until_ready(states.pop(kind(name)))

    rounds = min(5, options.steps)
    for _ in range(rounds):
        for name, (program, _) in compiled.items():
            state = take_state(name)
            start = time.perf_counter()
            for _ in range(options.steps // rounds):
                state, value = program(state, tokens)
            jax.block_until_ready((state, value))
            milliseconds = (time.perf_counter() - start) * 1e3 / (options.steps // rounds)
            rows[name]["round_ms"].append(milliseconds)
            states[kind(name)] = state
            del state
        latest = (f"{name} {row['round_ms'][-1]:.1f}" for name, row in rows.items())
        print("ms a step: " + ", ".join(latest), flush=True)

    for name, (program, _) in compiled.items():

        def step(name: Connection = name, program: Any = program) -> Any:
            states[kind(name)], value = program(take_state(name), tokens)
            return value

        rows[name]["kernels"] = common.kernel_times(step, calls=1)

    for row in rows.values():
        row["ms"] = statistics.median(row["round_ms"])
        row["spread_ms"] = max(row["round_ms"]) - min(row["round_ms"])
        row["overhead"] = row["ms"] / rows[first]["ms"] - 1
        row["tokens_per_s"] = steps.model.tokens / row["ms"] * 1e3
    return list(rows.values())


def wrong_losses(rows: list[dict[str, Any]]) -> list[str]:
    """Complaints about losses that are not what they must be; NaN is never what it must be."""
    complaints = []
    with_streams = [row for row in rows if has_streams(row["connection"])]
    for rows_alike, limit, compared in (
        (rows, FIRST_LOSS, slice(1)),
        (with_streams, LATER_LOSSES, slice(None)),
    ):
        for row in rows_alike[1:]:
            pairs = zip(row["losses"][compared], rows_alike[0]["losses"][compared], strict=True)
            if not all(abs(one - other) <= limit for one, other in pairs):
                complaints.append(
                    f"{row['connection']}: losses {row['losses'][compared]}, "
                    f"{rows_alike[0]['connection']}: {rows_alike[0]['losses'][compared]}"
                )
    return complaints


# ---- the report ---------------------------------------------------------------------------------


def kernels_ms(row: dict[str, Any], prefix: str) -> float:
    """Time in the kernels whose names begin so, in the one step that was profiled."""
    times = (kernel["us"] for name, kernel in row["kernels"].items() if name.startswith(prefix))
    return sum(times) / 1e3


def table(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            LABELS[row["connection"]],
            f"{row['ms']:.1f}",
            f"{row['spread_ms']:.1f}",
            f"{100 * row['overhead']:+.1f} %",
            f"{row['tokens_per_s']:.0f}",
            f"{row['memory']['peak_bytes'] / 1e9:.1f}",
            f"{row['compile_s']:.0f}",
            f"{kernels_ms(row, 'mhc_'):.1f}",
            f"{kernels_ms(row, ''):.1f}",
            ", ".join(f"{value:.4f}" for value in row["losses"]),
        ]
        for row in rows
    ]
    kernels = [
        [LABELS[row["connection"]], name, f"{kernel['launches']:.0f}", f"{kernel['us'] / 1e3:.2f}"]
        for row in rows
        for name, kernel in list(row["kernels"].items())[:25]
    ]
    headers = [
        "connection", "ms a step", "spread", "overhead", "tokens/s", "peak, GB", "compiled in, s",
        "mHC kernels, ms", "all kernels, ms", "first losses",
    ]  # fmt: skip
    return "\n".join(
        [
            github(cells, headers),
            "",
            "## The longest kernels of a step",
            "",
            github(kernels, ["connection", "kernel", "launches", "ms"]),
        ]
    )


def github(cells: list[list[Any]], headers: list[str]) -> str:
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def record(
    options: Options, name: str, title: str, tables: Callable[[list[dict[str, Any]]], str]
) -> None:
    """Runs all connections in all models, prints the tables, and writes <date>-<name>."""
    options.begin()
    start = time.perf_counter()
    rows, complaints = [], []
    for model in options.models():
        of_model = run(Steps(model), options)
        complaints += wrong_losses(of_model)
        shapes = jax.eval_shape(
            functools.partial(init, model=model, connection=options.connections[0]),
            jax.random.key(0),
        )
        parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        rows += [{"layers": model.layers, "parameters": parameters, **row} for row in of_model]
    facts = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit,
        **common.versions(),
        "model": dataclasses.asdict(options.models()[0]),
        "parameters": rows[0]["parameters"],
        "steps_a_round": options.steps // len(rows[0]["round_ms"]),
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }
    sizes = ", ".join(f"{size} {value}" for size, value in facts["model"].items())
    text = "\n".join(
        [
            f"# {title}, {facts['gpu']}, {facts['date']}",
            "",
            f"{facts['gpu']}, driver {facts['driver']}, jax {facts['jax']}, {facts['plugin']}, "
            f"Python {facts['python']}, commit {facts['commit']} (library: "
            f"{facts['library_commit']}). n = {STREAMS}, bfloat16, AdamW, "
            f"{facts['parameters'] / 1e6:.0f} M parameters; {sizes}. Medians of "
            f"{len(rows[0]['round_ms'])} rounds of {facts['steps_a_round']} steps.",
            "",
            tables(rows),
            "",
        ]
    )
    print(text)
    if options.output is not None:
        suffix = f"-{name}" + ("-wrong" if complaints else "")
        common.write(facts, text, options.output / common.gpu_folder(facts), suffix)
    if complaints:
        raise SystemExit("Wrong losses.\n" + "\n".join(complaints))


if __name__ == "__main__":
    record(tyro.cli(Options), "train-step", "Training step", table)
