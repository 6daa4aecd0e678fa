"""One of several processes that train together, for `test_processes.py`, which reads what it says.

    python worker.py '{"num_processes": 2, "process_id": 0, "coordinator": "localhost:1234", ...}'

It prints one line of JSON: the losses, a digest of the optimised program without what names it, and
what JAX's persistent compilation cache did.
"""

import collections
import dataclasses
import hashlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_mhc
from jax_mhc import presets


@dataclasses.dataclass(frozen=True)
class Job:
    """Task of a worker. devices: in all."""

    mode: str = "auto"
    devices: int = 2
    num_processes: int = 1
    process_id: int = 0
    coordinator: str = ""
    steps: int = 10
    cache: str = ""
    post_scale: float = 2.0


BLOCKS, STREAMS, HIDDEN, BATCH, LENGTH = 2, 4, 32, 8, 8


def parameters():
    """The same in every process."""
    rng = np.random.default_rng(0)
    keys = jax.random.split(jax.random.key(0), BLOCKS)
    make = jax.vmap(lambda key: jax_mhc.init_params(key, streams=STREAMS, hidden=HIDDEN))
    connections = jax.tree.map(np.asarray, [make(keys), make(keys)])
    weights = rng.normal(size=(2, BLOCKS, HIDDEN, HIDDEN)).astype(np.float32) / HIDDEN**0.5
    return {"connections": connections, "weights": list(weights)}


def data():
    rng = np.random.default_rng(1)
    return rng.normal(size=(BATCH, LENGTH, HIDDEN)).astype(np.float32)


def loss(config, params, u):
    """Of a stack that is to turn its input upside down."""
    x = jax_mhc.stack(
        [lambda v, s: jnp.tanh(v @ s[0]), lambda v, s: jnp.tanh(v @ s[1])],
        jax_mhc.expand(u, streams=STREAMS),
        params["connections"],
        xs=params["weights"],
        config=config,
        implementation="fused",
    )
    return jnp.mean(jnp.square(jax_mhc.reduce(x) + u))


def train(job: Job):
    """Data parallel over all devices."""
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[job.mode]
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))

    def place(array, spec):
        array = np.asarray(array)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    config = dataclasses.replace(presets.PAPER, post_scale=job.post_scale)

    @jax.jit
    def step(params, u):
        value, gradients = jax.value_and_grad(lambda p: loss(config, p, u))(params)
        return jax.tree.map(lambda p, d: p - 0.1 * d, params, gradients), value

    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda leaf: place(leaf, P()), parameters())
        u = place(data(), P("data"))
        # Counted from here on: what made the arrays was compiled, too.
        events = collections.Counter()
        monitoring.register_event_listener(lambda event, **_: events.update([event]))
        compiled = step.lower(params, u).compile()
        cache = {
            name: events[f"/jax/compilation_cache/cache_{name}"] for name in ("hits", "misses")
        }
        losses = []
        for _ in range(job.steps):
            params, value = compiled(params, u)
            losses.append(float(value.addressable_data(0)))
    text = compiled.as_text()
    return {
        "losses": losses,
        "calls": len(re.findall(r'custom_call_target="jax_mhc_', text)),
        # Stack frames are numbered as Python came across them.
        "program": hashlib.sha256(re.sub(r"stack_frame_id=\d+", "", text).encode()).hexdigest(),
        "cache": cache,
    }


def main(job: Job):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", job.devices // job.num_processes)
    if job.cache:
        jax.config.update("jax_compilation_cache_dir", job.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # docs/sharding.md: what custom_partitioning leaves in the key differs between processes.
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    if job.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(job.coordinator, job.num_processes, job.process_id)
    print(json.dumps(train(job)), flush=True)


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
