"""post_pre with given weights of the streams in u on an NVIDIA GPU, in all sizes of its kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, Case, make_operands, variant
from test_cuda import check, digest, poison, run

from jax_mhc.presets import PAPER

pytestmark = pytest.mark.gpu

OP = "post_pre_given"
NONE = variant(constraint="none")
IDENTITY = variant(constraint="identity", post_eps=0.125)
PERMUTED = variant(constraint="permutations")

# One slice of the channels that is not full, whole slices, many, and more than multiprocessors.
WIDTHS = (64, 256, 448, 1000, 1024, 2560, 4096, 4104, 5120, 7232, 33856)


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 37])
def test_slices_of_the_channels(hidden, tokens):
    """Whatever was in the memory of results and workspaces."""
    poison()
    check(OP, Case((tokens,), 4, hidden, 3.0), "bfloat16")


@pytest.mark.parametrize("streams, config", [(4, NONE), (4, IDENTITY), (4, PERMUTED), (2, PAPER)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("hidden", [320, 1000, 2048])
def test_other_settings(streams, config, dtype, hidden):
    poison()
    check(OP, Case((37,), streams, hidden, config=config), dtype)


@pytest.mark.parametrize("tokens, hidden", [(4099, 2560), (1021, 4096), (0, 1024)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_many_tokens(tokens, hidden, dtype):
    """Stages are filled again and again; a block has some tokens more than another."""
    check(OP, Case((tokens,), 4, hidden, 3.0), dtype)


@pytest.mark.parametrize("hidden", [448, 4096])
def test_a_token_does_not_depend_on_the_others(hidden):
    case = Case((1031,), 4, hidden, 3.0)
    operands = make_operands(OP, case, jnp.dtype("bfloat16"))
    call = jax.jit(functools.partial(OPS[OP].run, config=case.config, implementation="fused"))

    def first(tokens):
        of_tokens = ("y", "ctx", "h_pre")
        own = {name: jax.tree.map(lambda leaf: leaf[:tokens], operands[name]) for name in of_tokens}
        return jax.tree.map(lambda leaf: leaf[:37], call(operands | own))

    jax.tree.map(np.testing.assert_array_equal, first(37), first(1031))


def test_results_have_the_same_bits_in_every_run():
    case = Case((2053,), 4, 2560, 3.0)
    assert len({digest(run(OP, case, "bfloat16")) for _ in range(5)}) == 1
