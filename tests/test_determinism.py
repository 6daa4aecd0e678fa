"""The same bits in every run, with any number of threads, and whatever the other tokens are."""

import functools
import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS, OPS, Case, compiled, make_cotangents, make_operands

from jax_mhc import presets

# Several chunks and groups of tokens, the last of them not full.
CASE = Case((300,), 4, 33, 3.0)

# The ops of one call, and a model whose ops hand on cotangents.
TESTED = (*KERNELS, "two_sublayers")


def bits(op, dtype):
    """A digest of all outputs and gradients of an op."""
    arrays = make_operands(op, CASE, dtype), make_cotangents(op, CASE, dtype)
    results = compiled(op, presets.PAPER, "fused", *arrays)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(results):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@functools.cache
def bits_with_threads(num_threads):
    """Digests by op, and the size of XLA's pool, of a process with that many threads."""
    # XLA sizes its pool by NPROC where it is set.
    environment = {**os.environ, "NPROC": str(num_threads)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
    )
    size, *digests = done.stdout.split()
    return int(size), dict(zip(TESTED, digests, strict=True))


@pytest.mark.cpu("a GPU has no threads to choose the number of")
@pytest.mark.parametrize("op", TESTED)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_same_bits_with_any_number_of_threads(op, num_threads):
    size, digests = bits_with_threads(num_threads)
    assert size == num_threads
    assert digests[op] == bits(op, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", TESTED)
def test_same_bits_in_every_run(op, dtype):
    assert len({bits(op, jnp.dtype(dtype)) for _ in range(5)}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", TESTED)
def test_a_token_does_not_depend_on_the_others(op, dtype):
    """Forward, and backward for all that a token has of its own."""
    operands = make_operands(op, CASE, jnp.dtype(dtype))
    cotangents = make_cotangents(op, CASE, jnp.dtype(dtype))

    def results(some):
        part = {
            name: jax.tree.map(lambda leaf: leaf[some], value) if name in batched else value
            for name, value in operands.items()
        }
        some_cotangents = jax.tree.map(lambda leaf: leaf[some], cotangents)
        outputs, gradients = compiled(op, presets.PAPER, "fused", part, some_cotangents)
        return outputs, {name: gradients[name] for name in batched}

    batched = OPS[op].batched
    everything = results(slice(None))
    for some in (slice(17, 18), slice(29, 34), slice(100, 164)):
        expected = jax.tree.map(lambda leaf, some=some: leaf[some], everything)
        jax.tree.map(np.testing.assert_array_equal, results(some), expected)


def main():
    """Prints the number of threads of XLA's pool, and the digests."""
    digests = [bits(op, np.float32) for op in TESTED]
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    print(sum(name.startswith("tf_XLAEigen") for name in names), *digests)


if __name__ == "__main__":
    main()
