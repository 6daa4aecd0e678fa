"""Programs for other platforms than the one that they are traced on, and for other processes."""

import collections
import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    FAST_COMPILATION,
    KERNELS,
    OPS,
    PLATFORM,
    WIDEST,
    Case,
    assert_trees_close,
    expected,
    limit,
    make_cotangents,
    make_operands,
    value_and_vjp,
)
from hlo import backward, forward
from jax import export

import jax_mhc as mhc
from jax_mhc import presets
from jax_mhc._call import library, table

CASE = Case((6, 5), 4, 64)
CHECKS = [
    export.DisabledSafetyCheck.platform(),
    *(export.DisabledSafetyCheck.custom_call(library.target_name(name)) for name in table.rows()),
]


def exported(function, *arrays, platforms):
    return export.export(jax.jit(function), platforms=platforms, disabled_checks=CHECKS)(*arrays)


def custom_calls(program):
    calls = re.findall(r"custom_call @jax_mhc_(\w+)_v\d", program.mlir_module())
    return collections.Counter(calls)


def value_and_gradients(op, case, implementation=None):
    return functools.partial(value_and_vjp, op, case.config, implementation)


def arrays_of(op, case, dtype=WIDEST):
    return make_operands(op, case, dtype), make_cotangents(op, case, dtype)


# ---- which implementation -----------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
@pytest.mark.parametrize("op", KERNELS)
def test_platforms_without_kernels_get_plain_jax(op, platform):
    program = exported(value_and_gradients(op, CASE), *arrays_of(op, CASE), platforms=[platform])
    assert not custom_calls(program)


@pytest.mark.parametrize("op", KERNELS)
def test_float64_on_cuda_is_plain_jax(op):
    arrays = arrays_of(op, CASE, np.float64)
    assert not custom_calls(exported(value_and_gradients(op, CASE), *arrays, platforms=["cuda"]))


@pytest.mark.parametrize("op", KERNELS)
def test_every_platform_of_a_program_gets_its_own(op):
    calls = forward(op) + backward(op)
    arrays, run = arrays_of(op, CASE, np.float32), value_and_gradients(op, CASE)
    assert custom_calls(exported(run, *arrays, platforms=["cpu", "tpu"])) == calls
    everywhere = exported(run, *arrays, platforms=["cpu", "cuda", "tpu"])
    assert custom_calls(everywhere) == calls + calls


@pytest.mark.parametrize("op", ["pre", "post", "post_pre", "sinkhorn", "head"])
def test_fused_is_an_error_where_there_are_no_kernels(op):
    """At lowering: before, nobody can know the platform."""
    for dtype, platform, error in (
        (np.float32, "tpu", ValueError),
        (np.float64, "cuda", TypeError),
    ):
        if dtype == np.float64 and PLATFORM == "cuda":
            continue  # refused when it is traced
        run, arrays = value_and_gradients(op, CASE, "fused"), arrays_of(op, CASE, dtype)
        with pytest.raises(error, match=rf"jax_mhc\.{op}: implementation='fused': .*'reference'"):
            exported(run, *arrays, platforms=[platform])


# ---- the calls in plain JAX ---------------------------------------------------------------------

# Every formula of the backward calls: n, norm, static, and each setting far from its default.
PLAIN = [
    (op, case)
    for op in KERNELS
    for case in (
        "paper", "no_tokens", "no_leading_axes", "three_streams", "peaked_6", "megatron_peaked",
        "unconstrained", "identity", "static", "large_eps", "eps_outside", "normalized",
        "normalized_static", "permutations",
    )
    if OPS[op].applies(case)
]  # fmt: skip


@pytest.mark.parametrize("op, case", PLAIN)
def test_calls_in_plain_jax(op, case):
    """A program for a TPU, which any platform can run."""
    arrays = arrays_of(op, CASES[case])
    program = exported(value_and_gradients(op, CASES[case]), *arrays, platforms=["tpu"])
    assert not custom_calls(program)
    options = FAST_COMPILATION if PLATFORM == "cpu" else None
    actual = jax.jit(program.call, compiler_options=options)(*arrays)
    assert_trees_close(actual, expected(op, case), limit(CASES[case]))


def test_the_norm_of_zeros_has_a_gradient():
    """sqrt has none at 0."""
    config = presets.MEGATRON
    params = mhc.init_params(jax.random.key(0), streams=4, hidden=8, config=config)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.square(mhc.pre(x, params, config=config)[0])))(x)

    program = exported(gradient, jnp.zeros((2, 4, 8), jnp.float32), platforms=["tpu"])
    np.testing.assert_array_equal(program.call(jnp.zeros((2, 4, 8), jnp.float32)), 0)


# ---- other processes ----------------------------------------------------------------------------

MODEL = """
import json, pickle, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import jax_mhc as mhc
from jax import export
from jax.experimental import serialize_executable
folder = Path(sys.argv[1])
x = jax.random.normal(jax.random.key(1), (3, 4, 8), jnp.float32)
"""

SAVE = (
    MODEL
    + """
params = mhc.init_params(jax.random.key(0), streams=4, hidden=8)
model = jax.jit(lambda x: mhc.mhc_residual(jnp.tanh, x, params, implementation="fused"))
targets = mhc.info.collect()["library"]["handlers"]["cpu"]
checks = [export.DisabledSafetyCheck.custom_call(name) for name in targets]
program = export.export(model, disabled_checks=checks)(x)
(folder / "exported").write_bytes(program.serialize(vjp_order=1))
compiled = serialize_executable.serialize(model.lower(x).compile())
(folder / "compiled").write_bytes(pickle.dumps(compiled))
value, pullback = jax.vjp(model, x)
(gradient,) = pullback(jnp.ones_like(value))
print(json.dumps([float(jnp.sum(array)) for array in (value, gradient, value)]))
"""
)

LOAD = (
    MODEL
    + """
program = export.deserialize((folder / "exported").read_bytes())
value, pullback = jax.vjp(program.call, x)
(gradient,) = pullback(jnp.ones_like(value))
compiled = serialize_executable.deserialize_and_load(
    *pickle.loads((folder / "compiled").read_bytes()), execution_devices=jax.devices()[:1]
)
print(json.dumps([float(jnp.sum(array)) for array in (value, gradient, compiled(x))]))
"""
)


def test_programs_run_in_a_fresh_process(tmp_path):
    """One that imports the package: exported ones, gradients of these, executables."""
    told = []
    for code in (SAVE, LOAD):
        command = [sys.executable, "-c", code, tmp_path]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    np.testing.assert_allclose(*told, rtol=1e-4)
