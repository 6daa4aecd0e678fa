"""Examples and benchmarks as a user runs them: from the command line."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

# Programs that XLA compiled, for all tests and what they run; `make test` empties the folder.
CACHE = ROOT / ".build" / "tests"

# Seconds of compilation, below which to write a program takes longer than to compile it again.
WORTH_KEEPING = 0.05

# jaxlib 0.11 has no other emitters any more, and ends a process that names the flag.
_HAS_EMITTERS = tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11)


def emitters(fusion):
    """XLA's option for its fusion emitters, or the older ones, whose code compiles faster."""
    return {"xla_cpu_use_fusion_emitters": fusion} if _HAS_EMITTERS else {}


# XLA's compiler for the CPU takes a sixth of the time, with jax_disable_most_optimizations besides.
QUICK_COMPILATION = {**emitters(fusion=False), "xla_cpu_parallel_codegen_split_count": 1}

# Most of their time here is compilation, of programs that several runs have in common.
ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(WORTH_KEEPING),
    # By default a GPU rounds the factors of a product in float32 to 10 bits, which would hide that
    # all connections start alike.
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}


def run(script, *options, cwd=ROOT):
    """Run a script of the repository; return its exit status and everything that it printed."""
    return python(ROOT / script, *options, cwd=cwd)


def python(*arguments, cwd=ROOT):
    """Run Python with these arguments; return its exit status and everything that it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | ENVIRONMENT, cwd=cwd, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr
