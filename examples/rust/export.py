"""A step of training, exported for a program that has no Python: see README.md beside this file.

Writes a folder with the program, its arguments and the results that JAX computes here.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxlib.mlir.dialects import stablehlo

import jax_mhc as mhc

STREAMS, HIDDEN, DEPTH, TOKENS = 4, 64, 3, 256


def loss(params, u, target):
    """A residual network of layers without weights, so that all products are the connections'."""
    x = mhc.expand(u, streams=STREAMS)
    for connection in params:
        x = mhc.mhc_residual(jnp.tanh, x, connection, implementation="fused")
    return jnp.mean((mhc.reduce(x) - target) ** 2)


step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def make_arguments():
    keys = jax.random.split(jax.random.key(0), DEPTH + 2)
    params = [make_params(key) for key in keys[:DEPTH]]
    u, target = (jax.random.normal(key, (TOKENS, HIDDEN)) for key in keys[DEPTH:])
    return params, u, target


def make_params(key):
    """Parameters as after some training: their initial phi is zero, and so would be gradients."""
    params = mhc.init_params(key, streams=STREAMS, hidden=HIDDEN)
    return dataclasses.replace(
        params, phi=0.1 * jax.random.normal(key, params.phi.shape), alpha=params.alpha + 1
    )


def list_values(role, values):
    """The names, as a user of Python would write them, and the arrays of a pytree."""
    named, _ = jax.tree.flatten_with_path(values)
    return [(role + jax.tree_util.keystr(path), np.asarray(value)) for path, value in named]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=["cpu", "cuda"], required=True)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()

    arguments = make_arguments()
    handlers = mhc.info.collect()["library"]["handlers"][options.platform]
    exported = export.export(
        step,
        platforms=[options.platform],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(name) for name in handlers],
    )(*arguments)
    # XLA is given the arguments that the program reads.
    every = list_values("arguments", arguments)
    read = [every[index] for index in exported.module_kept_var_idx]
    results = list_values("results", step(*arguments))

    options.folder.mkdir(parents=True, exist_ok=True)
    # Every plugin reads the oldest version that this jaxlib writes; JAX's own choice may be newer.
    program = stablehlo.serialize_portable_artifact_str(
        exported.mlir_module(), stablehlo.get_minimum_version()
    )
    (options.folder / "program.mlirbc").write_bytes(program)
    index = {"platform": options.platform} | {
        role: [{"name": name, "dims": value.shape} for name, value in listed]
        for role, listed in {"arguments": read, "results": results}.items()
    }
    (options.folder / "values.json").write_text(json.dumps(index, indent=1))
    numbers = [value.astype("<f4").tobytes() for _, value in read + results]
    (options.folder / "values.bin").write_bytes(b"".join(numbers))


main()
