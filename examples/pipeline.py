"""A pipeline-parallel GPT with mHC, whose transfers between stages run while others compute.

    python examples/pipeline.py --help

Every device of the mesh axis `stage` has some of the blocks and works on one micro-batch at a time;
what it has computed goes on to the next stage. That are the streams, n·C numbers a token in
bfloat16, and backward their cotangent: n times what a plain residual model sends. There is nothing
smaller to send: the streams after a stage follow from those before its last sublayer and what that
returns, which is more. That is what `mhc.Streams` hold, with which a stage works, so it takes an
array, and each boundary is crossed once, by `x.array()` alone.

With --overlap, which is the default, a stage does not wait for what the stage before it has just
computed. That is on its way for a tick, in which both compute other micro-batches:

    tick t of stage k:   compute micro-batch t - 2k  |  send what tick t - 1 gave

No transfer depends on the computation beside it, so XLA runs both at once; backward it is the same
in reverse order. A batch takes micro_batches + 2 (stages - 1) ticks then. With --no-overlap a tick
ends with the transfer of what it gave, and a batch takes micro_batches + stages - 1 of these.

With --chunks V a stage has V chunks of blocks in place of one (interleaving): chunk 0 is on the
first stage, chunk 1 on the next, and from the last stage streams go on to the first, round by
round. A tick then computes one chunk, 1/V of a stage's blocks, so the ticks in which the pipeline
fills and drains are shorter; streams cross V times as many boundaries.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mhc as mhc


@dataclasses.dataclass(frozen=True)
class Settings:
    """A pipeline and its model."""

    stages: int = 2
    """Devices that the blocks are spread over."""
    chunks: int = 1
    """Parts of a stage's blocks; with more than one, streams go round the stages as often."""
    data: int = 1
    """Devices that the batch is spread over, for each stage."""
    micro_batches: int = 4
    """Parts of a batch that are on their way at the same time."""
    micro_batch: int = 4
    """Sequences of a part, on all devices of `data` together."""
    overlap: bool = True
    """Send a micro-batch on while others are computed."""
    connection: Literal["mhc", "residual"] = "mhc"
    streams: int = 4
    layers: int = 4
    """Blocks of attention and MLP, on all stages together."""
    hidden: int = 64
    heads: int = 4
    mlp: int = 256
    length: int = 64
    vocabulary: int = 256
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["xla", "cudnn"] = "xla"
    steps: int = 10
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        """Sizes that do not fit together."""
        for what, of, size in (
            ("layers", "stages times chunks", self.stages * self.chunks),
            ("hidden", "heads", self.heads),
            ("micro_batch", "data", self.data),
            ("micro_batches", "a group that goes round", self.group),
        ):
            if getattr(self, what) % size:
                raise SystemExit(
                    f"pipeline.py: {what}: expected a multiple of {of}, {size}, got "
                    f"{getattr(self, what)}"
                )

    @property
    def hop(self) -> int:
        """Ticks from one stage to the next."""
        return 2 if self.overlap else 1

    @property
    def delay(self) -> int:
        """Ticks from when the first stage takes a micro-batch to when the last one does."""
        return self.hop * (self.stages - 1)

    @property
    def group(self) -> int:
        """Micro-batches that go round together: as many as ticks until the first one is back."""
        return self.hop * self.stages if self.chunks > 1 else self.micro_batches

    @property
    def ticks(self) -> int:
        return self.micro_batches * self.chunks + self.delay

    @property
    def boundary_bytes(self) -> int:
        """Bytes that a stage sends on in a step and, backward, back, each."""
        tokens = self.chunks * self.micro_batches * self.micro_batch * self.length
        streams = self.streams if self.connection == "mhc" else 1
        return tokens * streams * self.hidden * jnp.dtype(self.dtype).itemsize


# ---- the model ----------------------------------------------------------------------------------


def init(key: jax.Array, s: Settings) -> dict[str, Any]:
    """Parameters; those of the blocks are stacked `[chunks, blocks, ...]`."""
    keys = iter(jax.random.split(key, 10))

    def normal(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape, jnp.float32)

    num, width = s.layers, s.hidden
    make = jax.vmap(functools.partial(mhc.init_params, streams=s.streams, hidden=width))
    params = {
        "embedding": normal(s.vocabulary, width),
        "logits": normal(width, s.vocabulary),
        "blocks": {
            "qkv": normal(num, width, 3, width),
            "out": normal(num, width, width),
            "up": normal(num, width, s.mlp),
            "down": normal(num, s.mlp, width),
            "connections": [make(jax.random.split(next(keys), num)) for _ in range(2)],
        },
    }
    # Each part of the second dimension, on a stage, has its blocks of every chunk.
    params["blocks"] = jax.tree.map(
        lambda leaf: leaf.reshape(s.chunks, -1, *leaf.shape[1:]), params["blocks"]
    )
    return params


def rms_norm(u: jax.Array) -> jax.Array:
    wide = u.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(u.dtype)


def attention(u: jax.Array, weights: Any, s: Settings) -> jax.Array:
    qkv = jnp.einsum("...c,cid->...id", rms_norm(u), weights["qkv"].astype(u.dtype))
    q, k, v = (part.reshape(*u.shape[:-1], s.heads, -1) for part in jnp.moveaxis(qkv, -2, 0))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=s.attention)
    return out.reshape(u.shape) @ weights["out"].astype(u.dtype)


def mlp(u: jax.Array, weights: Any) -> jax.Array:
    inner = jax.nn.silu(rms_norm(u) @ weights["up"].astype(u.dtype))
    return inner @ weights["down"].astype(u.dtype)


def embed(tokens: jax.Array, embedding: jax.Array, s: Settings) -> jax.Array:
    return embedding[tokens].astype(s.dtype)


def enter(u: jax.Array, s: Settings) -> jax.Array:
    """Embedded tokens to what goes from block to block."""
    return mhc.expand(u, streams=s.streams).array() if s.connection == "mhc" else u


def run_blocks(x: jax.Array, blocks: Any, s: Settings) -> jax.Array:
    """All blocks that are there, in a scan."""
    layers = [functools.partial(attention, s=s), mlp]
    if s.connection == "mhc":
        # Streams hold more than their array, which alone goes to the next stage.
        streams = mhc.stack(layers, mhc.as_streams(x), blocks["connections"], xs=blocks)
        return streams.array()

    def block(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        for layer in layers:
            x = x + layer(x, weights)
        return x, None

    weights = {name: leaf for name, leaf in blocks.items() if name != "connections"}
    return jax.lax.scan(block, x, weights)[0]


def leave(x: jax.Array, tokens: jax.Array, params: Any, s: Settings) -> jax.Array:
    """Mean cross entropy of the next tokens."""
    u = rms_norm(mhc.reduce(x) if s.connection == "mhc" else x)
    logits = (u @ params["logits"].astype(u.dtype)).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[..., :-1, :], tokens[..., 1:])
    return losses.mean()


def plain_loss(params: Any, tokens: jax.Array, s: Settings) -> jax.Array:
    """The same without a pipeline, for tokens `[micro_batches, micro_batch, length]`."""
    tokens = tokens.reshape(-1, tokens.shape[-1])
    x = enter(embed(tokens, params["embedding"], s), s)
    blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), params["blocks"])
    return leave(run_blocks(x, blocks, s), tokens, params, s)


# ---- the pipeline -------------------------------------------------------------------------------


def send_on(x: jax.Array, s: Settings) -> jax.Array:
    """To the next stage; with one chunk the first gets zeros, which it does not read."""
    to = [(i, (i + 1) % s.stages) for i in range(s.stages)]
    return jax.lax.ppermute(x, "stage", to if s.chunks > 1 else to[:-1])


def pad(array: jax.Array, axis: int, num: int) -> jax.Array:
    """Zeros at the end of an axis."""
    widths = [(0, num if at == axis else 0) for at in range(array.ndim)]
    return jnp.pad(array, widths)


def stage_loss(params: Any, tokens: jax.Array, s: Settings) -> jax.Array:
    """One device's program: its blocks `[chunks, blocks, ...]`, on its part of the batch."""
    stage = jax.lax.axis_index("stage")

    def compute(received: jax.Array, embedded: jax.Array, number: jax.Array) -> jax.Array:
        # Micro-batches of a group follow each other in every round.
        chunk = (number - s.hop * stage) // s.group % s.chunks if s.chunks > 1 else 0
        x = jnp.where((stage == 0) & (chunk == 0), enter(embedded, s), received)
        return run_blocks(x, jax.tree.map(lambda leaf: leaf[chunk], params["blocks"]), s)

    def tick(carry: Any, of_tick: Any) -> tuple[Any, jax.Array]:
        received, computed = carry
        if s.overlap:
            arriving = send_on(computed, s)  # beside the next line
            computed = compute(received, *of_tick)
            # Without it XLA sends backward for two ticks at once, and beside nothing.
            return jax.lax.optimization_barrier((arriving, computed)), computed
        computed = compute(received, *of_tick)
        return (send_on(computed, s), computed), computed

    # All at once, and gradients of the embedding summed up over stages only after all ticks.
    embedding = jax.lax.pcast(params["embedding"], ("stage",), to="varying")
    embedded = embed(tokens, embedding, s)
    # Zeros in the later rounds of a group, in which none enters, and after the last micro-batch,
    # when the first stages work on what nobody reads.
    embedded = embedded.reshape(-1, s.group, *embedded.shape[1:])
    embedded = pad(embedded, 1, (s.chunks - 1) * s.group)
    embedded = pad(embedded.reshape(-1, *embedded.shape[2:]), 0, s.delay)
    nothing = jnp.zeros_like(enter(embedded[0], s))
    # In a loop XLA would copy what each tick keeps for the backward pass, a tenth of a step.
    of_ticks = embedded, jnp.arange(s.ticks, dtype=jnp.int32)
    _, results = jax.lax.scan(tick, (nothing, nothing), of_ticks, unroll=True)
    # Results of tick i + s.delay are of what entered the round in tick i; the last round's count.
    results = results[s.delay :].reshape(-1, s.chunks, s.group, *results.shape[1:])[:, -1]
    loss = leave(results.reshape(s.micro_batches, *results.shape[2:]), tokens, params, s)
    loss = jnp.where(stage == s.stages - 1, loss, 0.0)
    return jax.lax.pmean(jax.lax.psum(loss, "stage"), "data")


def specs(params: Any) -> Any:
    """Blocks over stages; embedding and logits everywhere."""

    def spec(path: Any, _: Any) -> P:
        return P(None, "stage") if path[0].key == "blocks" else P()

    return jax.tree_util.tree_map_with_path(spec, params)


def make_mesh(s: Settings) -> Any:
    kinds = (AxisType.Auto, AxisType.Auto)
    devices = jax.devices()[: s.stages * s.data]
    return jax.make_mesh((s.stages, s.data), ("stage", "data"), axis_types=kinds, devices=devices)


def value_and_gradients(s: Settings, mesh: Any, params: Any) -> Any:
    """`(params, tokens) -> loss, gradients` on the mesh; tokens `[micro_batches, ..., length]`."""
    return jax.shard_map(
        jax.value_and_grad(functools.partial(stage_loss, s=s)),
        mesh=mesh,
        in_specs=(specs(params), P(None, "data")),
        out_specs=(P(), specs(params)),
    )


# ---- training -----------------------------------------------------------------------------------


def load_batches(s: Settings) -> np.ndarray:
    """Bytes of Python's standard library, the same batches every time."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)
    shape = (s.steps, s.micro_batches, s.micro_batch)
    starts = np.random.default_rng(0).integers(len(text) - s.length, size=shape)
    return text[starts[..., None] + np.arange(s.length)].astype(np.int32)


def train(s: Settings) -> list[float]:
    """Losses of all steps; prints them, and how long a step takes."""
    mesh = make_mesh(s)
    optimizer = optax.adamw(s.learning_rate)
    shapes = jax.eval_shape(functools.partial(init, s=s), jax.random.key(0))
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(shapes))
    params = jax.jit(functools.partial(init, s=s), out_shardings=placed)(jax.random.key(0))
    state = params, jax.jit(optimizer.init)(params)
    batches = load_batches(s)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, tokens: jax.Array) -> Any:
        params, optimizer_state = state
        value, gradients = value_and_gradients(s, mesh, shapes)(params, tokens)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    compiled = step.lower(state, batches[0]).compile()
    calls = compiled.as_text().count('custom_call_target="jax_mhc_')
    print(
        f"{s.stages} stages, {s.chunks} chunks each, {s.connection}, "
        f"{'overlap' if s.overlap else 'no overlap'}, {s.ticks} ticks: "
        f"{s.boundary_bytes / 1e6:.2f} MB forward and as much backward over each boundary a step, "
        f"{calls} fused calls"
    )
    losses, times = [], []
    for number, tokens in enumerate(batches):
        start = time.perf_counter()
        state, value = compiled(state, tokens)
        losses.append(float(value))
        times.append((time.perf_counter() - start) * 1e3)
        print(f"step {number}: loss {losses[-1]:.4f}, {times[-1]:.1f} ms", flush=True)
    print(f"median of a step: {statistics.median(times[1:] or times):.1f} ms")
    return losses


def main(settings: Settings) -> None:
    needed = settings.stages * settings.data
    if jax.config.jax_platforms == "cpu" or not jax.config.jax_platforms:
        # Simulated devices, where there are none; it has no say in how many GPUs there are.
        jax.config.update("jax_num_cpu_devices", needed)
    if jax.device_count() < needed:
        raise SystemExit(
            f"pipeline.py: expected {needed} devices (stages times data), got "
            f"{jax.device_count()}; JAX_PLATFORMS=cpu simulates them"
        )
    train(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
