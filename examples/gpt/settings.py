"""Settings: what can be chosen, and what is refused."""

import dataclasses
import math
import sys
import sysconfig
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp

import jax_mhc as mhc

Connection = Literal["residual", "hc", "mhc", "static", "identity", "lite", "published"]

# Options of jax_mhc.flax.nnx.MHC for each; None is x + layer(x).
CONNECTIONS: dict[Connection, dict[str, Any] | None] = {
    "residual": None,
    "hc": {"config": mhc.MHCConfig(constraint="none")},
    "mhc": {"config": mhc.MHCConfig(constraint="birkhoff")},
    "static": {"config": mhc.MHCConfig(constraint="birkhoff"), "static": True},
    "identity": {"config": mhc.MHCConfig(constraint="identity")},
    "lite": {"config": mhc.MHCConfig(constraint="permutations")},
    "published": {"config": mhc.presets.HYPER_CONNECTIONS},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of one comparison."""

    preset: Literal["demo", "h200"] = "demo"
    """What the other options are by default: a demo for any machine, or a model of 24 blocks and 76
    million parameters for one H200, with checkpoints."""
    connections: tuple[Connection, ...] = ("residual", "hc", "mhc")
    """Residual connections to train, in this order: plain residuals, mHC without its constraint
    (hc), mHC; mHC with coefficients that are the same for all tokens (static), with streams that do
    not mix (identity), with a mean of permutations in place of Sinkhorn (lite); hyper-connections
    as published, in plain JAX (published)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights and of the order of the batches; each connection is trained with
    each."""
    depth: int = 8
    """Transformer blocks; each has two sublayers, attention and MLP."""
    width: int = 96
    """Hidden width C of one stream; a multiple of heads."""
    heads: int = 4
    """Attention heads."""
    streams: int = 4
    """Residual streams n, 1 to 16; at most 4 for lite."""
    sinkhorn_iters: int = 20
    """Iterations that make h_res doubly stochastic, for mhc and static."""
    steps: int = 160
    """Optimizer steps of each run."""
    batch: int = 8
    """Windows of text in a batch."""
    seq: int = 64
    """Bytes in a window."""
    learning_rate: float = 3e-3
    """Peak learning rate, after a linear warm-up over 1/10 of the steps; then cosine to 1/10."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the streams and of the layers' arithmetic; parameters are always float32."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Implementation of attention; cudnn is for GPUs and bfloat16."""
    implementation: Literal["fused", "reference"] | None = None
    """Of the ops of jax_mhc. None: fused on platforms that have kernels, reference elsewhere."""
    text: tuple[Path, ...] = ()
    """Text files, or folders with .py, .txt, .md and .rst files; default: the standard library."""
    megabytes: int = 200
    """Of more text than this, some files, drawn at random."""
    validation_windows: int = 32
    """Held-out windows on which the loss and the gain of all tokens are measured, 20 times a run
    and at both ends."""
    sample_tokens: int = 64
    """Tokens of a batch on which each step measures the composite gain."""
    devices: int = 1
    """Devices over which the batch and, fully sharded, parameters and optimizer are spread. A run
    may go on, with resume, on another number of them."""
    checkpoint_every: int = 0
    """Steps between checkpoints, in out/checkpoints; 0 for none."""
    resume: bool = False
    """Go on from the checkpoints in out, and leave out runs that were finished there."""
    minutes: float = math.inf
    """Stop after so many, at the next checkpoint, to be resumed later."""
    out: Path = Path("demo")
    """Folder for the figure and the records."""

    @property
    def of_a_run(self) -> dict[str, Any]:
        """Settings that a run depends on beside its connection and its seed."""
        others = ("preset", "connections", "seeds", "devices", "checkpoint_every", "resume",
                  "minutes", "out")  # fmt: skip
        every = {k: v for k, v in dataclasses.asdict(self).items() if k not in others}
        return every | {"text": [str(path) for path in self.text]}


PRESETS = {
    "demo": Settings(),
    "h200": Settings(
        preset="h200",
        seeds=(0, 1, 2),
        depth=24,
        width=512,
        heads=8,
        steps=2000,
        batch=32,
        seq=512,
        learning_rate=1e-3,
        dtype="bfloat16",
        attention="cudnn",
        text=tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")),
        validation_windows=256,
        checkpoint_every=1000,
        out=Path("results"),
    ),
}


def fail(message: str) -> NoReturn:
    """End as on any wrong option: a line on standard error, exit status 2."""
    print(f"train_gpt.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def check(settings: Settings) -> None:
    """Refuse what would only fail later, in the middle of a run."""
    sizes = ("depth", "width", "heads", "streams", "steps", "batch", "seq", "megabytes",
             "validation_windows", "sample_tokens", "devices")  # fmt: skip
    for name in sizes:
        if getattr(settings, name) < 1:
            option = name.replace("_", "-")
            fail(f"--{option}: expected at least 1, got {getattr(settings, name)}")
    most = 4 if "lite" in settings.connections else 16
    if settings.streams > most:
        fail(f"--streams: expected 1 to {most}, got {settings.streams}")
    if not 0 <= settings.sinkhorn_iters <= 10_000:
        fail(f"--sinkhorn-iters: expected 0 to 10000, got {settings.sinkhorn_iters}")
    if settings.width % settings.heads:
        fail(
            f"--width: expected a multiple of --heads {settings.heads}, got {settings.width}; "
            "change one of the two"
        )
    if settings.batch % settings.devices:
        fail(
            f"--batch: expected a multiple of --devices {settings.devices}, got {settings.batch}; "
            "change one of the two"
        )
    if settings.devices > 1 and jax.config.jax_platforms in (None, "", "cpu"):
        # Simulated devices, where there are none; it has no say in how many GPUs there are.
        jax.config.update("jax_num_cpu_devices", settings.devices)
    if settings.devices > jax.device_count():
        fail(
            f"--devices: expected at most {jax.device_count()}, which there are, got "
            f"{settings.devices}; JAX_PLATFORMS=cpu simulates them"
        )
    if not 0 < settings.learning_rate < math.inf:
        fail(f"--learning-rate: expected a number above 0, got {settings.learning_rate}")
    if settings.checkpoint_every < 0:
        fail(f"--checkpoint-every: expected at least 0, got {settings.checkpoint_every}")
    if not settings.minutes > 0:
        fail(f"--minutes: expected a number above 0, got {settings.minutes}")
    if settings.minutes < math.inf and not settings.checkpoint_every:
        fail("--minutes: expected --checkpoint-every too, since a run ends at a checkpoint")
    if settings.attention == "cudnn" and settings.dtype != "bfloat16":
        fail(f"--attention: cudnn takes --dtype bfloat16, got {settings.dtype}")
    if settings.attention == "cudnn" and jax.default_backend() != "gpu":
        fail(f"--attention: cudnn needs a GPU, got {jax.default_backend()}; xla runs anywhere")
    for name, values in (("connections", CONNECTIONS), ("seeds", "numbers")):
        given = getattr(settings, name)
        if not given or len(set(given)) < len(given):
            got = " ".join(map(str, given)) or "none"
            some = ", ".join(values) if isinstance(values, dict) else values
            fail(f"--{name}: expected some of {some}, each once, got {got}")
    if settings.out.exists() and not settings.out.is_dir():
        fail(f"--out: expected a folder, got the file {settings.out}")
    try:  # a call of the smallest size finds missing kernels before the first model is trained
        params = mhc.init_params(jax.random.key(0), streams=1, hidden=1)
        mhc.pre(jnp.zeros((1, 1, 1), jnp.float32), params, implementation=settings.implementation)
    except (RuntimeError, ValueError) as error:
        fail(str(error))
