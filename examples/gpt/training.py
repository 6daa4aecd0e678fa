"""A run: one model in training with one connection from one seed, to its end or a checkpoint."""

import contextlib
import math
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import jax_mhc as mhc

from . import text
from .checkpoints import Checkpoints
from .model import GPT
from .report import LABELS
from .settings import CONNECTIONS, Connection, Settings, fail
from .sharding import Devices, keep


def make_optimizer(model: GPT, settings: Settings) -> nnx.Optimizer:
    """AdamW with clipping; of the parameters the blocks' matrices and projections decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.steps // 10,
        decay_steps=settings.steps,
        end_value=settings.learning_rate / 10,
    )

    def decays(params):
        def decays(label, p):
            return label == "projection" or (label == "other" and p.ndim == 3)  # stacked matrices

        return jax.tree.map(decays, mhc.param_labels(params), params)

    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=decays)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean loss of predicting tokens[:, 1:], in nats a byte."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit(static_argnames="sample_tokens", donate_argnames=("model", "optimizer"))
def train_step(model: GPT, optimizer: nnx.Optimizer, tokens: jax.Array, sample_tokens: int):
    """One step on tokens [batch, seq + 1]; returns loss, norm of the gradient, largest gains."""

    def loss_and_gain(model):
        logits, gain = model(tokens[:, :-1], sample_tokens)
        return cross_entropy(logits, tokens), gain

    (loss, gain), grads = nnx.value_and_grad(loss_and_gain, has_aux=True)(model)
    optimizer.update(model, grads)
    keep(model, optimizer)
    return jnp.stack([loss, optax.tree.norm(grads), *map(jnp.max, gain)])


@nnx.jit
def evaluate(model: GPT, tokens: jax.Array):
    """The loss on tokens [batch, seq + 1], and of all of them the largest gains and the means."""
    logits, gain = model(tokens[:, :-1], tokens[:, :-1].size)
    loss = cross_entropy(logits, tokens)
    return jnp.stack([loss, *map(jnp.max, gain), *map(jnp.mean, gain)])


class Run:
    """A model in training, and what there is to tell about it."""

    def __init__(self, connection: Connection, seed: int, settings: Settings):
        self.connection, self.seed, self.settings = connection, seed, settings
        start = time.perf_counter()
        self.model = nnx.jit(lambda: GPT(connection, settings, seed))()
        self.optimizer = make_optimizer(self.model, settings)
        self.devices = Devices(settings.devices)
        self.devices.place(self.model, self.optimizer)
        # As many at a time as divide all of them, and no more than there is memory for.
        num = settings.validation_windows
        self.num_windows = max(n for n in range(1, settings.batch + 1) if num % n == 0)
        batch, held_out = (
            self.devices.abstract_batch((size, settings.seq + 1))
            for size in (settings.batch, self.num_windows)
        )
        with self.devices.used():
            step = train_step.lower(self.model, self.optimizer, batch, settings.sample_tokens)
            self._step = step.compile()
            self._evaluate = evaluate.lower(self.model, held_out).compile()
        params = jax.tree.leaves(nnx.state(self.model, nnx.Param))
        self.facts = dict(
            num_params=sum(p.size for p in params),
            num_fused_calls=len(re.findall('custom_call_target="jax_mhc_', self._step.as_text())),
            compile_s=time.perf_counter() - start,
        )
        self.records: list[dict[str, float]] = []

    def step(self, tokens: np.ndarray) -> jax.Array:
        return self._step(self.model, self.optimizer, self.devices.batch(tokens))

    def evaluation(self, tokens: np.ndarray) -> dict[str, float]:
        """The mean loss on tokens [windows, seq + 1], the largest gains and their means."""
        parts = [
            self._evaluate(self.model, self.devices.batch(tokens[i : i + self.num_windows]))
            for i in range(0, len(tokens), self.num_windows)
        ]
        loss, forward, backward, mean_forward, mean_backward = np.stack(parts).T
        return dict(
            validation_loss=float(loss.mean()),
            gain_forward=float(forward.max()),
            gain_backward=float(backward.max()),
            mean_gain_forward=float(mean_forward.mean()),
            mean_gain_backward=float(mean_backward.mean()),
        )


def train(
    connection: Connection,
    seed: int,
    settings: Settings,
    data: tuple[np.ndarray, np.ndarray],
    console: Console,
    deadline: float,
) -> dict[str, Any] | None:
    """Return the records and the facts of a run; None if time is up before its end."""
    name, folder = f"{connection}-{seed}", None
    if settings.checkpoint_every:
        folder = settings.out / "checkpoints" / name
        if folder.exists() and not settings.resume:
            fail(f"--out: {folder} holds a run; add --resume to go on, or choose another folder")
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        told = checkpoints.load(settings) if checkpoints.step else None
        if told and checkpoints.step == settings.steps:
            console.print(f"{LABELS[connection]}, seed {seed}: finished before")
            return told
        with console.status(f"{LABELS[connection]}, seed {seed}: compiling"):
            run = Run(connection, seed, settings)
        describe(run, console)
        if told:
            checkpoints.restore(run)
            run.records = told["records"]
            console.print(f"  goes on after step {checkpoints.step}")
        if not advance(run, data, console, checkpoints, deadline):
            return None
        return dict(facts=run.facts, records=run.records)


def describe(run: Run, console: Console) -> None:
    facts, label = run.facts, LABELS[run.connection]
    console.print(
        f"{label}, seed {run.seed}: {facts['num_params']:,} parameters, "
        f"compiled in {facts['compile_s']:.1f} s"
    )
    if run.settings.devices > 1:
        params = jax.tree.leaves(nnx.state(run.model, nnx.Param))
        num = sum(p.addressable_shards[0].data.size for p in params)
        console.print(f"  fully sharded: {num:,} of them on each of {run.settings.devices} devices")
    if facts["num_fused_calls"]:
        console.print(
            f"  fused: {facts['num_fused_calls']} custom calls in the compiled step "
            f"(in loops over {run.settings.depth} blocks)"
        )
    elif CONNECTIONS[run.connection] is not None:
        console.print("  reference: no custom calls in the compiled step")


def advance(
    run: Run,
    data: tuple[np.ndarray, np.ndarray],
    console: Console,
    checkpoints: Checkpoints,
    deadline: float,
) -> bool:
    """Train to the end, or to the first checkpoint after the deadline; whether to the end."""
    settings, records = run.settings, run.records
    train_data, validation_data = data
    rng = np.random.default_rng(0)
    held_out = text.windows(validation_data, rng, settings.validation_windows, settings.seq)
    measure_every = max(1, settings.steps // 20)
    first = records[-1]["step"] + 1 if records else 1
    if not records:
        records.append(dict(step=0, **run.evaluation(held_out)))
    progress = Progress(
        TextColumn("  {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task(
            "", total=settings.steps, completed=first - 1, loss=math.nan, speed=0.0
        )

        start, left_band = time.perf_counter(), False

        def warn(warning: mhc.diagnostics.GainWarning) -> None:
            nonlocal left_band
            if not left_band:
                progress.print("  " + str(warning).split(". ")[0], highlight=False)
            left_band = True

        def tell(i: int, results: jax.Array) -> None:
            nonlocal start
            names = "loss", "grad_norm", "sampled_gain_forward", "sampled_gain_backward"
            values = dict(zip(names, np.asarray(results).tolist(), strict=True))
            seconds, start = time.perf_counter() - start, time.perf_counter()
            records.append(dict(step=i, **values, step_ms=seconds * 1e3))
            gain = mhc.diagnostics.Gain(*list(values.values())[2:])
            mhc.diagnostics.watch_gain(gain, step=i, callback=warn)
            speed = settings.batch * settings.seq / seconds
            progress.update(task, advance=1, loss=values["loss"], speed=speed)

        running: tuple[int, jax.Array] | None = None
        for i in range(first, settings.steps + 1):
            # The same batches for every connection, wherever a run was interrupted.
            rng = np.random.default_rng([run.seed, i])
            tokens = text.windows(train_data, rng, settings.batch, settings.seq)
            last, running = running, (i, run.step(tokens))
            if last:
                tell(*last)  # while this step runs
            measures = i % measure_every == 0 or i == settings.steps
            saves = settings.checkpoint_every and (
                i % settings.checkpoint_every == 0 or i == settings.steps
            )
            if measures or saves:
                tell(*running)
                running = None
                if measures:
                    records[-1] |= run.evaluation(held_out)
                if saves:
                    checkpoints.save(i, run)
                    if time.perf_counter() > deadline and i < settings.steps:
                        return False
                start = time.perf_counter()
    return True


def summarize(told: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A column of the table."""
    records = told["records"]
    steps = records[1:]
    measured = [r for r in records if "validation_loss" in r]
    step_ms = statistics.median(r["step_ms"] for r in steps)
    return told["facts"] | dict(
        initial_validation_loss=measured[0]["validation_loss"],
        train_loss=statistics.fmean(r["loss"] for r in steps[-20:]),
        validation_loss=measured[-1]["validation_loss"],
        max_grad_norm=max(r["grad_norm"] for r in steps),
        max_gain_forward=max(r["gain_forward"] for r in measured),
        max_gain_backward=max(r["gain_backward"] for r in measured),
        max_mean_gain_forward=max(r["mean_gain_forward"] for r in measured),
        max_mean_gain_backward=max(r["mean_gain_backward"] for r in measured),
        step_ms=step_ms,
        tokens_per_s=settings.batch * settings.seq / step_ms * 1e3,
    )
