"""Trains a deep MLP and logs what the mixing does: printed, to TensorBoard or Weights & Biases.

    python examples/logging_training.py                           # prints
    python examples/logging_training.py --to tensorboard          # needs tensorboardX
    python examples/logging_training.py --to wandb                # needs wandb

The step returns `diagnostics.summary` of a sample of the tokens, with the loss; `logger` has the
two lines of each library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

import jax_mhc as mhc
from jax_mhc import diagnostics


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line."""

    to: Literal["stdout", "tensorboard", "wandb"] = "stdout"
    """Where the numbers go."""
    steps: int = 200
    every: int = 20
    """Steps from one log to the next."""
    depth: int = 16
    hidden: int = 64
    out: Path = Path("demo/log")
    """Folder of the files that TensorBoard and Weights & Biases read."""


def logger(options: Options) -> Callable[[dict[str, float], int], None]:
    """A function of numbers by name and the step."""
    try:
        if options.to == "tensorboard":
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(str(options.out))
            return lambda numbers, step: [
                writer.add_scalar(*item, step) for item in numbers.items()
            ]
        if options.to == "wandb":
            import wandb

            options.out.mkdir(parents=True, exist_ok=True)
            return wandb.init(project="mhc", dir=str(options.out)).log
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"--to {options.to}: expected {error.name}, got none; pip install it."
        ) from None
    return lambda numbers, step: print(
        f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    )


def main(options: Options) -> None:
    @jax.vmap
    def init(key):
        w = jax.random.normal(key, (options.hidden, options.hidden)) / options.hidden**0.5
        return w, mhc.init_params(key, streams=4, hidden=options.hidden)

    def loss(weights, u, target):
        layers, connections = weights
        x = mhc.expand(u, streams=4)
        x, h_res = mhc.stack_with_samples(
            [lambda v, w: jnp.tanh(v @ w)], x, [connections], xs=layers, sample_tokens=64
        )
        return jnp.mean(jnp.square(mhc.reduce(x) - target)), h_res

    @jax.jit
    def train_step(weights, u, target):
        (value, h_res), grads = jax.value_and_grad(loss, has_aux=True)(weights, u, target)
        # The signs of the gradients alone, as the first step of Adam takes them.
        weights = jax.tree.map(lambda w, g: w - 0.003 * jnp.sign(g), weights, grads)
        return weights, {"loss": value} | diagnostics.summary(h_res)

    weights = init(jax.random.split(jax.random.key(0), options.depth))
    u = jax.random.normal(jax.random.key(1), (256, options.hidden))
    target = jnp.sin(2 * jnp.roll(u, 1, axis=-1))
    log = logger(options)
    for step in range(options.steps):
        weights, numbers = train_step(weights, u, target)
        if step % options.every == 0:
            log({name: float(value) for name, value in numbers.items()}, step)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
