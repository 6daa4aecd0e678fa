"""The log of the shared library (docs/logging.md): what each level tells; no call fails for it."""

import ctypes
import json
import os
import re
import subprocess
import sys

import pytest
from cases import PLATFORM

from jax_mhc._call import library

CALL = "import jax, jax_mhc; print(jax_mhc.sinkhorn(jax.numpy.ones((3, 2, 2))).sum())"
DESCRIBE = """
import ctypes, sys
describe = ctypes.CDLL(sys.argv[1]).jax_mhc_describe
describe.restype = ctypes.c_char_p
print(describe().decode())
"""

#: Some lines of each level.
INFO = r'INFO jax_mhc: .*loaded version="[\d.]+" .*instruction_set="\w+"'
DEBUG = r'DEBUG .*jax_mhc: .*op="sinkhorn_fwd" .*dtype="float32" shapes=\[\[3, 2, 2\]\]'
PLAN = r' plan="\w+, chunks: 1 of 256 tokens, threads: 1" time_us=\d+'
TRACE = r'TRACE call\{op="sinkhorn_fwd"\}: jax_mhc: pass="matrices" chunks=1 threads=1'


def run(code, level=None, **options):
    """Runs `code` with a level of the log, or without."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_MHC_LOG"}
    if level is not None:
        env["JAX_MHC_LOG"] = level
    options = {"stderr": subprocess.PIPE} | options
    command = [sys.executable, "-W", "error", "-c", code, str(library._PATH)]
    return subprocess.run(
        command, env=env, check=True, text=True, stdout=subprocess.PIPE, **options
    )


@pytest.mark.parametrize("level", ["info", "debug", "trace"])
def test_each_level_tells_more(level):
    on_cpu = PLATFORM == "cpu"
    patterns = {"info": INFO, "debug": DEBUG + PLAN * on_cpu, "trace": TRACE if on_cpu else "TRACE"}
    log = run(CALL, level).stderr
    levels = list(patterns)
    for other, pattern in patterns.items():
        is_told = levels.index(other) <= levels.index(level)
        assert bool(re.search(pattern, log)) == is_told, (other, log)
        assert (other.upper() in log) == is_told


@pytest.mark.parametrize("level", [None, "", "off", "error", "warn"])
def test_nothing_is_told_unasked(level):
    ran = run(DESCRIBE, level)
    assert ran.stderr == ""
    assert json.loads(ran.stdout)["log"] == {"level": level or "off", "error": None}


def test_a_failed_call_is_an_error_in_the_log():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax_mhc._call import dispatch, library
library.ensure_registered(dispatch.default_platform())
z = jnp.ones((2, 3, 3), jnp.float32)
call = jax.ffi.ffi_call(library.target_name("sinkhorn_fwd"), z)
try:
    jax.block_until_ready(call(z))
except jax.errors.JaxRuntimeError:
    print("failed")
"""
    ran = run(code, "error")
    assert ran.stdout == "failed\n"
    assert re.search(r"ERROR jax_mhc: sinkhorn_fwd: attribute `constraint`: expected", ran.stderr)


@pytest.mark.parametrize("level", ["loud", "\udcff"])
def test_a_wrong_level_is_told(level):
    ran = run(DESCRIBE, level)
    got = {"loud": '"loud"', "\udcff": r'"\xFF"'}[level]
    error = f"JAX_MHC_LOG: expected off, error, warn, info, debug or trace, got {got}; "
    log = json.loads(ran.stdout)["log"]
    assert log["level"] == "warn" and log["error"].startswith(error)
    assert f"WARN jax_mhc: {error}" in ran.stderr


BROKEN = """
import os, jax, jax_mhc
z = jax.numpy.ones((3, 2, 2))
f = jax.jit(lambda z: jax_mhc.sinkhorn(z, implementation="fused"))
expected = f(z)  # with a full device as standard error, from the start
os.close(2)
assert (f(z) == expected).all()
read, write = os.pipe()
os.dup2(write, 2)
os.close(read)
assert (f(z) == expected).all()
print("done")
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("level", ["trace", "loud"])
def test_no_call_fails_for_the_log(level):
    with open("/dev/full", "w") as full:
        ran = run(BROKEN if level == "trace" else DESCRIBE, level, stderr=full)
    assert ran.stdout == "done\n" or json.loads(ran.stdout)["log"]["error"]


def test_the_library_describes_its_log():
    describe = ctypes.CDLL(str(library._PATH)).jax_mhc_describe
    describe.restype = ctypes.c_char_p
    assert json.loads(describe())["log"].keys() == {"level", "error"}
