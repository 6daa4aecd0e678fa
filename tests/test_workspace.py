"""Scratch memory of calls on NVIDIA GPUs: one more result of the custom call. Needs no GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS, OPS, Case, make_cotangents, make_operands, value_and_vjp
from jax import export

import jax_mhc
from jax_mhc import presets
from jax_mhc._call import library, primitive, table

CASE = Case((6, 5), 4, 64)
PER_TOKEN, FIXED = 7, 11
WIDTH = PER_TOKEN * 30 + FIXED


@pytest.fixture
def workspace(monkeypatch):
    """Sets the size of every workspace; what the library is asked comes back."""
    asked = []

    def set_size(per_token, fixed):
        def size(*problem):
            asked.append(problem)
            return per_token, fixed

        monkeypatch.setattr(library, "workspace", size)
        return asked

    return set_size


def calls(op, platform, dtype=jnp.bfloat16):
    """The custom calls of an op and its gradients: name and types of the results."""
    library.ensure_registered("cpu")
    arrays = [make(op, CASE, dtype) for make in (make_operands, make_cotangents)]
    function = functools.partial(value_and_vjp, op, presets.PAPER, "fused")
    with jax.default_device("cpu"):
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,))
    found = re.findall(r"custom_call @jax_mhc_(\w+)_v\d+\(.* -> (.+)", lowered.as_text())
    return {name: re.findall(r"tensor<([^>]*)>", results) for name, results in found}


@pytest.mark.parametrize("op", KERNELS)
def test_the_call_on_a_gpu_has_it_as_its_last_result(workspace, op):
    asked = workspace(PER_TOKEN, FIXED)
    plain = calls(op, "cpu")
    assert not asked
    assert len(plain) == 2
    with_workspace = {name: [*results, f"{WIDTH}xf32"] for name, results in plain.items()}
    assert calls(op, "cuda") == with_workspace
    (name,) = OPS[op].calls
    if op == "sinkhorn":
        problem = (4, 4, 4, 0, 20, 0, 0)
    else:
        columns = {"post": 0, "collapse": 0, "head": 4}.get(op, 24)
        given = int(op == "post_pre_given")
        problem = (2, 4, 64, columns, 20 if columns else 0, 0, given)
    assert asked == [(f"{name}_fwd", *problem), (f"{name}_bwd", *problem)]


def test_an_empty_one_is_left_out(workspace):
    workspace(0, 0)
    assert calls("pre", "cuda") == calls("pre", "cpu")


def test_its_size_follows_a_symbolic_batch(workspace):
    workspace(PER_TOKEN, FIXED)
    tokens, more = export.symbolic_shape("tokens, more")
    call = table.Call("pre_fwd", presets.PAPER, groups=("dynamic",))
    shapes = [(tokens, more, 4, 64), (4, 64, 24), (3,), (24,)]
    operands = [jax.ShapeDtypeStruct(shape, np.dtype(np.float32)) for shape in shapes]
    assert primitive._workspace(call, operands).shape == (PER_TOKEN * tokens * more + FIXED,)


@pytest.mark.parametrize("platforms", [["cuda"], ["cpu", "cuda"]])
def test_export_for_gpus_from_any_machine(workspace, platforms):
    workspace(PER_TOKEN, FIXED)
    (tokens,) = export.symbolic_shape("tokens")
    target = library.target_name("sinkhorn_fwd")
    exported = export.export(
        jax.jit(functools.partial(jax_mhc.sinkhorn, implementation="fused")),
        platforms=platforms,
        disabled_checks=[export.DisabledSafetyCheck.custom_call(target)],
    )(jax.ShapeDtypeStruct((tokens, 4, 4), jnp.float32))
    program = exported.mlir_module()
    found = re.findall(rf"custom_call @{target}\(.* -> (.+)", program)
    widths = [len(re.findall("tensor<", results)) for results in found]
    assert sorted(widths) == ([2] if platforms == ["cuda"] else [1, 2])
    assert f"dense<{PER_TOKEN}>" in program and f"dense<{FIXED}>" in program


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("name", table.rows())
def test_sizes_are_those_of_the_library(name, element_bytes):
    for streams, hidden in ((1, 1), (4, 4096), (16, 7)):
        columns = streams if name.startswith("head") else streams * (streams + 2)
        for norm_width, given in ((hidden, 0), (0, 1)):
            problem = (element_bytes, streams, hidden, columns, 20, norm_width, given)
            sizes = library.workspace(name, *problem)
            assert all(type(size) is int and size >= 0 for size in sizes)


def test_an_unknown_call_has_none():
    with pytest.raises(RuntimeError, match="the shared library knows no such CUDA call"):
        library.workspace("other", 2, 4, 64, 24, 20, 0, 0)
    with pytest.raises(RuntimeError, match="the shared library knows no such CUDA call"):
        # A norm and given weights.
        library.workspace("post_pre_fwd", 2, 4, 64, 24, 20, 64, 1)
