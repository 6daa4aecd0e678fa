"""Batches of sublayers with parameters of their own: kernels one after the other, or plain JAX.

What `primitive._is_small` decides by. Compares, for elements of several sizes under `jax.vmap`,
the kernels for every element in turn (implementation="fused"), the calls in plain JAX for all at
once (None, whatever the size), and plain JAX with JAX's own derivative ("reference"); after
checking that all agree. Writes benches/results/<machine>/<date>-batches.

    python -m benches batches [--tiny]
"""

import argparse
import datetime
import itertools
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np

import jax_mhc as mhc
from jax_mhc._call import dispatch, primitive

RESULTS = Path(__file__).parent / "results"
IMPLEMENTATIONS = {"kernels": "fused", "calls in plain JAX": None, "plain JAX": "reference"}
HIDDEN, TOKENS = (64, 512, 2048), (1, 8, 32, 128, 512, 2048)
# Values of the streams of all elements, and the largest of their products.
TOTAL, MOST, REPEATS = 1 << 23, 1 << 25, 9


def passes(implementation):
    """The forward pass, and all gradients of a loss."""
    batch = jax.vmap(lambda x, p: mhc.mhc_residual(jnp.tanh, x, p, implementation=implementation))

    def loss(x, params):
        return jnp.sum(jnp.square(batch(x, params).astype(jnp.float32)))

    return {"forward": batch, "gradients": jax.grad(loss, argnums=(0, 1))}


def measure(hidden, tokens, num, dtype, repeats):
    """Median microseconds by pass and implementation."""
    keys = jax.random.split(jax.random.key(0), num)
    params = jax.vmap(lambda key: mhc.init_params(key, streams=4, hidden=hidden))(keys)
    x = jax.random.normal(jax.random.key(1), (num, tokens, 4, hidden)).astype(dtype)
    times, results = {}, {}
    for label, implementation in IMPLEMENTATIONS.items():
        for name, run in passes(implementation).items():
            run = jax.jit(run)
            results.setdefault(name, {})[label] = jax.block_until_ready(run(x, params))

            def timed(run=run):
                jax.block_until_ready(run(x, params))

            times.setdefault(name, {})[label] = common.median_us(timed, repeats)
    for of_all in results.values():
        expected = jax.tree.leaves(of_all.pop("plain JAX"))
        for leaves in map(jax.tree.leaves, of_all.values()):
            for got, wanted in zip(leaves, expected, strict=True):
                wanted = np.asarray(wanted, np.float64)
                if np.abs(wanted).max() > 0:
                    assert common.relative_error(got, wanted) < 2e-2
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="one small size, and no record")
    tiny = parser.parse_args().tiny
    primitive._is_small = lambda *_: True
    rows = []
    sizes = [(64, 4)] if tiny else itertools.product(HIDDEN, TOKENS)
    for dtype, (hidden, tokens) in itertools.product(("float32", "bfloat16"), sizes):
        num = 2 if tiny else max(4, min(256, TOTAL // (tokens * 4 * hidden)))
        if num * tokens * 4 * hidden > MOST:
            continue
        times = measure(hidden, tokens, num, dtype, 1 if tiny else REPEATS)
        rows.append({"dtype": dtype, "C": hidden, "tokens": tokens, "elements": num, "us": times})
        print(rows[-1], flush=True)
    platform = dispatch.default_platform()
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": common.commit(),
        **common.versions(),
        "rows": rows,
    }
    if not tiny:
        folder = RESULTS / ("cpu" if platform == "cpu" else common.gpu_folder(record))
        common.write(record, table(record), folder, "-batches")


def table(record):
    """The record as Markdown."""
    lines = [
        f"# Batches of sublayers with parameters of their own, {record['gpu']}, {record['date']}",
        "",
        f"jax {record['jax']}, driver {record['driver']}, commit {record['commit']}; n = 4; wall "
        "time in us: kernels one after the other, the calls in plain JAX, plain JAX",
        "",
        "| dtype | C | tokens | elements | forward | gradients |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        figures = [
            ", ".join(f"{us:.0f}" for us in row["us"][name].values())
            for name in ("forward", "gradients")
        ]
        cells = (row["dtype"], row["C"], row["tokens"], row["elements"], *figures)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
