"""Forward kernels that read the streams once, in every size and every cluster of blocks."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, Case, assert_close, in_float64, leaf_name, make_operands, variant

pytestmark = pytest.mark.gpu

#: Channels, constraint, and the size and cluster of the kernels that take them on an H200;
#: kernels/src/gpu/tests/one_pass_fwd.rs plans the same.
WIDTHS = [
    (512, "none", "w256", 2),
    (960, "birkhoff", "w320", 3),
    (768, "birkhoff", "w384", 2),
    (1600, "birkhoff", "w448", 4),
    (2304, "birkhoff", "w320", 8),
    (4608, "birkhoff", "w320", 15),
    (8128, "birkhoff", "w512", 16),
    (8192, "none", "w512", 16),
    (2496, "identity", "w512k8", 5),
    (3520, "identity", "w512k8", 7),
    (4608, "identity", "w512k8", 9),
    (5120, "identity", "w384k8", 14),
    (7168, "identity", "w512k8", 14),
    (704, "permutations", "w256k32", 3),
    (1408, "permutations", "w256k32", 6),
    (2560, "permutations", "w256k32", 10),
    (2816, "permutations", "w256k32", 11),
    (4544, "permutations", "w384k32", 12),
    (4928, "permutations", "w384k32", 13),
    (6144, "permutations", "w384k32", 16),
]
KINDS = [(op, norm) for op in ("pre", "post_pre") for norm in (False, True)]
TOKENS = 37
#: Errors of streams and of coefficients, in units of the largest. Those of the seam, which rounds
#: the new streams before it takes them, are compared with those of streams that are not rounded.
LIMITS = {"pre": (2**-8, 3e-5), "post_pre": (2**-7, 2e-2)}


def cases():
    """The op, the case, and the name and cluster of its kernel."""
    for hidden, constraint, size, cluster in WIDTHS:
        for op, norm in KINDS:
            config = variant(constraint=constraint)
            case = Case((TOKENS,), 4, hidden, 3.0, config, norm=norm)
            yield op, case, f"mhc_{op}{'_norm' * norm}_fwd_one_pass_{size}_bf16", cluster


def operands_of(op, case):
    """Operands with streams that any matrix has mixed, whatever the constraint of the op is."""
    mixed = make_operands(op, dataclasses.replace(case, config=variant()), jnp.bfloat16)
    return mixed | {"params": make_operands(op, case, jnp.bfloat16)["params"]}


def take(op, operands, tokens):
    """Operands of some tokens, again and again."""
    return {
        name: jax.tree.map(lambda leaf: leaf[tokens], value) if name in OPS[op].batched else value
        for name, value in operands.items()
    }


def run(op, case, implementation):
    return jax.jit(
        functools.partial(OPS[op].run, config=case.config, implementation=implementation)
    )


@pytest.mark.parametrize("op, case, kernel, cluster", list(cases()))
def test_values_that_do_not_depend_on_other_tokens(op, case, kernel, cluster):
    """Against float64; then alone, and many times in a larger batch with a token that is NaN."""
    operands = operands_of(op, case)
    kernels = run(op, case, "fused")
    # Memory that XLA hands out next is full of NaN.
    jax.block_until_ready([jnp.full((1 << size,), jnp.nan, jnp.float32) for size in range(8, 26)])
    few = jax.tree.map(np.asarray, kernels(operands))
    expected = in_float64(run(op, case, "reference"), operands)
    leaves = zip(jax.tree.leaves_with_path(few), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in leaves:
        assert_close(leaf, wanted, LIMITS[op][leaf.dtype == np.float32], leaf_name(path))

    def check(tokens, others=None):
        batch = take(op, operands, tokens)
        kept = np.ones(len(tokens), bool)
        if others is not None:
            name = "x" if op == "pre" else "y"
            batch[name] = batch[name].at[others].set(jnp.nan)
            kept[others] = False
        for actual, wanted in zip(
            jax.tree.leaves(kernels(batch)), jax.tree.leaves(few), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(actual)[kept], wanted[tokens[kept]])

    check(np.array([5]))
    check(np.arange(2053) * 7 % TOKENS)
    check(np.arange(2053) * 7 % TOKENS, np.array([3, 100, 2052]))


def print_kernels():
    """Runs every case with one token; the log tells its kernels."""
    for index, (op, case, *_) in enumerate(cases()):
        operands = take(op, operands_of(op, case), np.array([0]))
        print(f"case={index}", file=sys.stderr, flush=True)
        jax.block_until_ready(run(op, case, "fused")(operands))


def test_kernels_that_run():
    environment = {**os.environ, "JAX_MHC_LOG": "trace"}
    ran = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    parts = re.split(r"^case=\d+$", ran.stderr, flags=re.MULTILINE)[1:]
    found = [re.findall(r'launch\b.*?kernel="(\w+)".*?cluster=(\d+)', part) for part in parts]
    assert found == [[(kernel, str(cluster))] for _, _, kernel, cluster in cases()]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print_kernels()
