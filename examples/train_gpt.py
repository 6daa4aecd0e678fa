"""Train a small byte-level GPT with three residual connections and compare them.

The same model (same initial weights, same batches) is trained in turn with the plain residual
connection, with unconstrained hyper-connections (HC, arXiv 2409.19606) and with
manifold-constrained hyper-connections (mHC, arXiv 2512.24880), by default on the sources of the
Python standard library. Ends with a table, a figure (train_gpt.png) and the records (records.csv,
summary.json).
"""

import csv
import dataclasses
import json
import math
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jax_mhc as mhc

CONFIGS = {
    "residual": None,
    "hc": mhc.MHCConfig(constraint="none"),
    "mhc": mhc.MHCConfig(constraint="birkhoff"),
}

# Label, colour (Okabe-Ito: told apart by colour-blind readers too) and line width. The curves often
# lie on top of each other, so later ones are thinner.
STYLES = {
    "residual": ("plain residual", "#999999", 4.0),
    "hc": ("HC", "#E69F00", 2.4),
    "mhc": ("mHC", "#0072B2", 1.4),
}

TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst")
NUM_VALIDATION_WINDOWS = 32


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of one comparison."""

    connections: tuple[Literal["residual", "hc", "mhc"], ...] = ("residual", "hc", "mhc")
    """Residual connections to train, in this order."""
    depth: int = 8
    """Transformer blocks; each has two sublayers, attention and MLP."""
    width: int = 96
    """Hidden width C of one stream; a multiple of heads."""
    heads: int = 4
    """Attention heads."""
    streams: int = 4
    """Residual streams n of HC and mHC, 1 to 16."""
    steps: int = 240
    """Optimizer steps for each connection."""
    batch: int = 8
    """Windows of text in a batch."""
    seq: int = 64
    """Bytes in a window."""
    learning_rate: float = 3e-3
    """Peak learning rate, after a linear warm-up over 1/10 of the steps; then cosine to 1/10."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the streams and of the layers' arithmetic; parameters are always float32."""
    implementation: Literal["fused", "reference"] | None = None
    """Of the HC and mHC ops. None: fused on platforms that have kernels, reference elsewhere."""
    text: tuple[Path, ...] = ()
    """Text files, or folders with .py, .txt, .md and .rst files; default: the standard library."""
    seed: int = 0
    """Seed of the initial weights and of the order of the batches."""
    out: Path = Path("demo")
    """Folder for the figure and the records."""


def fail(message: str) -> NoReturn:
    """End as on any wrong option: a line on standard error, exit status 2."""
    print(f"train_gpt.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def check(settings: Settings) -> None:
    """Refuse what would only fail later, in the middle of a run."""
    for name in ("depth", "width", "heads", "streams", "steps", "batch", "seq"):
        if getattr(settings, name) < 1:
            fail(f"--{name}: expected at least 1, got {getattr(settings, name)}")
    if settings.streams > 16:
        fail(f"--streams: expected 1 to 16, got {settings.streams}")
    if settings.width % settings.heads:
        fail(
            f"--width: expected a multiple of --heads {settings.heads}, got {settings.width}; "
            "change one of the two"
        )
    if not 0 < settings.learning_rate < math.inf:
        fail(f"--learning-rate: expected a number above 0, got {settings.learning_rate}")
    given = settings.connections
    if not given or len(set(given)) < len(given):
        names = ", ".join(CONFIGS)
        fail(f"--connections: expected some of {names}, each once, got {' '.join(given) or 'none'}")
    if settings.out.exists() and not settings.out.is_dir():
        fail(f"--out: expected a folder, got the file {settings.out}")
    try:  # a call of the smallest size finds missing kernels before the first model is trained
        params = mhc.init_params(jax.random.key(0), streams=1, hidden=1)
        mhc.pre(jnp.zeros((1, 1, 1), jnp.float32), params, implementation=settings.implementation)
    except (RuntimeError, ValueError) as error:
        fail(str(error))


# Text


def load_text(settings: Settings) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the bytes for training and for validation, and what they are.

    Every tenth file (after a fixed shuffle) is for validation, so that no file is in both. A single
    file is cut instead; its last tenth is for validation.
    """
    if settings.text:
        name, files = ", ".join(map(str, settings.text)), set()
        for path in settings.text:
            if not path.exists():
                fail(f"--text: no such file or folder: {path}")
            inside = {f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES}
            files |= inside if path.is_dir() else {path}
    else:
        name = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
        root = Path(sysconfig.get_path("stdlib"))
        files = {f for f in root.rglob("*.py") if "site-packages" not in f.parts}

    contents = [np.frombuffer(f.read_bytes(), np.uint8) for f in sorted(files) if f.is_file()]
    contents = [content for content in contents if content.size]
    if not contents:
        fail(f"--text: no text in {name}; folders are searched for {', '.join(TEXT_SUFFIXES)}")
    if len(contents) == 1:
        train, validation = np.split(contents[0], [contents[0].size * 9 // 10])
    else:
        order = np.random.default_rng(0).permutation(len(contents))
        validation = np.concatenate([contents[i] for i in order[::10]])
        train = np.concatenate([contents[i] for i in np.delete(order, np.s_[::10])])
    for part, data in (("training", train), ("validation", validation)):
        if data.size <= settings.seq:
            fail(
                f"--text: expected more than {settings.seq} bytes (--seq) for {part}, "
                f"got {data.size}; give more text or a smaller --seq"
            )
    sizes = f"{train.size / 1e6:.3g} MB for training, {validation.size / 1e6:.3g} MB held out"
    return train, validation, f"{name}, {len(contents)} files, {sizes}"


def draw_windows(data: np.ndarray, rng: np.random.Generator, count: int, seq: int) -> np.ndarray:
    """Return `count` random windows of the text, int32 [count, seq + 1]."""
    starts = rng.integers(0, data.size - seq, count)
    return data[starts[:, None] + np.arange(seq + 1)].astype(np.int32)


# Model


class Attention(nnx.Module):
    """Pre-norm causal self-attention, [batch, seq, width] -> [batch, seq, width]."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        width, dtype = settings.width, jnp.dtype(settings.dtype)
        self.heads = settings.heads
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, u: jax.Array) -> jax.Array:
        qkv = self.qkv(self.norm(u)).reshape(*u.shape[:-1], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.reshape(u.shape))


class MLP(nnx.Module):
    """Pre-norm feed-forward layer, [batch, seq, width] -> [batch, seq, width]."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        width, dtype = settings.width, jnp.dtype(settings.dtype)
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, u: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(self.norm(u))))


class Sublayer(nnx.Module):
    """A layer and the residual connection around it."""

    def __init__(self, layer: nnx.Module, connection: str, settings: Settings, rngs: nnx.Rngs):
        self.layer = layer
        self.config = CONFIGS[connection]
        if self.config is not None:
            self.implementation = settings.implementation
            params = mhc.init_params(
                rngs.connection(),
                streams=settings.streams,
                hidden=settings.width,
                config=self.config,
            )
            self.phi = nnx.Param(params.phi)
            self.alpha = nnx.Param(params.alpha)
            self.bias = nnx.Param(params.bias)

    def __call__(self, x: jax.Array, composite: jax.Array | None):
        """Return the new x, and the composite with this sublayer's h_res on top if there is one."""
        if self.config is None:
            return x + self.layer(x), composite
        params = mhc.MHCParams(self.phi[...], self.alpha[...], self.bias[...])
        options = dict(config=self.config, implementation=self.implementation)
        if composite is None:
            return mhc.mhc_residual(self.layer, x, params, **options), None
        # The same in its two halves, because the context between them holds h_res.
        u, ctx = mhc.pre(x, params, **options)
        x = mhc.post(self.layer(u), ctx, implementation=self.implementation)
        return x, jnp.matmul(ctx.h_res, composite, precision="highest")


class Block(nnx.Module):
    """Attention and MLP, each with its connection."""

    def __init__(self, connection: str, settings: Settings, rngs: nnx.Rngs):
        self.attention = Sublayer(Attention(settings, rngs), connection, settings, rngs)
        self.mlp = Sublayer(MLP(settings, rngs), connection, settings, rngs)

    def __call__(self, x: jax.Array, composite: jax.Array | None):
        return self.mlp(*self.attention(x, composite))


class GPT(nnx.Module):
    """Byte-level language model; its blocks are stacked, and one scan runs over them."""

    def __init__(self, connection: str, settings: Settings):
        # The connections draw from a stream of their own, so that the layers of all models start
        # from the same weights.
        rngs = nnx.Rngs(settings.seed, connection=settings.seed)
        width, dtype = settings.width, jnp.dtype(settings.dtype)
        self.streams = None if CONFIGS[connection] is None else settings.streams
        self.bytes = nnx.Embed(256, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(settings.seq, width, dtype=dtype, rngs=rngs)

        @nnx.split_rngs(splits=settings.depth)
        @nnx.vmap
        def stack(rngs):
            return Block(connection, settings, rngs)

        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.logits = nnx.Linear(width, 256, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, composite: jax.Array | None = None):
        """[batch, seq] -> logits [batch, seq, 256] float32, and the composite as in Sublayer."""
        x = self.bytes(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        if self.streams:
            x = mhc.expand(x, streams=self.streams)
        run = nnx.scan(
            lambda block, carry: block(*carry), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
        )
        x, composite = run(self.blocks, (x, composite))
        if self.streams:
            x = mhc.reduce(x)
        return self.logits(self.norm(x)).astype(jnp.float32), composite


# Training


def make_optimizer(model: GPT, settings: Settings) -> nnx.Optimizer:
    """AdamW with clipping; of the parameters only the blocks' matrices decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.steps // 10,
        decay_steps=settings.steps,
        end_value=settings.learning_rate / 10,
    )

    def decays(params):
        return jax.tree.map(lambda p: p.ndim == 3, params)  # stacked matrices

    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=decays)
    return nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean loss of predicting tokens[:, 1:], in nats a byte."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: GPT, optimizer: nnx.Optimizer, tokens: jax.Array):
    """One step on tokens [batch, seq + 1]; returns the loss and the gradient's norm."""
    loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(tokens[:, :-1])[0], tokens))(model)
    optimizer.update(model, grads)
    return loss, optax.tree.norm(grads)


@nnx.jit
def evaluate(model: GPT, tokens: jax.Array):
    """Return the loss and the composite gains, forward and backward, the largest of all tokens."""
    inputs, n = tokens[:, :-1], model.streams or 1
    logits, composite = model(inputs, jnp.broadcast_to(jnp.eye(n), (*inputs.shape, n, n)))
    forward, backward = mhc.diagnostics.amax_gain(composite)
    return cross_entropy(logits, tokens), forward.max(), backward.max()


def build(connection: str, settings: Settings) -> tuple[Callable, Callable, dict]:
    """Compile one model's functions: step(tokens), evaluation(tokens) and what the table says."""
    start = time.perf_counter()
    model = nnx.jit(lambda: GPT(connection, settings))()
    optimizer = make_optimizer(model, settings)
    batch, validation = (
        jax.ShapeDtypeStruct((count, settings.seq + 1), jnp.int32)
        for count in (settings.batch, NUM_VALIDATION_WINDOWS)
    )
    step = train_step.lower(model, optimizer, batch).compile()
    evaluation = evaluate.lower(model, validation).compile()
    facts = dict(
        connection=connection,
        num_params=sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))),
        num_fused_calls=len(re.findall('custom_call_target="jax_mhc_', step.as_text())),
        compile_s=time.perf_counter() - start,
    )
    return (
        lambda tokens: map(float, step(model, optimizer, tokens)),
        lambda tokens: map(float, evaluation(model, tokens)),
        facts,
    )


def train(
    connection: str, settings: Settings, data: tuple[np.ndarray, np.ndarray], console: Console
) -> tuple[list[dict], dict]:
    """Train one model; return a record of each step, and its column of the table."""
    label = STYLES[connection][0]
    with console.status(f"{label}: compiling"):
        step, evaluation, facts = build(connection, settings)
    console.print(
        f"{label}: {facts['num_params']:,} parameters, compiled in {facts['compile_s']:.1f} s"
    )
    if facts["num_fused_calls"]:
        console.print(
            f"  fused: {facts['num_fused_calls']} custom calls in the compiled step "
            f"(in loops over {settings.depth} blocks)"
        )
    elif CONFIGS[connection] is not None:
        console.print("  reference: no custom calls in the compiled step")

    train_data, validation_data = data
    rng = np.random.default_rng(settings.seed)  # the same batches for every connection
    held_out = draw_windows(
        validation_data, np.random.default_rng(0), NUM_VALIDATION_WINDOWS, settings.seq
    )
    records = []

    def record(**values) -> None:
        if values["step"] % max(1, settings.steps // 20) == 0 or values["step"] == settings.steps:
            names = ("validation_loss", "gain_forward", "gain_backward")
            values |= zip(names, evaluation(held_out), strict=True)
        records.append(dict(connection=connection, **values))

    record(step=0)
    progress = Progress(
        TextColumn("  {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task("", total=settings.steps, loss=math.nan, speed=0.0)
        for i in range(1, settings.steps + 1):
            tokens = draw_windows(train_data, rng, settings.batch, settings.seq)
            start = time.perf_counter()
            loss, grad_norm = step(tokens)
            seconds = time.perf_counter() - start
            record(step=i, loss=loss, grad_norm=grad_norm, step_ms=seconds * 1e3)
            speed = settings.batch * settings.seq / seconds
            progress.update(task, advance=1, loss=loss, speed=speed)

    steps = records[1:]
    measured = [r for r in records if "validation_loss" in r]
    return records, facts | dict(
        initial_validation_loss=measured[0]["validation_loss"],
        train_loss=statistics.fmean(r["loss"] for r in steps[-20:]),
        validation_loss=measured[-1]["validation_loss"],
        max_grad_norm=max(r["grad_norm"] for r in steps),
        max_gain_forward=max(r["gain_forward"] for r in measured),
        max_gain_backward=max(r["gain_backward"] for r in measured),
        step_ms=statistics.median(r["step_ms"] for r in steps),
    )


# Results


def describe(settings: Settings) -> str:
    """The configuration in a line."""
    return (
        f"depth {settings.depth} ({2 * settings.depth} sublayers), width {settings.width}, "
        f"heads {settings.heads}, streams {settings.streams}, {settings.batch} × {settings.seq} "
        f"bytes a step, learning rate {settings.learning_rate:g}, {settings.dtype}, "
        f"seed {settings.seed}"
    )


def make_table(columns: list[dict]) -> Table:
    """The comparison, with a column for each connection."""
    table = Table("", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(STYLES[column["connection"]][0], justify="right")
    for label, key, style in (
        ("parameters", "num_params", ",d"),
        ("fused calls in the step", "num_fused_calls", "d"),
        ("validation loss, initial", "initial_validation_loss", ".4f"),
        ("validation loss, final", "validation_loss", ".4f"),
        ("training loss, last 20 steps", "train_loss", ".4f"),
        ("gradient norm, largest", "max_grad_norm", ".3g"),
        ("composite gain forward, largest", "max_gain_forward", ".5g"),
        ("composite gain backward, largest", "max_gain_backward", ".5g"),
        ("step, ms, median", "step_ms", ".1f"),
        ("compilation, s", "compile_s", ".1f"),
    ):
        table.add_row(label, *(format(column[key], style) for column in columns))
    return table


def draw_figure(records: list[dict], settings: Settings) -> Figure:
    """Loss, gradient norm and composite gain over the steps."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss, norm, gain = figure.subplots(1, 3)
    for connection in settings.connections:
        label, color, width = STYLES[connection]
        own = [r for r in records if r["connection"] == connection]

        def curve(axes, key, own=own, color=color, **style):
            points = [(r["step"], r[key]) for r in own if key in r]
            axes.plot(*zip(*points, strict=True), color=color, **style)

        curve(loss, "loss", lw=0.6, alpha=0.35)
        curve(loss, "validation_loss", lw=width, label=label)
        curve(norm, "grad_norm", lw=0.7 * width, label=label)
        curve(gain, "gain_forward", lw=width, label=label)
        curve(gain, "gain_backward", lw=width, ls=(0, (3, 2)))
    loss.set(title="Loss (thick: validation, thin: training)", ylabel="nats a byte")
    norm.set(title="Gradient norm, before clipping", yscale="log")
    gain.set(title="Composite gain (dashed: backward)", yscale="log")
    gain.set_ylabel("largest of all tokens")
    for axes in (loss, norm, gain):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Byte-level GPT, {describe(settings)}", fontsize=10)
    return figure


def save(records: list[dict], columns: list[dict], settings: Settings, text: str) -> None:
    """Write train_gpt.png, records.csv (a line for each step) and summary.json into the folder."""
    draw_figure(records, settings).savefig(settings.out / "train_gpt.png", dpi=100)
    names = list(dict.fromkeys(name for record in records for name in record))
    with open(settings.out / "records.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(records)
    summary = dict(
        settings=dataclasses.asdict(settings),
        text=text,
        device=jax.devices()[0].device_kind,
        versions={m.__name__: m.__version__ for m in (jax, flax, optax)},
        results=columns,
    )
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")


def main(settings: Settings) -> None:
    """Run the comparison."""
    start = time.perf_counter()
    check(settings)
    *data, text = load_text(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(f"text: {text}")
    records, columns = [], []
    for connection in settings.connections:
        run_records, column = train(connection, settings, data, console)
        records += run_records
        columns.append(column)
    save(records, columns, settings, text)
    console.print(f"\n{describe(settings)}")
    console.print(make_table(columns))
    console.print(
        "Losses in nats a byte. A composite gain of 1 means that the residual path neither "
        "amplifies nor damps over the whole depth."
    )
    console.print(f"{time.perf_counter() - start:.0f} s in all. Now look at", end=" ")
    console.print(settings.out / "train_gpt.png", soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
