"""Times a training step on several GPUs, and pre where its channels are split.

    python -m benches mesh_step  # on two GPUs or more; --tiny tries it on simulated devices

The model and its step are those of model.py and train_step.py, with plain residuals and with mHC in
a stack, in each of these layouts over all GPUs: on one; data parallel, with as many tokens a GPU as
on one; fully sharded, where the parameters and the optimiser's state are split, too; tensor
parallel, with all tokens together as on one: weights split over heads and channels of the MLP,
streams whole, or their tokens split between the layers, or C.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import jax
import tyro
from collectives import collectives
from common import STREAMS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from model import LABELS, TINY, Model
from tabulate import tabulate
from train_step import Steps

import jax_mhc as mhc

AXIS = "gpus"
LAYOUTS = (
    "one GPU", "data", "fully sharded", "tensor, streams whole", "tensor, tokens split",
    "tensor, C split",
)  # fmt: skip
CONNECTIONS = ("residual", "seams")


@dataclasses.dataclass
class Options:
    """Options of the command line."""

    steps: int = 20
    """Timed steps of each, in four rounds."""
    layouts: tuple[str, ...] = LAYOUTS
    output: Path | None = None
    """Folder for the records; by default benches/results, and none if tiny."""
    commit: str | None = None
    """Commit to name in the record where there is no repository."""
    tiny: bool = False
    """A tiny model on two simulated devices of the CPU; its times mean nothing."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places of parameters and values on the mesh."""

    name: str

    @property
    def devices(self) -> int:
        return 1 if self.name == "one GPU" else jax.device_count()

    @property
    def mesh(self) -> Any:
        devices = jax.devices()[: self.devices]
        return jax.make_mesh((self.devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)

    @property
    def is_tensor(self) -> bool:
        return self.name.startswith("tensor")

    def model(self, model: Model) -> Model:
        batch = model.batch if self.is_tensor else model.batch * self.devices
        return dataclasses.replace(model, batch=batch)

    def parameter(self, path: Any, leaf: Any) -> P:
        """Of a parameter, or of what the optimiser keeps of one."""
        names = {getattr(key, "key", None) for key in path}
        if self.is_tensor and leaf.ndim > 1:
            if names & {"qkv", "gate", "up", "logits"}:
                return P(*[None] * (leaf.ndim - 1), AXIS)
            if names & {"out", "down"}:
                return P(*[None] * (leaf.ndim - 2), AXIS)
        if self.name == "fully sharded" and leaf.size > 1 << 16:
            widest = max(range(leaf.ndim), key=lambda axis: leaf.shape[axis])
            return P(*[None] * widest, AXIS)
        return P()

    def tokens(self) -> P:
        return P() if self.is_tensor else P(AXIS)

    def place(self, array: jax.Array, name: str) -> jax.Array:
        """A value of the model, `[tokens, ..., C]`."""
        if self.name == "tensor, tokens split" and name != "layer_input":
            spec = P(AXIS)
        elif self.name == "tensor, C split" and name != "layer_input":
            spec = P(*[None] * (array.ndim - 1), AXIS)
        else:
            spec = self.tokens()
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


def time_steps(options: Options, model: Model) -> list[dict[str, Any]]:
    pairs = [(Layout(name), connection) for name in options.layouts for connection in CONNECTIONS]
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
            "tokens": steps.model.tokens, "losses": losses, "round_ms": rounds, "ms": ms,
            "tokens_per_s": steps.model.tokens / ms * 1e3, "memory": common.memory(program),
            "collectives": collectives(program.as_text()),
            "communication_ms": communication_ms(kernels, layout.devices),
            "kernels": dict(list(kernels.items())[:30]),
        })  # fmt: skip
        print(f"{layout.name}, {connection}: {ms:.1f} ms, losses {losses}", flush=True)
        del state, kept, tokens
    return rows


# ---- pre with split channels --------------------------------------------------------------------


def time_split_pre(tiny: bool) -> list[dict[str, Any]]:
    """Kernels of pre and of its gradients, C split over all GPUs, and on one GPU."""
    mesh = Layout("data").mesh
    num, calls = jax.device_count(), 20
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
                spec = P(None, None, AXIS) if split else P()
                devices = mesh if split else Layout("one GPU").mesh
                u_spec = P(None, AXIS) if split else P()
                shardings = [NamedSharding(devices, s) for s in (spec, P(), u_spec)]
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


def markdown(record: dict[str, Any]) -> str:
    first = {row["connection"]: row for row in record["rows"] if row["layout"] == "one GPU"}
    steps, plain = [], {}
    for row in record["rows"]:
        if row["connection"] == "residual":
            plain[row["layout"]] = row["ms"]
        alone = first.get(row["connection"])
        steps.append([
            row["layout"], LABELS[row["connection"]], row["devices"],
            row["tokens"], f"{row['ms']:.1f}",
            f"{100 * (row['ms'] / plain[row['layout']] - 1):+.1f} %",
            f"{row['tokens_per_s'] / alone['tokens_per_s']:.2f}" if alone else "",
            f"{row['communication_ms']:.1f}", f"{row['memory']['peak_bytes'] / 1e9:.1f}",
            listed(row["collectives"]),
        ])  # fmt: skip
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
    table = functools.partial(tabulate, tablefmt="github", disable_numparse=True)
    return "\n".join([
        f"# Training step on {record['devices']} GPUs, {record['gpu']}, {record['date']}", "",
        f"{record['gpu']}, driver {record['driver']}, jax {record['jax']}, {record['plugin']}, "
        f"commit {record['commit']} (library: {record['library_commit']}). n = {STREAMS}. "
        "Medians of four rounds. Collectives are those of the program's text, in millions of "
        "numbers; in loops over the layers they run once for each of these. NCCL's kernels also "
        "wait for the other GPUs.", "",
        table(steps, ["layout", "connection", "GPUs", "tokens", "ms", "over plain", "speed-up",
                      "NCCL, ms", "peak, GB", "collectives"]), "",
        "## pre with split channels", "", "Kernel time of a GPU, us.", "",
        table(splits, ["op", "T x C", "channels", "all kernels", "NCCL", "collectives"]), "",
    ])  # fmt: skip


def main(options: Options) -> None:
    if options.tiny:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
        options.steps = 4
    elif options.output is None:
        options.output = Path("benches/results")
    if jax.device_count() < 2:
        raise SystemExit("mesh_step.py: expected several GPUs, got one; --tiny simulates two")
    rows = time_steps(options, TINY if options.tiny else Model())
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or common.commit(),
        "devices": jax.device_count(),
        **common.versions(),
        "rows": rows,
        "split_pre": time_split_pre(options.tiny),
    }
    text = markdown(record)
    print(text)
    if options.output is not None:
        common.write(record, text, options.output / common.gpu_folder(record), "-mesh-step")
    for row in rows:
        if not abs(row["losses"][0] - rows[0]["losses"][0]) < 5e-2 * rows[0]["losses"][0]:
            raise SystemExit(f"mesh_step.py: losses differ: {row['losses']}, {rows[0]['losses']}")


if __name__ == "__main__":
    main(tyro.cli(Options))
