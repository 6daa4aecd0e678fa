"""Times a training step on several GPUs, and pre where its channels are split.

    python -m benches mesh_step            # every layout on all GPUs, beside one of them
    python -m benches mesh_step --scaling  # weak and strong scaling, from one GPU to all
    python -m benches mesh_step --tiny --devices 8   # tries it on simulated devices

The model and its step are those of model.py and train_step.py, with plain residuals and with mHC in
a stack, on one GPU and in each of these layouts: data parallel, with as many tokens a GPU as on
one; fully sharded, where the parameters and the optimiser's state are split, too; tensor parallel,
with all tokens together as on one: weights split over heads and channels of the MLP, streams whole,
or their tokens split between the layers, or C; tensor parallel over two or four GPUs and data
parallel over the others. For strong scaling the fully sharded layout has all tokens together as on
one GPU.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import common
import jax
import tyro
from collectives import collectives
from common import STREAMS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from model import LABELS, TINY, WIDTHS, Model
from tabulate import tabulate
from train_step import Steps

import jax_mhc as mhc

DATA, TENSOR = "data", "tensor"
CONNECTIONS = ("residual", "seams")


@dataclasses.dataclass(frozen=True)
class Kind:
    """Split of a model over GPUs.

    tensor: GPUs that a layer is split over, 0 for all; between layers splits there the streams'
    "tokens", their channels "C", or nothing; fully_sharded splits parameters over the others too.
    """

    tensor: int = 1
    between: Literal["tokens", "C"] | None = None
    fully_sharded: bool = False
    is_strong: bool = False
    """All GPUs together have the tokens of one."""


KINDS = {
    "data": Kind(),
    "fully sharded": Kind(fully_sharded=True),
    "tensor, streams whole": Kind(tensor=0),
    "tensor, tokens split": Kind(tensor=0, between="tokens"),
    "tensor, C split": Kind(tensor=0, between="C"),
    "tensor 2 x data, tokens split": Kind(tensor=2, between="tokens"),
    "tensor 4 x data, tokens split": Kind(tensor=4, between="tokens"),
    "fully sharded, tokens of one GPU": Kind(fully_sharded=True, is_strong=True),
}
TABLE = tuple(name for name, kind in KINDS.items() if not kind.is_strong)
SCALING = ("fully sharded", "fully sharded, tokens of one GPU")
# Choices of the command line, which tyro reads from the type: the names stand in KINDS alone, where
# mypy does not look.
Name = Literal[tuple(KINDS)]  # type: ignore[valid-type]


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    steps: int = 20
    """Timed steps of each, in four rounds."""
    devices: tuple[int, ...] = ()
    """GPUs of the layouts, beside one; by default all, and with scaling 2, 4, ... of them."""
    layouts: tuple[Name, ...] = ()
    """By default all that fit, and with scaling two."""
    scaling: bool = False
    """Measure weak and strong scaling in place of the layouts, for `python -m benches plots`."""
    hidden: Literal[2048, 4096] = 2048
    """Width of the model, which has 12 layers or, of 4096, 4."""
    output: Path | None = None
    """Folder for the records; by default benches/results, and none if tiny."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    tiny: bool = False
    """A tiny model on simulated devices of the CPU, two by default; its times mean nothing."""

    def begin(self) -> None:
        """Fills in what depends on the machine, and refuses what it cannot do."""
        if self.tiny:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", max(self.devices, default=2))
            self.steps = 4
        elif self.output is None:
            self.output = Path("benches/results")
        there = jax.device_count()
        if there < 2:
            raise SystemExit("mesh_step.py: expected several GPUs, got one; --tiny simulates two")
        if not self.devices:
            powers = [2**power for power in range(1, 10) if 2**power < there]
            self.devices = (*powers, there) if self.scaling else (there,)
        for num in self.devices:
            if not 2 <= num <= there:
                raise SystemExit(f"mesh_step.py: devices: expected 2 to {there}, got {num}")
        for name in self.layouts:
            for num in self.devices:
                if num % (KINDS[name].tensor or num):
                    raise SystemExit(
                        f"mesh_step.py: devices: expected a multiple of {KINDS[name].tensor} for "
                        f"{name}, got {num}"
                    )

    def model(self) -> Model:
        model = TINY if self.tiny else WIDTHS[self.hidden]
        # A sequence or more for each GPU where all together have the tokens of one.
        return dataclasses.replace(model, batch=max(model.batch, *self.devices))

    def all_layouts(self) -> list[Layout]:
        """Layouts in the order of the table, the first on one GPU."""
        names = self.layouts or (SCALING if self.scaling else TABLE)
        found = [Layout("one GPU", Kind(), 1)]
        for num in self.devices:
            for name in names:
                kind = KINDS[name]
                # Layouts of tensor x data with one GPU for data are those without it.
                fits = kind.tensor <= 1 or (num % kind.tensor == 0 and num > kind.tensor)
                if fits or self.layouts:
                    found.append(Layout(name, kind, num))
        return found


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places of parameters and values on the mesh."""

    name: str
    kind: Kind
    devices: int

    @property
    def tensor(self) -> int:
        return self.kind.tensor or self.devices

    @property
    def mesh(self) -> Any:
        shape, axes = (self.devices // self.tensor, self.tensor), (DATA, TENSOR)
        devices = jax.devices()[: self.devices]
        return jax.make_mesh(shape, axes, axis_types=2 * (AxisType.Auto,), devices=devices)

    def model(self, model: Model) -> Model:
        times = 1 if self.kind.is_strong else self.devices // self.tensor
        return dataclasses.replace(model, batch=model.batch * times)

    def parameter(self, path: Any, leaf: Any) -> P:
        """Of a parameter, or of what the optimiser keeps of one."""
        names = {getattr(key, "key", None) for key in path}
        if self.tensor > 1 and leaf.ndim > 1:
            if names & {"qkv", "gate", "up", "logits"}:
                return P(*[None] * (leaf.ndim - 1), TENSOR)
            if names & {"out", "down"}:
                return P(*[None] * (leaf.ndim - 2), TENSOR)
        # Matrices, which are stacked if they are of layers; vectors stay whole.
        if self.kind.fully_sharded and (leaf.ndim > 2 or names & {"embedding", "logits"}):
            widest = max(range(leaf.ndim), key=lambda axis: leaf.shape[axis])
            return P(*[None] * widest, DATA)
        return P()

    def tokens(self) -> P:
        return P(DATA)

    def place(self, array: jax.Array, name: str) -> jax.Array:
        """A value of the model, `[tokens, ..., C]`."""
        spec = self.tokens()
        if self.kind.between == "tokens" and name != "layer_input":
            spec = P((DATA, TENSOR))
        elif self.kind.between == "C" and name != "layer_input":
            spec = P(DATA, *[None] * (array.ndim - 2), TENSOR)
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))


def compile_step(layout: Layout, model: Model, connection: Any) -> tuple[Any, Any, Steps]:
    """The compiled step and where its state lies."""
    steps = Steps(layout.model(model))
    state = jax.eval_shape(functools.partial(steps.state, connection))
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(layout.mesh, layout.parameter(path, leaf)), state
    )
    tokens = NamedSharding(layout.mesh, layout.tokens())
    step = jax.jit(
        steps.step(connection, layout.place),
        in_shardings=(shardings, tokens),
        out_shardings=(shardings, NamedSharding(layout.mesh, P())),
        donate_argnums=0,
    )
    return step.lower(state, jax.eval_shape(steps.tokens)).compile(), shardings, steps


def communication_ms(kernels: dict[str, Any], devices: int) -> float:
    """Of a GPU in a step; the profiler sees all GPUs."""
    times = (k["us"] for name, k in kernels.items() if name.startswith("nccl"))
    return sum(times) / devices / 1e3


def time_steps(options: Options) -> list[dict[str, Any]]:
    model = options.model()
    layouts = options.all_layouts()
    pairs = [(layout, connection) for layout in layouts for connection in CONNECTIONS]
    # One alone first: XLA keeps the matrix products that it chose by timing them.
    programs = [compile_step(pairs[0][0], model, pairs[0][1])]
    with ThreadPoolExecutor(4) as pool:
        programs += pool.map(lambda pair: compile_step(pair[0], model, pair[1]), pairs[1:])
    rows = []
    for (layout, connection), (program, shardings, steps) in zip(pairs, programs, strict=True):
        new_state = functools.partial(steps.state, connection)
        state = jax.jit(new_state, out_shardings=shardings)()
        tokens = jax.jit(steps.tokens, out_shardings=NamedSharding(layout.mesh, layout.tokens()))()
        losses = []
        for _ in range(3):
            state, value = program(state, tokens)
            losses.append(float(value[0]))
        rounds = []
        for _ in range(4):
            jax.block_until_ready(state)
            start = time.perf_counter()
            for _ in range(max(1, options.steps // 4)):
                state, value = program(state, tokens)
            jax.block_until_ready((state, value))
            rounds.append((time.perf_counter() - start) * 1e3 / max(1, options.steps // 4))
        kept = [state]

        def one(kept: list[Any] = kept, program: Any = program, tokens: Any = tokens) -> Any:
            kept[0], value = program(kept[0], tokens)
            return value

        kernels = common.kernel_times(one, calls=1)
        ms = statistics.median(rounds)
        rows.append({
            "layout": layout.name, "connection": connection, "devices": layout.devices,
            "tensor": layout.tensor, "is_strong": layout.kind.is_strong,
            "tokens": steps.model.tokens, "losses": losses, "round_ms": rounds, "ms": ms,
            "tokens_per_s": steps.model.tokens / ms * 1e3, "memory": common.memory(program),
            "collectives": collectives(program.as_text()),
            "communication_ms": communication_ms(kernels, layout.devices),
            "kernels": dict(list(kernels.items())[:30]),
        })  # fmt: skip
        where = f"{layout.name} ({layout.devices})"
        print(f"{where}, {connection}: {ms:.1f} ms, losses {losses}", flush=True)
        del state, kept, tokens
    return rows


# ---- pre with split channels --------------------------------------------------------------------


def time_split_pre(tiny: bool) -> list[dict[str, Any]]:
    """Kernels of pre and of its gradients, C split over all GPUs, and on one GPU."""
    num, calls = jax.device_count(), 20
    split_mesh, one = (Layout("", KINDS["tensor, C split"], size).mesh for size in (num, 1))
    rows = []
    for tokens, hidden in [(64, 64)] if tiny else [(8192, 4096), (4096, 7168), (1024, 4096)]:
        x, _, params, d_u, _ = common.inputs(jax.random.key(0), tokens, hidden, "bfloat16")

        def both(x: Any, params: Any, d_u: Any) -> Any:
            u, vjp = jax.vjp(lambda x, p: mhc.pre(x, p, implementation="fused")[0], x, params)
            return u, vjp(d_u)

        def forward(x: Any, params: Any, d_u: Any) -> Any:
            return mhc.pre(x, params, implementation="fused")[0]

        for name, function in (("pre", forward), ("pre and gradients", both)):
            for split in (False, True):
                spec = P(None, None, TENSOR) if split else P()
                mesh = split_mesh if split else one
                u_spec = P(None, TENSOR) if split else P()
                shardings = [NamedSharding(mesh, s) for s in (spec, P(), u_spec)]
                arrays = jax.device_put((x, params, d_u), tuple(shardings))
                program = jax.jit(function).lower(*arrays).compile()
                jax.block_until_ready(program(*arrays))

                def run(program: Any = program, arrays: Any = arrays) -> Any:
                    return [program(*arrays) for _ in range(calls)]

                kernels = common.kernel_times(run, calls)
                devices_used = num if split else 1
                all_us = sum(k["us"] for k in kernels.values()) / devices_used
                sent = 1e3 * communication_ms(kernels, devices_used)
                rows.append({
                    "op": name, "tokens": tokens, "hidden": hidden, "split": split, "us": all_us,
                    "communication_us": sent, "collectives": collectives(program.as_text()),
                    "kernels": kernels,
                })  # fmt: skip
                print(
                    f"{name} {tokens} x {hidden}, split {split}: {all_us:.0f} us, {sent:.0f} sent"
                )
    return rows


# ---- the report ---------------------------------------------------------------------------------


def listed(found: dict[str, Any]) -> str:
    return ", ".join(f"{num} {kind} ({size / 1e6:.2f} M)" for kind, (num, size) in found.items())


def table(record: dict[str, Any]) -> str:
    """The steps of a record, with plain residuals and with mHC."""
    first = {row["connection"]: row for row in record["rows"] if row["layout"] == "one GPU"}
    steps, plain = [], {}
    for row in record["rows"]:
        layout = row["layout"], row["devices"]
        if row["connection"] == "residual":
            plain[layout] = row["ms"]
        speed_up = row["tokens_per_s"] / first[row["connection"]]["tokens_per_s"]
        steps.append([
            row["layout"], LABELS[row["connection"]], row["devices"],
            row["tokens"], f"{row['ms']:.1f}",
            f"{100 * (row['ms'] / plain[layout] - 1):+.1f} %", f"{row['tokens_per_s']:.0f}",
            f"{speed_up:.2f}", f"{100 * speed_up / row['devices']:.0f} %",
            f"{row['communication_ms']:.1f}", f"{row['memory']['peak_bytes'] / 1e9:.1f}",
            listed(row["collectives"]),
        ])  # fmt: skip
    headers = [
        "layout", "connection", "GPUs", "tokens", "ms", "over plain", "tokens/s", "speed-up",
        "efficiency", "NCCL, ms", "peak, GB", "collectives",
    ]  # fmt: skip
    return tabulate(steps, headers, tablefmt="github", disable_numparse=True)


def markdown(record: dict[str, Any]) -> str:
    splits = [
        [
            row["op"],
            f"{row['tokens']} x {row['hidden']}",
            "split" if row["split"] else "whole",
            f"{row['us']:.0f}",
            f"{row['communication_us']:.0f}",
            listed(row["collectives"]),
        ]  # fmt: skip
        for row in record["split_pre"]
    ]
    headers = ["op", "T x C", "channels", "all kernels", "NCCL", "collectives"]
    return "\n".join([
        f"# Training step on {record['devices']} GPUs, {record['gpu']}, {record['date']}", "",
        f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
        f"commit {record['commit']} (library: {record['library_commit']}). n = {STREAMS}, C = "
        f"{record['model']['hidden']}, {record['model']['layers']} layers. "
        "Medians of four rounds. Collectives are those of the program's text, in millions of "
        "numbers; in loops over the layers they run once for each of these. NCCL's kernels also "
        "wait for the other GPUs.", "",
        table(record), "",
        *([] if not splits else [
            "## pre with split channels", "", "Kernel time of a GPU, us.", "",
            tabulate(splits, headers, tablefmt="github", disable_numparse=True), "",
        ]),
    ])  # fmt: skip


def main(options: Options) -> None:
    options.begin()
    rows = time_steps(options)
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or common.commit(),
        "devices": max(options.devices),
        **common.versions(),
        "model": dataclasses.asdict(options.model()),
        "rows": rows,
        "split_pre": [] if options.scaling else time_split_pre(options.tiny),
    }
    text = markdown(record)
    print(text)
    if options.output is not None:
        name = "scaling" if options.scaling else f"step-{record['devices']}-gpus"
        folder = options.output / common.gpu_folder(record)
        common.write(record, text, folder, f"-mesh-{name}-{record['model']['hidden']}")
    for row in rows:
        if not abs(row["losses"][0] - rows[0]["losses"][0]) < 5e-2 * rows[0]["losses"][0]:
            raise SystemExit(f"mesh_step.py: losses differ: {row['losses']}, {rows[0]['losses']}")


if __name__ == "__main__":
    main(tyro.cli(Options))
