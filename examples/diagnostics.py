"""Trains a deep MLP with HC and with mHC, watches their gains, and draws what the mixing does.

    python examples/diagnostics.py                 # writes diagnostics.png to demo/

The step takes h_res of a sample of the tokens, and computes and watches their gains. Those of
unconstrained hyper-connections (HC) leave the band; it prints the first warning, and how many there
were.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from matplotlib.figure import Figure
from PIL import Image

import jax_mhc as mhc
from jax_mhc import diagnostics

CONFIGS = {"mHC": mhc.MHCConfig(), "HC": mhc.MHCConfig(constraint="none")}
EVERY = 5
"""How many steps there are from a point of the curves to the next."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line."""

    depth: int = 32
    """Sublayers."""
    hidden: int = 32
    steps: int = 200
    learning_rate: float = 0.003
    seed: int = 0
    out: Path = Path("demo")
    """Folder for the picture."""


def init(config: mhc.MHCConfig, options: Options) -> dict:
    """The parameters of all sublayers, stacked."""

    def of_one(key):
        w = jax.random.normal(key, (options.hidden, options.hidden)) / options.hidden**0.5
        connection = mhc.init_params(key, streams=4, hidden=options.hidden, config=config)
        return {"w": w, "connection": connection}

    return jax.vmap(of_one)(jax.random.split(jax.random.key(options.seed), options.depth))


def model(params: dict, u: jax.Array, config: mhc.MHCConfig) -> tuple[jax.Array, jax.Array]:
    """The output, and h_res of 64 tokens of each sublayer, `[depth, 64, 4, 4]`."""

    def sublayer(x, own):
        v, ctx = mhc.pre(x, own["connection"], config=config)
        v = v * jax.lax.rsqrt(jnp.mean(v * v, -1, keepdims=True) + 1e-6)
        x = mhc.post(jnp.tanh(v @ own["w"]), ctx)
        return x, diagnostics.sample_tokens(ctx.h_res, 64)

    x, h_res = jax.lax.scan(sublayer, mhc.expand(u, streams=4).array(), params)
    return mhc.reduce(x), h_res


def train(label: str, options: Options) -> tuple[diagnostics.Gain, jax.Array]:
    """The gains of the whole stack over the steps, `[..., 64]`, and h_res at the end."""
    config, params = CONFIGS[label], init(CONFIGS[label], options)
    u = jax.random.normal(jax.random.key(options.seed + 1), (256, options.hidden))
    target = jnp.sin(3 * jnp.roll(u, 1, -1)) * u

    def loss(params):
        out, h_res = model(params, u, config)
        return jnp.mean(jnp.square(out - target)), h_res

    @jax.jit
    def step(params, at):
        (_, h_res), grads = jax.value_and_grad(loss, has_aux=True)(params)
        gain = diagnostics.amax_gain(diagnostics.composite(h_res)[-1])
        name = f"composite gain of {label}"
        diagnostics.watch_gain(gain, step=at, name=name, callback=found.append)
        # The signs of the gradients alone, as the first step of Adam takes them.
        rate = options.learning_rate
        return jax.tree.map(lambda p, grad: p - rate * jnp.sign(grad), params, grads), gain, h_res

    found, gains = [], []
    for at in range(options.steps):
        params, gain, h_res = step(params, at)
        if at % EVERY == 0:
            gains.append(gain)
    jax.effects_barrier()  # for warnings that are on their way
    print(f"{label}: {len(found)} warnings in {options.steps} steps.", *map(str, found[:1]))
    return jax.tree.map(lambda *of_steps: jnp.stack(of_steps), *gains), h_res


def main(options: Options) -> None:
    results = {label: train(label, options) for label in CONFIGS}
    over_steps = {label: gains for label, (gains, _) in results.items()}
    over_depth = {
        label: diagnostics.amax_gain(diagnostics.composite(h_res))
        for label, (_, h_res) in results.items()
    }
    figure = Figure(figsize=(10, 10), layout="constrained")
    above, middle, below = figure.subfigures(3, 1)
    left, right = above.subplots(1, 2, sharey=True)
    diagnostics.plot_gain(over_depth, axes=left)
    diagnostics.plot_gain(over_steps, x=range(0, options.steps, EVERY), axes=right)
    left.set_title("Composite gain after the training", fontsize=10)
    right.set_title("Composite gain of all sublayers", fontsize=10)
    axes = [*below.subplots(1, 3), *middle.subplots(1, 3)]
    diagnostics.plot_mixing(results["mHC"][1], axes=axes)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "diagnostics.png"
    figure.savefig(path, dpi=100)
    # 256 colours take a third of the bytes.
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
