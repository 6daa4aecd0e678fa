"""The backward pass of post_pre on an NVIDIA GPU, in every size of its kernels and of clusters."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PERMUTED, Case, compiled, variant
from test_cuda import arrays, check, check_beside_plain_jax, digest, poison, run

from jax_mhc.presets import PAPER

pytestmark = pytest.mark.gpu

IDENTITY = variant(constraint="identity", post_eps=0.125)
NONE = variant(constraint="none")

# Channels of a block and blocks of a cluster for widths, which reach all sizes of both; the last
# block of many has less channels than the others.
GEOMETRIES = {
    320: (256, 2), 448: (256, 2), 640: (256, 3), 1024: (256, 4), 1280: (256, 5),
    1472: (256, 6), 1792: (256, 7), 2048: (256, 8), 2304: (256, 9), 2560: (320, 8),
    2752: (256, 11), 3072: (256, 12), 3264: (256, 13), 3584: (256, 14), 3776: (256, 15),
    4096: (256, 16), 4160: (320, 13), 5120: (320, 16), 5952: (384, 16), 6144: (384, 16),
    7168: (448, 16), 7232: (512, 15), 8192: (512, 16),
    # A last line that is not whole, alone or behind whole ones.
    264: (256, 2), 1000: (256, 4), 2056: (256, 9), 4104: (320, 13), 7208: (512, 15),
}  # fmt: skip

# Of two streams: all sizes of clusters of blocks with 512 channels.
TWO_STREAMS = (
    576, 1472, 2048, 2304, 2752, 3136, 4096, 4160, 5120, 5568, 5952, 6208, 7168, 7232, 8192,
    520, 1000, 4104,
)  # fmt: skip

# Of four float32 streams: all sizes of clusters of blocks with 256 channels.
FLOAT32 = (
    288, 544, 1024, 1280, 1504, 1792, 2048, 2304, 2560, 2784, 3072, 3296, 3584, 3808, 4096,
    264, 1000, 2056,
)  # fmt: skip
# Of four float16 streams: every size of blocks, which are those of bfloat16.
HALF_WIDTHS = (448, 1000, 1024, 2560, 2752, 4096, 4104, 4160, 5952, 7168, 7232, 8192)

# Widths with fewer and with more columns of phi; of the latter the widest blocks.
OTHER_WIDTHS = (64, 448, 520, 640, 1000, 1280, 2560, 3072, 4096, 4104, 5952, 6144)
WIDEST_PERMUTED = {6152: 13, 6208: 13, 6720: 14, 7232: 15, 8192: 16}


@pytest.mark.parametrize("hidden", GEOMETRIES)
@pytest.mark.parametrize("tokens", [1, 37])
def test_clusters_of_every_size(hidden, tokens):
    """Whatever was in the memory of results and workspaces."""
    poison()
    check("post_pre", Case((tokens,), 4, hidden, 3.0), "bfloat16")


@pytest.mark.parametrize("hidden", TWO_STREAMS)
@pytest.mark.parametrize("tokens", [1, 37])
def test_clusters_of_two_streams(hidden, tokens):
    poison()
    check("post_pre", Case((tokens,), 2, hidden, 3.0), "bfloat16")


@pytest.mark.parametrize("hidden", HALF_WIDTHS)
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("config", [PAPER, NONE, IDENTITY])
def test_clusters_of_float16_streams(hidden, tokens, config):
    """Cotangents are deferred where there are 37 tokens; there is a norm where there is one."""
    poison()
    case = Case((tokens,), 4, hidden, 3.0, config, norm=tokens == 1)
    check("post_pre" if tokens == 1 else "two_sublayers", case, "float16")


@pytest.mark.parametrize("config", [PAPER, NONE, IDENTITY])
@pytest.mark.parametrize("tokens, hidden", [(205, 1024), (4099, 2560), (1021, 4096), (517, 7168)])
def test_float16_streams_err_no_more_than_plain_jax(tokens, hidden, config):
    case = Case((tokens,), 4, hidden, config=config)
    names = ("y", "ctx.x", "ctx.h_post", "ctx.h_res", "params.phi")
    check_beside_plain_jax("post_pre", case, "float16", names)


@pytest.mark.parametrize("hidden", [576, 1000, 2048, 4160, 8192])
@pytest.mark.parametrize("config", [PAPER, NONE, variant(sinkhorn_iters=1)])
@pytest.mark.parametrize("norm", [False, True])
def test_other_settings_of_two_streams(hidden, config, norm):
    poison()
    check("two_sublayers", Case((37,), 2, hidden, config=config, norm=norm), "bfloat16")


@pytest.mark.parametrize("hidden", FLOAT32)
@pytest.mark.parametrize("tokens", [1, 37])
def test_clusters_of_float32_streams(hidden, tokens):
    poison()
    check("post_pre", Case((tokens,), 4, hidden, 3.0), "float32")


@pytest.mark.parametrize("hidden", [544, 1000, 2048, 4096])
@pytest.mark.parametrize("config", [PAPER, NONE, IDENTITY, variant(sinkhorn_iters=1)])
@pytest.mark.parametrize("norm", [False, True])
def test_other_settings_of_float32_streams(hidden, config, norm):
    poison()
    check("two_sublayers", Case((37,), 4, hidden, config=config, norm=norm), "float32")


@pytest.mark.parametrize("config", [PAPER, IDENTITY])
@pytest.mark.parametrize("tokens, hidden", [(205, 1024), (4099, 2080), (1021, 4096)])
def test_float32_streams_err_no_more_than_plain_jax(tokens, hidden, config):
    names = ("y", "ctx.x", "ctx.h_post", "ctx.h_res", "params.phi")
    case = Case((tokens,), 4, hidden, config=config)
    check_beside_plain_jax("post_pre", case, "float32", names)


@pytest.mark.parametrize("hidden", [544, 1024, 4096])
def test_gradients_of_a_token_do_not_depend_on_the_tokens_behind_it(hidden):
    case = Case((1031,), 4, hidden, 3.0)
    operands, cotangents = arrays("post_pre", case, "float32")

    def gradients(tokens):
        first = {
            name: jax.tree.map(lambda leaf: leaf[:tokens], operands[name]) for name in ("y", "ctx")
        }
        own = jax.tree.map(lambda leaf: leaf[:tokens], cotangents)
        found = compiled("post_pre", case.config, "fused", operands | first, own)[1]
        return jax.tree.map(lambda leaf: leaf[:37], (found["y"], found["ctx"]))

    jax.tree.map(np.testing.assert_array_equal, gradients(37), gradients(1031))


@pytest.mark.parametrize("hidden", [448, 1000, 1280, 2304, 4160, 8192])
@pytest.mark.parametrize("config", [NONE, variant(sinkhorn_iters=1)])
def test_other_settings(hidden, config):
    poison()
    check("two_sublayers", Case((37,), 4, hidden, config=config), "bfloat16")


@pytest.mark.parametrize("hidden", [*OTHER_WIDTHS, 7232, 8192])
@pytest.mark.parametrize("op", ["post_pre", "two_sublayers"])
def test_without_mixing(hidden, op):
    poison()
    check(op, Case((37,), 4, hidden, config=IDENTITY), "bfloat16")


@pytest.mark.parametrize("hidden", [*OTHER_WIDTHS, *WIDEST_PERMUTED])
@pytest.mark.parametrize("op", ["post_pre", "two_sublayers"])
def test_means_of_permutations(hidden, op):
    poison()
    check(op, Case((37,), 4, hidden, 3.0, PERMUTED), "bfloat16")


@pytest.mark.parametrize("hidden", [64, 640, 1000, 2304, 5120, 7168, 8192])
def test_a_norm(hidden):
    poison()
    check("post_pre", Case((37,), 4, hidden, 3.0, norm=True), "bfloat16")


@pytest.mark.parametrize(
    "config, dtype", [(IDENTITY, "bfloat16"), (PERMUTED, "bfloat16"), (PAPER, "float16")]
)
def test_a_norm_scale_with_zeros(config, dtype):
    """Where the normalised input is zero, the input is summed up again, by other columns of m."""

    def with_zeros(operands):
        kept = np.arange(1280) % 5 > 0
        return operands | {"norm_scale": jnp.where(kept, operands["norm_scale"], 0)}

    check("post_pre", Case((37,), 4, 1280, config=config, norm=True), dtype, with_zeros)


MANY = [
    *[
        (Case((2053,), 4, hidden, 3.0), "bfloat16")
        for hidden in (640, 1000, 1280, 2560, 4104, 8192)
    ],
    *[(Case((4099,), 2, hidden, 3.0), "bfloat16") for hidden in (576, 1472, 2048, 4160, 8192)],
    *[(Case((2053,), 4, hidden, 3.0), "float16") for hidden in (1280, 2560, 8192)],
    *[(Case((2053,), 4, hidden, 3.0, IDENTITY), "float16") for hidden in (640, 4096, 5952)],
    *[(Case((2053,), 4, hidden, 3.0), "float32") for hidden in (544, 1280, 2048, 4096)],
    (Case((2053,), 4, 2048, 3.0, IDENTITY), "float32"),
    *[(Case((2053,), 4, hidden, 3.0, PERMUTED), "bfloat16") for hidden in (6208, 8192)],
]


@pytest.mark.parametrize("case, dtype", MANY, ids=str)
def test_many_tokens(case, dtype):
    """Tiles for all clusters, several times, and the same bits in every run."""
    check("post_pre", case, dtype)
    digests = set()
    for _ in range(5):
        poison()
        digests.add(digest(run("post_pre", case, dtype)))
    assert len(digests) == 1


@pytest.mark.parametrize(
    "hidden, config",
    [(1280, PAPER), (2560, PAPER), (4096, PAPER), (8192, PAPER), (2048, IDENTITY)],
)
def test_gradients_of_float16_tokens_do_not_depend_on_the_others(hidden, config):
    """Bit for bit, though another block may own the token then, in another place of its tile."""
    case = Case((2053,), 4, hidden, 3.0, config)
    operands, cotangents = arrays("post_pre", case, "float16")

    def gradients(tokens):
        own, of_own = jax.tree.map(
            lambda leaf: leaf[tokens],
            ({name: operands[name] for name in ("y", "ctx")}, cotangents),
        )
        found = compiled("post_pre", config, "fused", operands | own, of_own)[1]
        return found["y"], found["ctx"]

    everything = gradients(slice(None))
    for tokens in (slice(1000, 1001), slice(1003, 1040)):
        jax.tree.map(
            lambda part, whole, at=tokens: np.testing.assert_array_equal(part, whole[at]),
            gradients(tokens),
            everything,
        )


@pytest.mark.parametrize(
    "dtype, streams, hidden",
    [
        *[("bfloat16", 4, hidden) for hidden in (640, 1000, 2304, 4160, 8192)],
        *[("bfloat16", 2, hidden) for hidden in (576, 4160, 8192)],
        *[("float16", 4, hidden) for hidden in (640, 7168)],
        *[("float32", 4, hidden) for hidden in (544, 1000, 2048, 4096)],
    ],
)
def test_an_infinity_stays_with_the_tokens_of_its_four(dtype, streams, hidden):
    """Other tokens have the bits that they have without it; all others where none are mixed."""
    are_four = streams == 4 and dtype != "float32"
    case, near = Case((37,), streams, hidden, 3.0), 4 if are_four else 1
    operands, cotangents = arrays("post_pre", case, dtype)
    wild = operands | {"y": operands["y"].at[9, 5].set(jnp.inf)}

    def gradients(operands):
        found = compiled("post_pre", case.config, "fused", operands, cotangents)[1]
        return found["y"], found["ctx"]

    others = np.array([token for token in range(37) if token // near != 9 // near])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[others], b[others]),
        gradients(wild),
        gradients(operands),
    )


def run_all():
    """A call for each width, for their log."""
    jax.config.update("jax_enable_x64", True)
    for hidden in GEOMETRIES:
        run("post_pre", Case((37,), 4, hidden), "bfloat16")
    for hidden in TWO_STREAMS:
        run("post_pre", Case((37,), 2, hidden), "bfloat16")
    for config in (PAPER, IDENTITY):
        for hidden in FLOAT32:
            run("post_pre", Case((37,), 4, hidden, config=config), "float32")
    for hidden in HALF_WIDTHS:
        run("post_pre", Case((37,), 4, hidden), "float16")
    for hidden in WIDEST_PERMUTED:
        run("post_pre", Case((37,), 4, hidden, config=PERMUTED), "bfloat16")


def test_the_kernels_are_those_of_their_width():
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "JAX_MHC_LOG": "trace"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pattern = r'kernel="mhc_post_pre_bwd_one_pass_(\w+)".*cluster=(\d+)'
    found = [(size, int(blocks)) for size, blocks in re.findall(pattern, done.stderr)]
    expected = [(f"w{channels}_bf16", blocks) for channels, blocks in GEOMETRIES.values()]
    expected += [("n2w512_bf16", -(-hidden // 512)) for hidden in TWO_STREAMS]
    for size in ("w256_f32", "w256k8_f32"):
        expected += [(size, -(-hidden // 256)) for hidden in FLOAT32]
    of_half = [GEOMETRIES[hidden] for hidden in HALF_WIDTHS]
    expected += [(f"w{channels}_f16", blocks) for channels, blocks in of_half]
    expected += [("w512k32_bf16", blocks) for blocks in WIDEST_PERMUTED.values()]
    assert found == expected


if __name__ == "__main__":
    run_all()


# ---- with given weights --------------------------------------------------------------------------

# Of four streams: one slice of the channels and many, full or not, and as many as multiprocessors.
GIVEN_WIDTHS = (64, 320, 1000, 1024, 2752, 4096, 4104, 5120, 8192, 12288)


@pytest.mark.parametrize("hidden", GIVEN_WIDTHS)
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_given_weights(hidden, tokens, dtype):
    poison()
    check("post_pre_given", Case((tokens,), 4, hidden, 3.0), dtype)


@pytest.mark.parametrize("hidden", [320, 1000, 2048, 4096])
@pytest.mark.parametrize("config", [PAPER, NONE, IDENTITY, PERMUTED, variant(sinkhorn_iters=1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_deferred_cotangents_beside_given_weights(hidden, config, dtype):
    poison()
    check("delayed", Case((1031,), 4, hidden, config=config), dtype)


@pytest.mark.parametrize("op", ["post_pre_given", "delayed"])
@pytest.mark.parametrize("hidden", [64, 576, 1000, 2048, 4096])
def test_given_weights_of_two_streams(op, hidden):
    poison()
    check(op, Case((37,), 2, hidden, 3.0), "bfloat16")


@pytest.mark.parametrize("hidden", [1024, 4096])
@pytest.mark.parametrize("config", [PAPER, IDENTITY, PERMUTED])
def test_given_weights_give_the_same_bits_again(hidden, config):
    case = Case((1031,), 4, hidden, 3.0, config)
    first, second = (digest(run("post_pre_given", case, "bfloat16")) for _ in range(2))
    assert first == second
