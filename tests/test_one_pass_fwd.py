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

#: Streams and channels, constraint, and the size with its dtype and the cluster of the kernels that
#: take them on an H200; kernels/src/gpu/tests/one_pass_fwd.rs plans the same.
WIDTHS = [
    (4, 512, "none", "w256_bf16", 2),
    (4, 960, "birkhoff", "w320_bf16", 3),
    (4, 768, "birkhoff", "w384_bf16", 2),
    (4, 1000, "birkhoff", "w256_bf16", 4),
    (4, 4104, "none", "w320_bf16", 13),
    (4, 520, "permutations", "w256k32_bf16", 3),
    (4, 1032, "identity", "w384k8_bf16", 3),
    (2, 1032, "birkhoff", "n2w512_bf16", 3),
    (4, 1000, "birkhoff", "w256_f16", 4),
    (4, 1000, "birkhoff", "w256_f32", 4),
    (4, 520, "identity", "w256k8_f32", 3),
    (4, 1600, "birkhoff", "w448_bf16", 4),
    (4, 2304, "birkhoff", "w320_bf16", 8),
    (4, 4608, "birkhoff", "w320_bf16", 15),
    (4, 8128, "birkhoff", "w512_bf16", 16),
    (4, 8192, "none", "w512_bf16", 16),
    (4, 2496, "identity", "w512k8_bf16", 5),
    (4, 3520, "identity", "w512k8_bf16", 7),
    (4, 4608, "identity", "w512k8_bf16", 9),
    (4, 5120, "identity", "w384k8_bf16", 14),
    (4, 7168, "identity", "w512k8_bf16", 14),
    (4, 704, "permutations", "w256k32_bf16", 3),
    (4, 1408, "permutations", "w256k32_bf16", 6),
    (4, 2560, "permutations", "w256k32_bf16", 10),
    (4, 2816, "permutations", "w256k32_bf16", 11),
    (4, 4544, "permutations", "w384k32_bf16", 12),
    (4, 4928, "permutations", "w384k32_bf16", 13),
    (4, 6144, "permutations", "w384k32_bf16", 16),
    (4, 6208, "permutations", "w512k32_bf16", 13),
    (4, 7232, "permutations", "w512k32_bf16", 15),
    (4, 8192, "permutations", "w512k32_bf16", 16),
    (2, 576, "none", "n2w512_bf16", 2),
    (2, 1472, "birkhoff", "n2w512_bf16", 3),
    (2, 2048, "birkhoff", "n2w1024_bf16", 2),
    (2, 6080, "none", "n2w1024_bf16", 6),
    (2, 16384, "birkhoff", "n2w1024_bf16", 16),
    (4, 512, "birkhoff", "w256_f16", 2),
    (4, 2624, "none", "w384_f16", 7),
    (4, 4096, "birkhoff", "w256_f16", 16),
    (4, 7168, "none", "w512_f16", 14),
    (4, 8128, "birkhoff", "w512_f16", 16),
    (4, 1088, "identity", "w512k8_f16", 3),
    (4, 512, "birkhoff", "w256_f32", 2),
    (4, 1184, "none", "w256_f32", 5),
    (4, 4096, "birkhoff", "w256_f32", 16),
    (4, 864, "identity", "w256k8_f32", 4),
    (4, 3456, "identity", "w256k8_f32", 14),
]
KINDS = [(op, norm) for op in ("pre", "post_pre") for norm in (False, True)]
TOKENS = 37
#: Errors of streams and of coefficients, in units of the largest. Those of the seam, which rounds
#: the new streams before it takes them, are compared with those of streams that are not rounded.
LIMITS = {"pre": (2**-8, 3e-5), "post_pre": (2**-7, 2e-2)}
#: The same for float16 streams, which round by an eighth of that, and for float32 streams.
HALF_LIMITS = {"pre": (2**-11, 1e-5), "post_pre": (2**-10, 2.5e-3)}
FLOAT_LIMIT = 1e-5
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}


def cases():
    """The op, the case, and the name and cluster of its kernel."""
    for streams, hidden, constraint, size, cluster in WIDTHS:
        for op, norm in KINDS:
            config = variant(constraint=constraint)
            case = Case((TOKENS,), streams, hidden, 3.0, config, norm=norm)
            yield op, case, f"mhc_{op}{'_norm' * norm}_fwd_one_pass_{size}", cluster


def operands_of(op, case, kernel):
    """Operands with streams that any matrix has mixed, whatever the constraint of the op is."""
    dtype = DTYPES[kernel.rsplit("_", 1)[1]]
    mixed = make_operands(op, dataclasses.replace(case, config=variant()), dtype)
    return mixed | {"params": make_operands(op, case, dtype)["params"]}


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
    operands = operands_of(op, case, kernel)
    kernels = run(op, case, "fused")
    # Memory that XLA hands out next is full of NaN.
    jax.block_until_ready([jnp.full((1 << size,), jnp.nan, jnp.float32) for size in range(8, 26)])
    few = jax.tree.map(np.asarray, kernels(operands))
    expected = in_float64(run(op, case, "reference"), operands)
    leaves = zip(jax.tree.leaves_with_path(few), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in leaves:
        limits = (HALF_LIMITS if kernel.endswith("_f16") else LIMITS)[op]
        limit = FLOAT_LIMIT if kernel.endswith("_f32") else limits[leaf.dtype == np.float32]
        assert_close(leaf, wanted, limit, leaf_name(path))

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
    for index, (op, case, kernel, _) in enumerate(cases()):
        operands = take(op, operands_of(op, case, kernel), np.array([0]))
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
