"""Tests that need an NVIDIA GPU. All others run there too: pytest --platform=gpu."""

import dataclasses
import functools
import hashlib
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    DTYPES,
    ERROR_RATIO,
    FLOAT64,
    KERNELS,
    LEAST_ERROR,
    OPS,
    PERMUTED,
    WIDEST,
    Case,
    assert_close,
    assert_trees_close,
    compiled,
    exact,
    leaf_name,
    limit,
    make_cotangents,
    make_operands,
    variant,
)
from hlo import backward, compiled_text, custom_calls, forward
from jax import export

import jax_mhc
from jax_mhc import presets
from jax_mhc._call import dispatch, library

pytestmark = pytest.mark.gpu


# Sums over tokens and over the width that many blocks share, the last of each not full.
CASE = Case((2053,), 4, 264, 3.0)


def arrays(op, case, dtype):
    """Operands and cotangents."""
    return [make(op, case, jnp.dtype(dtype)) for make in (make_operands, make_cotangents)]


def run(op, case, dtype):
    """Outputs and gradients of the kernels."""
    return compiled(op, case.config, "fused", *arrays(op, case, dtype))


def digest(results):
    """Of all bits of a pytree."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(results)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def dtypes_of(op):
    """Sinkhorn has no half precision."""
    return ["float32"] if op == "sinkhorn" else DTYPES


# The same where a cluster of blocks shares the width, with 256 channels each and with more.
SHARED_CASE = Case((2053,), 4, 1024, 3.0)
WIDE_CASE = Case((2053,), 4, 1280, 3.0)
TWO_STREAMS_CASE = Case((2053,), 2, 2048, 3.0)
ONE_STREAM_CASE = Case((2053,), 1, 2048, 3.0)
STATIC_CASE = Case((2053,), 4, 1032, 3.0, static=True)

OP_DTYPES = [
    (op, dtype) for op in (*KERNELS, "two_sublayers", "delayed") for dtype in dtypes_of(op)
]


@pytest.mark.parametrize("op, dtype", OP_DTYPES)
def test_every_dtype_is_fused(op, dtype):
    function = functools.partial(OPS[op].run, config=presets.PAPER, implementation=None)
    operands, cotangents = arrays(op, CASE, dtype)

    def value_and_vjp(operands, cotangents):
        outputs, pullback = jax.vjp(function, operands)
        return outputs, pullback(cotangents)

    assert custom_calls(compiled_text(function, operands)) == forward(op)
    text = compiled_text(value_and_vjp, operands, cotangents)
    assert custom_calls(text) == forward(op) + backward(op)


def test_none_takes_what_is_faster(monkeypatch):
    """Whatever the newest record says: its three streams are taken to be faster in plain JAX."""
    monkeypatch.setattr(
        dispatch, "_is_plain_faster", lambda configuration: configuration.streams == 3
    )
    for streams, implementation, calls in (
        (3, None, []), (4, None, ["pre", "post"]), (3, "fused", ["pre", "post"]),
    ):  # fmt: skip
        params = jax_mhc.init_params(jax.random.key(0), streams=streams, hidden=64)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        run = functools.partial(jax_mhc.mhc_residual, jnp.tanh, implementation=implementation)
        text = compiled_text(run, jnp.ones((5, streams, 64), jnp.bfloat16), params)
        assert custom_calls(text) == {f"{call}_fwd": 1 for call in calls}


@pytest.mark.parametrize("with_seams", [False, True])
def test_a_scan_runs_every_call_once(with_seams):
    """XLA may make two of a call whose results are stacked for later and used at once."""
    tokens, streams, hidden, layers = 64, 4, 256, 3
    keys = jax.random.split(jax.random.key(0), layers)
    make = functools.partial(jax_mhc.init_params, streams=streams, hidden=hidden)
    params, weights = jax.vmap(make)(keys), jnp.ones((layers, hidden, hidden), jnp.bfloat16)
    x = jnp.ones((tokens, streams, hidden), jnp.bfloat16)

    def loss(x, params, weights):
        if with_seams:
            return jax_mhc.stack([lambda u, w: jnp.tanh(u @ w)], x, [params], xs=weights).sum()

        def body(x, slices):
            params, w = slices
            return jax_mhc.mhc_residual(lambda u: jnp.tanh(u @ w), x, params), None

        return jax.lax.scan(body, x, (params, weights))[0].sum()

    counts = custom_calls(compiled_text(jax.grad(loss, argnums=(0, 1, 2)), x, params, weights))
    if with_seams:
        expected = {"post_pre_fwd": 1, "post_pre_bwd": 1, "post_bwd": 1}
    else:
        expected = {"pre_fwd": 1, "post_fwd": 1, "pre_bwd": 1, "post_bwd": 1}
    assert counts == expected


# ---- shapes -------------------------------------------------------------------------------------


def check(op, case, dtype, change=lambda operands: operands, with_gradients=True):
    """The kernels against float64 on the CPU; test_values.py compares errors in more detail."""
    operands, cotangents = arrays(op, case, dtype)
    operands = change(operands)
    actual = compiled(op, case.config, "fused", operands, cotangents)
    expected = exact(op, case.config, operands, cotangents)
    leaves = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, leaf), wanted in leaves:
        is_gradient = path[0].idx == 1
        if with_gradients or not is_gradient:
            most = limit(case, dtype=dtype, gradient=is_gradient)
            assert_close(leaf, wanted, most, leaf_name(path))


WIDTHS = (1, 2, 3, 7, 8, 31, 40, 63, 64, 65, 100, 127, 128, 130, 250, 257)


@pytest.mark.parametrize("op", [*KERNELS, "delayed"])
@pytest.mark.parametrize("streams", range(1, 17))
def test_any_number_of_streams(op, streams):
    """With a width and a dtype that change along."""
    dtype = dtypes_of(op)[streams % len(dtypes_of(op))]
    check(op, Case((37,), streams, WIDTHS[streams * 5 % 16]), dtype)


@pytest.mark.parametrize("op", [op for op in KERNELS if op != "sinkhorn"])
@pytest.mark.parametrize("hidden", [*WIDTHS, 1000, 1001, 4096])
def test_any_width(op, hidden):
    check(op, Case((19,), 4, hidden), ("bfloat16", "float16", "float32")[hidden % 3])


@pytest.mark.parametrize("op", ["pre", "post_pre"])
@pytest.mark.parametrize(
    "tokens, streams, hidden, dtype",
    [
        # Streams of a token are aligned together, or are not; warps pass from token to token.
        (2053, 4, 2050, "bfloat16"), (517, 4, 2049, "bfloat16"), (517, 3, 1001, "bfloat16"),
        (1031, 2, 523, "bfloat16"), (2053, 1, 9, "bfloat16"), (131, 7, 515, "bfloat16"),
        (131, 16, 133, "bfloat16"), (517, 4, 1030, "float16"), (517, 4, 1030, "float32"),
        (1, 4, 2050, "bfloat16"), (0, 4, 2050, "bfloat16"),
    ],
)  # fmt: skip
def test_rows_that_are_not_aligned(op, tokens, streams, hidden, dtype):
    """Whatever lies beside the operands in memory."""
    poison()
    check(op, Case((tokens,), streams, hidden, 3.0), dtype)


@pytest.mark.parametrize("iters", [20, 40])
@pytest.mark.parametrize("tokens, streams", [(1031, 16), (37, 16), (517, 11), (1031, 5), (37, 7)])
def test_several_warps_share_a_block_of_matrices(tokens, streams, iters):
    """What they record for the backward pass lies in shared memory, or in the workspace."""
    poison()
    config = variant(sinkhorn_iters=iters)
    check("pre", Case((tokens,), streams, 64, 3.0, config), "bfloat16")


@pytest.mark.parametrize(
    "tokens, streams, hidden, dtype",
    [
        # Blocks with whole tokens: a set of channels a thread, or two.
        (4099, 1, 256, "bfloat16"), (2053, 1, 2048, "float16"), (1031, 1, 2560, "bfloat16"),
        (1031, 1, 4096, "float32"), (1, 1, 4096, "bfloat16"), (0, 1, 512, "bfloat16"),
        # Fewer columns of phi than a kernel has room for.
        (2053, 16, 264, "bfloat16"), (517, 11, 1024, "float32"), (2053, 3, 1032, "float16"),
    ],
)  # fmt: skip
def test_heads(tokens, streams, hidden, dtype):
    poison()
    check("head", Case((tokens,), streams, hidden, 3.0), dtype)


@pytest.mark.parametrize("op", ["pre", "post_pre", "two_sublayers"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "streams, hidden", [(1, 40), (2, 40), (2, 33), (3, 40), (4, 33), (4, 264), (4, 1024)]
)
@pytest.mark.parametrize("norm", [False, True])
def test_permutations(op, dtype, streams, hidden, norm):
    """Also at a width at which other constraints have the streams read once."""
    poison()
    check(op, Case((205,), streams, hidden, 3.0, PERMUTED, norm=norm), dtype)


@pytest.mark.parametrize("op", ["pre", "post_pre", "two_sublayers"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, streams, hidden",
    [
        (2053, 1, 1000), (37, 1, 4096), (2053, 3, 64), (37, 3, 2050), (257, 3, 4096),
        (2053, 5, 64), (37, 5, 1000), (37, 6, 2050), (2053, 7, 72),
        (1, 8, 4096), (37, 8, 1000), (257, 8, 2050), (2053, 8, 64),
        (1, 16, 4096), (37, 16, 1000), (37, 16, 2050), (513, 16, 64),
    ],
)  # fmt: skip
def test_products_with_any_number_of_columns(op, dtype, tokens, streams, hidden):
    """Tiles of 256 tokens, slices of the width, chunks of the columns; the last is not full."""
    poison()
    check(op, Case((tokens,), streams, hidden, 3.0), dtype)


@pytest.mark.parametrize(
    "tokens, streams, hidden",
    [(34013, 8, 64), (8581, 16, 40), (300, 8, 4608), (300, 16, 2112), (517, 6, 2048)],
)
def test_warpgroups_take_several_parts_of_a_product_in_turn(tokens, streams, hidden):
    """More than a GPU has multiprocessors: of the forward product, or else of that for d_phi.

    Over many tokens a gradient of alpha may nearly cancel.
    """
    poison()
    case = Case((tokens,), streams, hidden, 3.0)
    check("post_pre", case, "bfloat16", with_gradients=tokens < 1000)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_warpgroups_keep_in_a_token_what_is_not_finite(value):
    """On their way back, too, which is theirs for more streams with whole lines of channels."""
    test_a_token_keeps_what_is_not_finite("two_sublayers", 16, 64, value)


@pytest.mark.parametrize("op", ["post_pre", "two_sublayers"])
@pytest.mark.parametrize(
    "streams, hidden",
    [(2, 4096), (2, 4098), (3, 4104), (4, 8328), (4, 4100), (6, 4104), (8, 4104), (12, 264)],
)
def test_blocks_with_all_streams(op, streams, hidden):
    """They go through several tiles of tokens; the last is not full, nor are the last channels."""
    poison()
    check(op, Case((517,), streams, hidden, 3.0), "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streams, hidden", [(2, 1000), (4, 1000), (4, 1001), (8, 1000)])
def test_nothing_is_mixed_by_the_identity(dtype, streams, hidden):
    poison()
    case = Case((517,), streams, hidden, 3.0, variant(constraint="identity", post_eps=0.125))
    check("two_sublayers", case, dtype)


@pytest.mark.parametrize("op", ["pre", "post", "post_pre", "two_sublayers"])
@pytest.mark.parametrize(
    "streams, hidden",
    [(1, 1000), (1, 4104), (2, 264), (2, 576), (3, 264), (4, 260), (8, 264), (8, 65), (16, 264)],
)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_token_keeps_what_is_not_finite(op, streams, hidden, value):
    """All bits of the other tokens' results and gradients are as without it."""
    case = Case((53,), streams, hidden, 3.0)
    operands, cotangents = arrays(op, case, "bfloat16")
    others = np.arange(53) != 21

    def of_others(operands):
        outputs, gradients = compiled(op, case.config, "fused", operands, cotangents)
        batched = {name: gradients[name] for name in gradients if name in OPS[op].batched}
        return jax.tree.map(lambda leaf: np.asarray(leaf)[others], (outputs, batched))

    def spoil(x):
        return x.at[21, streams - 1, hidden // 2].set(value)

    if "x" in operands:
        spoiled = operands | {"x": spoil(operands["x"])}
    else:
        ctx = operands["ctx"]
        spoiled = operands | {"ctx": dataclasses.replace(ctx, x=spoil(ctx.x))}
    jax.tree.map(np.testing.assert_array_equal, of_others(spoiled), of_others(operands))


@pytest.mark.parametrize("streams", [12, 14, 16])
@pytest.mark.parametrize("op", ["pre", "post_pre"])
def test_many_streams_with_the_columns_of_four(op, streams):
    """phi has about as many as where four streams mix: its kernels are the same, and no others."""
    config = variant(constraint="identity")
    check(op, Case((37,), streams, 40, config=config), DTYPES[streams % 3])


# Every way of the kernels to take channels, and more of them than a block has threads for.
STATIC_SHAPES = (
    (1, 8), (1, 4104), (2, 8), (2, 4104), (3, 100), (3, 264), (4, 8), (4, 100), (4, 4096),
    (4, 4104), (7, 264), (8, 100), (8, 4104), (16, 100), (16, 264),
)  # fmt: skip
STATIC_OPS = ("pre", "post_pre", "two_sublayers")


@pytest.mark.parametrize("op", STATIC_OPS)
@pytest.mark.parametrize("shape", range(len(STATIC_SHAPES)))
def test_static_coefficients(op, shape):
    """With a constraint and a dtype that change along; cotangents are deferred in two_sublayers."""
    poison()
    streams, hidden = STATIC_SHAPES[shape]
    constraints = ["birkhoff", "identity", "none", *(["permutations"] if streams <= 4 else [])]
    config = variant(constraint=constraints[shape % len(constraints)])
    check(op, Case((37,), streams, hidden, 3.0, config, static=True), DTYPES[shape % 3])


@pytest.mark.parametrize("op", STATIC_OPS)
@pytest.mark.parametrize("tokens", [0, 1, 300, 2053])
@pytest.mark.parametrize("norm", [False, True])
def test_any_number_of_tokens_with_static_coefficients(op, tokens, norm):
    """More, too, than sums over tokens that the gradient of the bias is made of."""
    poison()
    case = Case((tokens,), 4, 264, 3.0, static=True, norm=norm)
    check(op, case, DTYPES[(tokens + norm) % 3])


# Widths that 2, 4, 8 or 16 blocks share, each with 256, 320, 384 or 448 channels.
SHARED_WIDTHS = (512, 1024, 1280, 2048, 2560, 3072, 4096, 7168)


@pytest.mark.parametrize("op", ["pre", "post_pre", "two_sublayers"])
@pytest.mark.parametrize("hidden", SHARED_WIDTHS)
@pytest.mark.parametrize("tokens", [0, 1, 8, 205])
def test_widths_that_clusters_of_blocks_share(op, hidden, tokens):
    """Kernels that read the streams once; whatever was in the memory of results and workspaces.

    A gradient of alpha may nearly cancel, and then plain JAX errs as much as the kernels do (203
    tokens and a width of 2048, for one); with these tokens none does.
    """
    poison()
    check(op, Case((tokens,), 4, hidden, 3.0), "bfloat16")


@pytest.mark.parametrize("op", ["pre", "post_pre", "two_sublayers"])
@pytest.mark.parametrize("hidden", [*SHARED_WIDTHS, 6144])
@pytest.mark.parametrize("tokens", [1, 205])
def test_a_norm_at_widths_that_clusters_of_blocks_share(op, hidden, tokens):
    poison()
    check(op, Case((tokens,), 4, hidden, 3.0, norm=True), "bfloat16")


@pytest.mark.parametrize("hidden, tokens", [(1024, 4261), (7168, 1061)])
def test_a_norm_of_several_tokens_a_block(hidden, tokens):
    """The norm before the seam's backward pass, whose blocks have some tokens under way at once."""
    poison()
    check("two_sublayers", Case((tokens,), 4, hidden, 3.0, norm=True), "bfloat16")


# Streams, channels and dtype: of a row a thread has a part, the last warp has few of them, or a row
# has more parts than a block has threads.
NORM_ROWS = [
    (2, 8, "float32"), (2, 8192, "bfloat16"), (4, 264, "float16"), (4, 1000, "bfloat16"),
    (4, 4096, "float32"), (4, 8200, "bfloat16"), (8, 520, "float32"), (8, 1032, "bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 1061])
@pytest.mark.parametrize("streams, hidden, dtype", NORM_ROWS)
def test_a_norm_beforehand(streams, hidden, dtype, tokens):
    """With fewer and with more tokens than the norm's backward pass has blocks."""
    poison()
    check("pre", Case((tokens,), streams, hidden, 3.0, norm=True), dtype)


@pytest.mark.parametrize("op", ["pre", "post_pre"])
@pytest.mark.parametrize("hidden", [512, 2560, 264])
def test_a_norm_scale_with_zeros(op, hidden):
    """The seam's backward pass divides by it, where it can."""

    def with_zeros(operands):
        kept = np.arange(hidden) % 5 > 0
        return operands | {"norm_scale": jnp.where(kept, operands["norm_scale"], 0)}

    check(op, Case((205,), 4, hidden, 3.0, norm=True), "bfloat16", with_zeros)


@pytest.mark.parametrize("op", ["pre", "post_pre"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "hidden, settings",
    [
        (512, {}),
        (768, {"order": "row_column"}),
        (512, {"constraint": "permutations"}),
        (768, {"constraint": "identity"}),
    ],
)
def test_a_block_finishes_several_batches_of_tokens(op, hidden, settings, norm):
    """A hundred tokens for each block of a cluster of two, whose H_res one warp makes.

    Over so many tokens a gradient of alpha may nearly cancel.
    """
    poison()
    case = Case((13003,), 4, hidden, 3.0, variant(**settings), norm=norm)
    check(op, case, "bfloat16", with_gradients=False)


# Widths for clusters of any size, by constraint: with whole blocks of each size, and with a last
# block that has few channels, or none (6152, 6208 and 6656). A test of
# schedules/one_pass/pre_bwd.rs has the blocks and clusters that they take.
WHOLE_BLOCKS = {
    "birkhoff": (256, 640, 6144, 7168, 8192),
    "identity": (256, 768, 8192),
    "permutations": (4096, 5120, 6144, 8192),
}
PARTS_OF_BLOCKS = {
    "birkhoff": (
        64,
        576,
        960,
        1088,
        1856,
        1984,
        2624,
        3136,
        3648,
        4160,
        4224,
        5440,
        6208,
        6656,
        7232,
        # A last line that is not whole, alone or behind whole ones.
        264,
        1000,
        2056,
        4104,
        6152,
        7208,
    ),
    "none": (1600, 520),
    "identity": (64, 576, 1088, 1600, 2112, 2624, 3136, 4160, 6208, 6720, 7232, 7744, 1000, 4104),
    "permutations": (192, 704, 1344, 1664, 2112, 2624, 2944, 3136, 4544, 5184, 6464, 1000, 5128),
}


# The same of other streams.
OTHER_STREAMS = (
    *[
        (2, "bfloat16", "birkhoff", hidden)
        for hidden in (1000, 1024, 1600, 2048, 4104, 4160, 5184, 8192)
    ],
    *[(2, "bfloat16", "none", hidden) for hidden in (576, 2624, 3136, 6720, 7232)],
    *[
        (4, "float16", "birkhoff", hidden)
        for hidden in (1000, 1024, 2624, 4096, 5440, 7208, 7232, 8192)
    ],
    *[(4, "float16", *row) for row in (("none", 576), ("identity", 1000), ("identity", 4096))],
    *[(4, "float32", "birkhoff", hidden) for hidden in (1000, 1024, 2048, 2592, 3360, 4096)],
    *[(4, "float32", "none", hidden) for hidden in (288, 608, 1312)],
    *[(4, "float32", "identity", hidden) for hidden in (520, 2048, 3616)],
)


def wide_case(constraint, hidden, tokens=None, norm=False, streams=4):
    """So many tokens, unless told, that every cluster uses its buffers again."""
    tokens = (1 << 23) // (streams * hidden) + 5 if tokens is None else tokens
    config = variant(constraint=constraint, post_eps=0.125)
    return Case((tokens,), streams, hidden, 3.0, config, norm=norm)


def rows(widths):
    return [(constraint, hidden) for constraint, all in widths.items() for hidden in all]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("constraint, hidden", rows(WHOLE_BLOCKS))
def test_every_size_of_blocks(constraint, hidden, norm):
    poison()
    check("pre", wide_case(constraint, hidden, norm=norm), "bfloat16")


@pytest.mark.parametrize("tokens", [1, None])
@pytest.mark.parametrize("index, row", list(enumerate(rows(PARTS_OF_BLOCKS))))
def test_clusters_of_every_size(index, row, tokens):
    """With a norm at every second width."""
    poison()
    check("pre", wide_case(*row, tokens, norm=index % 2 == 1), "bfloat16")


@pytest.mark.parametrize("tokens", [0, 1, 205, None])
@pytest.mark.parametrize("streams, dtype, constraint, hidden", OTHER_STREAMS)
def test_clusters_of_other_streams(streams, dtype, constraint, hidden, tokens):
    """Cotangents are deferred where there are 205 tokens; there is a norm where there is one."""
    poison()
    case = wide_case(constraint, hidden, tokens, norm=tokens == 1, streams=streams)
    check("two_sublayers" if tokens == 205 else "pre", case, dtype)


# One stream, whose tokens a block has whole: in threads with one set of channels or with two, with
# warps that have few channels, and of every constraint.
ONE_STREAM = (
    ("bfloat16", "birkhoff", 256),
    ("bfloat16", "none", 1000),
    ("bfloat16", "permutations", 2048),
    ("bfloat16", "identity", 2568),
    ("bfloat16", "birkhoff", 4096),
    ("bfloat16", "none", 8192),
    ("float16", "birkhoff", 264),
    ("float16", "identity", 5128),
    ("float32", "none", 1028),
    ("float32", "permutations", 2052),
    ("float32", "birkhoff", 4096),
)


@pytest.mark.parametrize(
    "op, tokens",
    [
        ("post_pre", 0), ("pre", 1), ("post_pre", 1), ("two_sublayers", 205),
        ("pre", None), ("post_pre", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype, constraint, hidden", ONE_STREAM)
def test_blocks_with_whole_tokens(dtype, constraint, hidden, op, tokens):
    """With a norm where there is one token; so many, unless told, that slots are used again."""
    poison()
    config, norm = variant(constraint=constraint, post_eps=0.125), tokens == 1
    tokens = (1 << 24) // hidden + 5 if tokens is None else tokens
    check(op, Case((tokens,), 1, hidden, 3.0, config, norm=norm), dtype)


OWNED = (
    (1, "bfloat16", "birkhoff", 2568),
    (1, "float32", "none", 1028),
    *[(4, "bfloat16", *row) for row in (*rows(WHOLE_BLOCKS), ("birkhoff", 6656))],
    # A block owns up to four tokens of a tile, and not the same number of each.
    *[(4, "bfloat16", "birkhoff", hidden) for hidden in (512, 768, 1000, 1024, 1792)],
    *[(4, "bfloat16", "permutations", hidden) for hidden in (512, 768, 1024, 1792)],
    (2, "bfloat16", "birkhoff", 2624),
    *[(4, "float16", "birkhoff", hidden) for hidden in (2624, 4096, 8192)],
    (4, "float16", "identity", 2048),
    (4, "float32", "birkhoff", 2592),
    (4, "float32", "identity", 2048),
)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("streams, dtype, constraint, hidden", OWNED)
def test_d_x_of_a_token_does_not_depend_on_the_others(streams, dtype, constraint, hidden, norm):
    """Bit for bit, though another block may own the token then."""
    case = wide_case(constraint, hidden, 2053, norm=norm, streams=streams)
    operands, cotangents = arrays("pre", case, dtype)

    def d_x(x, cotangents):
        return compiled("pre", case.config, "fused", operands | {"x": x}, cotangents)[1]["x"]

    everything = d_x(operands["x"], cotangents)
    for tokens in (slice(1000, 1001), slice(1003, 1040)):
        part = d_x(
            operands["x"][tokens], jax.tree.map(lambda leaf, at=tokens: leaf[at], cotangents)
        )
        np.testing.assert_array_equal(part, everything[tokens])


@pytest.mark.parametrize("op, dtype", OP_DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 127, 1009])
def test_any_number_of_tokens(op, dtype, tokens):
    check(op, Case((tokens,), 4, 72), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_layer(dtype):
    """The accuracy that the package promises, as errors in the Euclidean norm."""
    case = Case((512,), 4, 4096, 3.0)
    (outputs, gradients), (exact_outputs, exact_gradients) = (
        run("pre", case, dtype),
        exact("pre", case.config, *arrays("pre", case, dtype)),
    )

    def error(actual, expected):
        difference = np.asarray(actual, np.float64) - expected
        return np.linalg.norm(difference) / np.linalg.norm(expected)

    assert error(outputs["u"], exact_outputs["u"]) <= 1.8e-3
    for name in ("h_pre", "h_post", "h_res"):
        found = error(getattr(outputs["ctx"], name), getattr(exact_outputs["ctx"], name))
        assert found <= 2e-6, (name, found)
    for name, largest in {"phi": 3e-4, "alpha": 1e-4, "bias": 1e-4}.items():
        found = error(getattr(gradients["params"], name), getattr(exact_gradients["params"], name))
        assert found <= largest, (name, found)


@pytest.mark.parametrize("constraint", ["birkhoff", "identity"])
@pytest.mark.parametrize(
    "streams, dtype, tokens, hidden",
    [
        (4, "float32", 205, 1024), (4, "float32", 4099, 2080), (4, "float32", 1021, 4096),
        (4, "float16", 205, 1024), (4, "float16", 4099, 2624), (4, "float16", 1021, 4096),
        (1, "float32", 4099, 2052), (1, "float16", 4099, 5128),
    ],
)  # fmt: skip
def test_streams_that_are_read_once_err_no_more_than_plain_jax(
    streams, dtype, tokens, hidden, constraint
):
    """The gradients that tensor cores make, or one stream's."""
    case = Case((tokens,), streams, hidden, config=variant(constraint=constraint))
    check_beside_plain_jax("pre", case, dtype, ("x", "params.phi"))


def check_beside_plain_jax(op, case, dtype, names):
    """Errors of gradients in the Euclidean norm."""
    operands, cotangents = arrays(op, case, dtype)

    def named(gradients):
        leaves = jax.tree.leaves_with_path(gradients)
        return {leaf_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}

    wanted = named(exact(op, case.config, operands, cotangents)[1])

    def errors(implementation):
        found = named(compiled(op, case.config, implementation, operands, cotangents)[1])
        return {
            name: np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])
            for name in names
        }

    plain, fused = errors("reference"), errors("fused")
    for name in names:
        most = max(ERROR_RATIO * plain[name], LEAST_ERROR[dtype])
        assert fused[name] <= most, (name, fused[name], plain[name])


# ---- bits ---------------------------------------------------------------------------------------


def poison():
    """Leaves memory that XLA hands out next full of NaN."""
    jax.block_until_ready([jnp.full((1 << size,), jnp.nan, jnp.float32) for size in range(8, 26)])


# Columns of phi that a block passes by its tokens, and that it has in chunks.
MANY_COLUMNS = [Case((2053,), 8, 264, 3.0), Case((1025,), 16, 40, 3.0), Case((1025,), 9, 64, 3.0)]

OP_DTYPE_CASES = [
    *[(op, dtype, CASE) for op, dtype in OP_DTYPES],
    *[(op, "bfloat16", SHARED_CASE) for op in ("pre", "post_pre", "two_sublayers")],
    *[("pre", dtype, SHARED_CASE) for dtype in ("float16", "float32")],
    *[(op, "bfloat16", TWO_STREAMS_CASE) for op in ("pre", "post_pre", "two_sublayers")],
    *[(op, "bfloat16", ONE_STREAM_CASE) for op in ("pre", "post_pre", "two_sublayers")],
    ("post_pre", "bfloat16", WIDE_CASE),
    *[(op, "bfloat16", STATIC_CASE) for op in ("post_pre", "two_sublayers")],
    *[("post_pre", dtype, case) for dtype in ("bfloat16", "float32") for case in MANY_COLUMNS],
]


@pytest.mark.parametrize("op, dtype, case", OP_DTYPE_CASES)
def test_same_bits_in_every_run(op, dtype, case):
    """Outputs and all gradients, whatever was in the memory of results and workspaces."""
    digests = set()
    for _ in range(10):
        poison()
        digests.add(digest(run(op, case, dtype)))
    assert len(digests) == 1


@pytest.mark.parametrize("op, dtype, case", OP_DTYPE_CASES)
def test_a_token_does_not_depend_on_the_others(op, dtype, case):
    """Forward: alone, in part of the batch, and elsewhere in it."""
    operands, _ = arrays(op, case, dtype)
    function = jax.jit(functools.partial(OPS[op].run, config=case.config, implementation="fused"))

    def select(tree, tokens):
        return jax.tree.map(lambda leaf: leaf[tokens], tree)

    everything = function(operands)
    (num_tokens,) = case.tokens
    random = np.random.default_rng(0).permutation(num_tokens)
    for tokens in (
        random, random[:1], random[:17], random[:1000], np.arange(5, 6), np.arange(1000, 1017),
        np.arange(1000),
    ):  # fmt: skip
        part = {
            name: select(value, tokens) if name in OPS[op].batched else value
            for name, value in operands.items()
        }
        jax.tree.map(np.testing.assert_array_equal, function(part), select(everything, tokens))


# ---- command buffers ----------------------------------------------------------------------------

RUNS = 40
CAPTURE = "--xla_gpu_enable_command_buffer=+CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"


def run_often():
    """Prints a digest for each of two batches; every run of a batch must have the same."""
    jax.config.update("jax_enable_x64", True)
    batches = [
        [
            make("mhc_residual", CASE, jnp.bfloat16, draw)
            for make in (make_operands, make_cotangents)
        ]
        for draw in range(2)
    ]
    digests = [set(), set()]
    for index in range(RUNS):
        results = compiled("mhc_residual", CASE.config, "fused", *batches[index % 2])
        digests[index % 2].add(digest(results))
    assert [len(found) for found in digests] == [1, 1]
    print(*(found.pop() for found in digests))


def test_command_buffers_give_the_same_bits():
    """XLA may record the calls once, as a CUDA graph, and replay it."""
    outputs, num_executed = [], []
    for flags in ("--xla_gpu_enable_command_buffer=", CAPTURE):
        environment = {
            **os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}",
            "JAX_MHC_LOG": "debug",
        }
        done = subprocess.run(
            [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
        num_executed.append(len(re.findall("stage=Execute", done.stderr)))
    assert outputs[0] == outputs[1]
    # Each run has four calls. Recording takes one for each set of addresses; replaying takes none.
    assert num_executed[0] >= 4 * RUNS
    assert 0 < num_executed[1] <= num_executed[0] // 2, num_executed


# ---- devices ------------------------------------------------------------------------------------


def test_several_threads():
    """Threads may be the first to use a kernel at the same time."""
    expected, found = {}, {}
    problems = [(op, Case((257,), 3, 48 + index)) for index, op in enumerate(KERNELS)]

    def compute(op, case):
        found[op] = digest(run(op, case, "float32"))

    threads = [threading.Thread(target=compute, args=problem) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {op: digest(run(op, case, "float32")) for op, case in problems}
    assert found == expected


@pytest.mark.multi_gpu
@pytest.mark.parametrize("op", KERNELS)
def test_two_gpus_in_one_process(op):
    """At the same time, with the same bits."""
    everything = arrays(op, CASE, "float32")
    results = {}
    for _ in range(3):
        for device in jax.devices()[:2]:
            on_device = jax.device_put(everything, device)
            results[device] = compiled(op, CASE.config, "fused", *on_device)
    for device, result in results.items():
        assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(result))
    first, second = map(digest, results.values())
    assert first == second


@pytest.mark.parametrize("op", KERNELS)
def test_arrays_on_the_cpu(op):
    """A program for the CPU, with the CPU's kernels, beside a GPU."""
    case = Case((7,), 4, 33)
    on_cpu = jax.device_put(arrays(op, case, "float32"), jax.devices("cpu")[0])
    results = compiled(op, case.config, "fused", *on_cpu)
    assert_trees_close(results, exact(op, case.config, *on_cpu), limit(case))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_float64_is_plain_jax(op):
    case = Case((7,), 4, 33)
    everything = arrays(op, case, "float64")
    function = functools.partial(OPS[op].run, config=case.config)
    plain = functools.partial(function, implementation=None)
    assert not custom_calls(compiled_text(plain, everything[0]))
    outputs, _ = exact(op, case.config, *everything)
    assert_trees_close(jax.jit(plain)(everything[0]), outputs, FLOAT64, np.float64)
    with pytest.raises(TypeError, match="expected dtype float32, bfloat16, float16.*got float64"):
        function(everything[0], implementation="fused")


def test_out_of_memory():
    """An error in Python; what fits still runs."""
    # 2 TiB of streams, which are never there.
    params = make_operands("pre", Case((), 4, 4096), jnp.bfloat16)["params"]

    @functools.partial(jax.jit, static_argnums=0)
    def too_large(tokens, value, params):
        x = jnp.broadcast_to(value, (tokens, 4, 4096)).astype(jnp.bfloat16)
        return jax_mhc.pre(x, params, implementation="fused")

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        jax.block_until_ready(too_large(1 << 26, 1.0, params))
    u, _ = too_large(3, 1.0, params)
    assert np.isfinite(np.asarray(u, np.float32)).all()
    check("pre", Case((17,), 4, 72), "bfloat16")


# ---- exported programs --------------------------------------------------------------------------


@pytest.mark.parametrize("op", KERNELS)
def test_one_exported_program_for_every_batch(op):
    """Of serialised programs too the workspace has the size of the batch."""
    (tokens,) = export.symbolic_shape("tokens")
    function = jax.jit(functools.partial(OPS[op].run, config=CASE.config, implementation="fused"))
    operands, _ = arrays(op, CASE, WIDEST)

    def select(leaf_of, operands):
        return {
            name: jax.tree.map(leaf_of, value) if name in OPS[op].batched else value
            for name, value in operands.items()
        }

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), operands)
    shapes = select(
        lambda leaf: jax.ShapeDtypeStruct((tokens, *leaf.shape[1:]), leaf.dtype), shapes
    )
    targets = [library.target_name(f"{call}_fwd") for call in OPS[op].calls]
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    exported = export.export(function, platforms=["cuda"], disabled_checks=checks)(shapes)
    restored = export.deserialize(exported.serialize())
    for num_tokens in (1, 17, 1000):
        part = select(lambda leaf, num=num_tokens: leaf[:num], operands)
        jax.tree.map(np.testing.assert_array_equal, restored.call(part), function(part))


if __name__ == "__main__":
    run_often()
