"""Set-up of all tests: the platform, float64, and examples of hypothesis that repeat."""

import collections
import os
import sys
from pathlib import Path

# The test files share `cases` and others; pytest's importlib mode does not add their folder. Of the
# benchmarks' they want `collectives`.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "benches")]

from programs import CACHE, QUICK_COMPILATION, WORTH_KEEPING  # noqa: E402 - in the folder that the line above adds

# Of this process and those that tests start: several share a GPU, and choosing the fastest matrix
# product takes longer than the few that there are. JAX reads both when it is imported, so its
# import, and those of what imports it, come below (E402).
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
_QUICK = (f"--{name}={str(value).lower()}" for name, value in QUICK_COMPILATION.items())
_FLAGS = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0", *_QUICK
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)

import jax  # noqa: E402 - see above
import pytest  # noqa: E402 - see above
from hypothesis import settings  # noqa: E402 - see above

pytest.register_assert_rewrite("cases")

jax.config.update("jax_enable_x64", True)
# Strict flags: this package must not refuse users who set them.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compilation dominates the time of an example, so no deadline for it.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# JAX's names; on a GPU the CPU is there too, for what the tests expect.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}


@pytest.fixture(scope="session", autouse=True)
def kernels_wherever_there_are_some():
    """None takes the kernels on GPUs, whichever the newest record shows to be faster.

    Tests count calls; test_faster.py is of the choice.
    """
    from jax_mhc._call import dispatch

    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "gpu":
            patch.setattr(dispatch, "_is_plain_faster", lambda configuration: False)
        yield


def pytest_addoption(parser):
    parser.addoption(
        "--platform", choices=PLATFORMS, help="where the tests run; default: JAX's default backend"
    )

    parser.addoption(
        "--devices",
        type=int,
        help="run the tests of meshes alone, on this many simulated devices of the CPU",
    )

    parser.addoption("--kills", type=int, default=2, help="kills of a training in test_resume.py")


def pytest_configure(config):
    if num := config.getoption("--devices"):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num)
    if platform := config.getoption("--platform"):
        jax.config.update("jax_platforms", PLATFORMS[platform])
        os.environ["JAX_PLATFORMS"] = PLATFORMS[platform]
    if jax.default_backend() == "cpu":
        _compile_quickly()


def _compile_quickly():
    """XLA's compiler takes most of the tests' time; programs may run slowly.

    Our kernels, which are compiled beforehand, are the same. Tests that compare XLA's own roundings
    ask for what users get (`cases.FOR_USERS`). Workers compile many programs alike: what took XLA
    long stays in a folder; `make test` begins with an empty one.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes that tests start
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(params=["fused", "reference"])
def implementation(request):
    """Both implementations of every op."""
    return request.param


@pytest.fixture
def default_dtypes():
    """JAX as a user finds it; the other tests turn 64-bit types on."""
    with jax.enable_x64(False):
        yield


# ---- tests of one platform ----------------------------------------------------------------------

_num_deselected = collections.Counter()


def why_not_here(item):
    """The reason why a test cannot run on this platform; None where it can."""
    from cases import PLATFORM

    if PLATFORM != "cpu" and (marker := item.get_closest_marker("cpu")):
        return f"for the CPU alone: {marker.args[0]}"
    if PLATFORM != "cuda" and item.get_closest_marker("gpu"):
        return "needs an NVIDIA GPU"
    is_of_mesh = item.get_closest_marker("mesh") is not None
    if is_of_mesh and jax.device_count() < 2:
        return "needs several devices, such as pytest --devices=8"
    if not is_of_mesh and item.config.getoption("--devices"):
        return "is for one device"
    if item.get_closest_marker("multi_gpu") and jax.device_count() < 2:
        return "needs two GPUs"
    return None


def pytest_collection_modifyitems(config, items):
    reasons = [why_not_here(item) for item in items]
    _num_deselected.update(filter(None, reasons))
    config.hook.pytest_deselected(
        items=[item for item, reason in zip(items, reasons, strict=True) if reason]
    )
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]
    _bring_together(items)


def _bring_together(items):
    """Tests of one op and case, of several files, one after the other.

    They share programs and what is exact (`cases.evaluate`), and neighbours run in one worker.
    """
    first = {}

    def place(numbered):
        number, item = numbered
        params = item.callspec.params if hasattr(item, "callspec") else {}
        names = params.get("op"), params.get("case")
        return number if None in names else first.setdefault(names, number)

    items[:] = [item for _, item in sorted(enumerate(items), key=place)]


def pytest_sessionfinish(session):
    # A worker of pytest-xdist tells the process that reports.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["num_deselected"] = dict(_num_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    # Every worker collects the same tests; one that crashed tells nothing.
    for reason, num in getattr(node, "workeroutput", {}).get("num_deselected", {}).items():
        _num_deselected[reason] = num


def pytest_terminal_summary(terminalreporter):
    for reason, num in _num_deselected.items():
        terminalreporter.write_line(f"{num} tests deselected: {reason}")
