"""Effects of importing the package, and those that it must not have."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

import jax_mhc

PUBLIC = {
    "Context", "MHCParams", "MHCConfig", "HeadParams", "init_params", "init_head", "expand",
    "reduce", "head", "pre", "post", "post_pre", "sinkhorn", "mhc_residual", "stack", "presets",
    "convert", "reference", "remat_policy", "diagnostics", "info", "Recompute",
    "scan", "stack_with_samples", "Streams", "as_streams", "collapse", "param_labels",
    "bench", "estimate",
}  # fmt: skip


# Modules for libraries that need not be there, so they are no attributes until they are imported.
OPTIONAL = {"equinox", "flax"}
# Modules that are imported when they are first asked for.
LAZY = {"bench", "info"}


def python(code, **variables):
    environment = {**os.environ, **variables}
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_public_names():
    assert set(jax_mhc.__all__) == PUBLIC
    assert {n for n in vars(jax_mhc) if not n.startswith("_")} - OPTIONAL | LAZY == PUBLIC
    assert all(getattr(jax_mhc, name).__doc__ for name in PUBLIC)


def test_version_is_the_distribution():
    assert jax_mhc.__version__ == metadata.version("jax-mhc")


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'jax_mhc' has no attribute 'sinkhorm'"):
        _ = jax_mhc.sinkhorm


def test_import_starts_nothing():
    """No backend, thread or CUDA driver: forking before first use stays safe."""
    out = python(
        "import jax, threading, jax_mhc\n"
        "from jax_mhc._call import library\n"
        "print(threading.active_count(), library._cuda_outcome)\n"
        "print('libcuda.so' in open('/proc/self/maps').read())\n",
        # Starting any backend would raise.
        JAX_PLATFORMS="none_such",
    )
    assert out.split() == ["1", "None", "False"]


def test_import_registers_the_handlers():
    """Programs that hold calls run in a process that traces no op."""
    out = python("import jax_mhc; print(type(jax_mhc._library._outcome).__name__)")
    assert out.split() == ["dict"]


def test_import_is_light():
    """Of JAX, what `import jax` leaves out stays out: half of it takes longer than this package."""
    out = python(
        "import sys, jax\n"
        "before = set(sys.modules)\n"
        "import jax_mhc\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    added = {name for name in out.split() if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in added if not name.startswith("jax_mhc.")} == {
        "jax_mhc",
        "jax.ad_checkpoint",
    }
    assert not added & {f"jax_mhc.{name}" for name in LAZY}
