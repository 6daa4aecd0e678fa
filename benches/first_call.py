"""Prints what the first fused call of this process costs, as JSON; benches/gpu.py runs it.

Each stage in milliseconds: lower (tracing; for the first fused op also loading and registering
the library), compile (XLA's), first (the first run, in which the kernels are loaded) and again (the
next run). `x_plus_1` is what any program costs, with the backend running already; `next_shape` is
the same op with the library loaded.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp


def milliseconds(run):
    start = time.perf_counter()
    result = run()
    return result, (time.perf_counter() - start) * 1e3


def stages(function, *args):
    lowered, lower = milliseconds(lambda: jax.jit(function).lower(*args))
    program, compilation = milliseconds(lowered.compile)
    _, first = milliseconds(lambda: jax.block_until_ready(program(*args)))
    _, again = milliseconds(lambda: jax.block_until_ready(program(*args)))
    return {"lower": lower, "compile": compilation, "first": first, "again": again}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("platform", help="JAX's name of it, such as cuda or cpu")
jax.config.update("jax_platforms", parser.parse_args().platform)
x = jnp.ones((512, 4, 4096), jnp.bfloat16)
jax.block_until_ready(x + x)
costs = {"x_plus_1": stages(lambda x: x + 1, x)}
mhc, costs["import"] = milliseconds(lambda: __import__("jax_mhc"))
params = mhc.init_params(jax.random.key(0), streams=4, hidden=4096)


def pre(x, params):
    return mhc.pre(x, params, implementation="fused")[0]


costs["pre"] = stages(pre, x, params)
costs["next_shape"] = stages(pre, x[:256], params)
print(json.dumps(costs))
