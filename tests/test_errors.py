"""Every error at trace time: its type, and its op, argument, expected, got and remedy."""

import ast
import logging
import re
import traceback
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import CTX, ERRORS, HEAD, KEY, PARAMS, C, N, X, Y, Z

import jax_mhc as mhc
from jax_mhc import MHCParams, _errors
from jax_mhc._call import dispatch, library
from jax_mhc._types import Context

# Raised under conditions that the tests below make.
CONDITIONAL = {
    "refuse_fused": 2, "_checked": 1,
    # Without kernels, or memory: test_bench.py.
    "measure": 1, "_check_memory": 1,
    # Without a GPU: test_info.py.
    "_gpu": 1,
    # On meshes: test_mesh.py.
    "use_fused": 1, "check_streams": 1, "_fail_to_agree": 1,
}  # fmt: skip


def check(error, op, argument, got):
    message = str(error)
    where = re.escape(f"jax_mhc.{op}: {argument}")
    found = re.fullmatch(rf"{where}: expected (.+), got (.+?)\. ([A-Z].+)", message)
    assert found, message
    assert found[2] == got, message
    assert found[3].endswith((".", "?")), message


@pytest.mark.parametrize("call, error, op, argument, got", ERRORS)
def test_message(call, error, op, argument, got):
    with pytest.raises(error) as caught:
        call()
    check(caught.value, op, argument, got)


def test_every_message_is_tested():
    """Each `Refusal` in the package is raised by a row above, or is conditional."""
    reached = set()
    for call, *_ in ERRORS:
        try:
            call()
        except (TypeError, ValueError, AttributeError, ImportError) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reached.add((Path(frame.filename).name, frame.lineno))
    package = Path(mhc.__file__).parent
    missed = {}
    for path in package.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                name = getattr(getattr(node, "func", None), "id", None) or getattr(
                    getattr(node, "func", None), "attr", None
                )
                if not isinstance(node, ast.Call) or name != "Refusal":
                    continue
                lines = range(node.lineno, node.end_lineno + 1)
                if not any((path.name, line) in reached for line in lines):
                    missed[function.name] = missed.get(function.name, 0) + 1
    assert missed == CONDITIONAL


@pytest.mark.parametrize("call, error", [row[:2] for row in ERRORS[17:25]])
def test_raised_while_tracing(call, error):
    with pytest.raises(error):
        jax.jit(call).trace()


# ---- derivatives --------------------------------------------------------------------------------


def total(tree):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))


OPS = {
    "pre": lambda x, impl: total(mhc.pre(x, PARAMS, implementation=impl)),
    "post": lambda x, impl: total(mhc.post(x[:, 0], CTX, implementation=impl)),
    "post_pre": lambda x, impl: total(mhc.post_pre(x[:, 0], CTX, PARAMS, implementation=impl)),
    "sinkhorn": lambda x, impl: total(mhc.sinkhorn(x[:, :, :N], implementation=impl) ** 2),
    "head": lambda x, impl: total(mhc.head(x, HEAD, implementation=impl)),
}


def in_scan(f):
    def scanned(x):
        return jax.lax.scan(lambda total, _: (total + f(x), None), 0 * f(x), None, length=2)[0]

    return scanned


WRAPPERS = {"as_is": lambda f: f, "jit": jax.jit, "checkpoint": jax.checkpoint, "scan": in_scan}

FORWARD = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "jacfwd": jax.jacfwd,
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x),
    "jvp_of_vmap": lambda f: lambda x: jax.jvp(jax.vmap(f), (x[None],), (x[None],)),
}

SECOND = {
    "grad_of_grad": lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x))),
    "jvp_of_grad": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,)),
    "hessian": jax.hessian,
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("derivative", [*FORWARD, *SECOND])
@pytest.mark.parametrize("op", OPS)
def test_derivatives_that_fused_ops_do_not_have(op, derivative, wrapper, jitted):
    take = (FORWARD | SECOND)[derivative]
    run = take(WRAPPERS[wrapper](lambda x: OPS[op](x, "fused")))
    with pytest.raises(TypeError) as caught:
        (jax.jit(run) if jitted else run)(X)
    message = str(caught.value)
    assert message.startswith(f"jax_mhc.{op}: derivative: expected ")
    assert "Use implementation='reference'" in message
    # JAX may run into the forward mode of a second derivative first.
    assert "got forward mode" in message or (
        derivative in SECOND and "got a derivative of the derivative" in message
    )


@pytest.mark.parametrize("derivative", ["jvp", "hessian"])
@pytest.mark.parametrize("op", OPS)
def test_the_remedy(op, derivative):
    result = (FORWARD | SECOND)[derivative](lambda x: OPS[op](x, "reference"))(X)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(result))


# ---- platforms and libraries --------------------------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "default_platform", lambda: "other")


@pytest.fixture
def records(caplog):
    """Records of the log with their levels, as of a new process."""
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="jax_mhc"):
        yield lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def check_falls_back(call, array):
    """`call` runs in plain JAX, also the second time."""
    for _ in range(2):
        program = jax.jit(lambda array: call(array)).lower(array).as_text()
        assert "jax_mhc" not in program


def test_fused_on_a_platform_without_kernels(without_kernels):
    with pytest.raises(ValueError) as caught:
        mhc.pre(X, PARAMS, implementation="fused")
    check(caught.value, "pre", "implementation='fused'", "other")


def test_fallback_is_logged_once(without_kernels, records):
    check_falls_back(lambda x: mhc.pre(x, PARAMS)[0], X)
    assert records() == [("INFO", "no kernels for platform 'other': the ops run in plain JAX")]


@pytest.fixture
def nvidia(monkeypatch):
    """An NVIDIA GPU, as far as the choice of an implementation goes; sets what is against it."""

    def set_reason(reason):
        monkeypatch.setattr(library, "_cuda_outcome", reason)

    monkeypatch.setattr(dispatch, "default_platform", lambda: "cuda")
    set_reason("")
    return set_reason


def wide_calls():
    """Every op on float64 arrays."""
    params, head, x, y, z = jax.tree.map(lambda a: a.astype(jnp.float64), (PARAMS, HEAD, X, Y, Z))
    ctx = Context(x=x, h_pre=y[:, :N], h_post=y[:, :N], h_res=z)
    return {
        "pre": lambda a, **options: mhc.pre(a * x, params, **options)[0],
        "post": lambda a, **options: mhc.post(a * y, ctx, **options),
        "post_pre": lambda a, **options: mhc.post_pre(a * y, ctx, params, **options)[0],
        "sinkhorn": lambda a, **options: mhc.sinkhorn(a * z, **options),
        "head": lambda a, **options: mhc.head(a * x, head, **options),
    }


@pytest.mark.parametrize("op", ["pre", "post", "post_pre", "sinkhorn", "head"])
def test_float64_on_an_nvidia_gpu(nvidia, records, op):
    call, one = wide_calls()[op], jnp.ones((), jnp.float64)
    check_falls_back(call, one)
    assert records() == [("INFO", "no float64 kernels for platform 'cuda': plain JAX instead")]
    with pytest.raises(TypeError) as caught:
        call(one, implementation="fused")
    check(caught.value, op, "implementation='fused'", "float64")
    assert "expected dtype float32, bfloat16, float16 on platform 'cuda'" in str(caught.value)


def test_an_nvidia_gpu_that_cannot_be_used(nvidia, records):
    nvidia("the driver is too old")
    check_falls_back(lambda x: mhc.pre(x, PARAMS)[0], X)
    reason = "no fused kernels, the ops run in plain JAX: the driver is too old"
    assert records() == [("WARNING", reason)]
    with pytest.raises(RuntimeError, match="too old.*implementation='reference'.*jax_mhc.info"):
        mhc.pre(X, PARAMS, implementation="fused")


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("implementation", [None, "fused"])
def test_an_unusable_library_is_not_passed_over(monkeypatch, implementation, platform):
    monkeypatch.setattr(dispatch, "default_platform", lambda: platform)
    monkeypatch.setattr(library, "_outcome", "the library is missing; reinstall jax-mhc")
    with pytest.raises(RuntimeError, match="reinstall jax-mhc.*reference"):
        mhc.pre(X, PARAMS, implementation=implementation)
    assert mhc.pre(X, PARAMS, implementation="reference")[0].shape == Y.shape


@pytest.mark.parametrize("device", ["cpu", jax.devices("cpu")[0]])
def test_platform_is_that_of_the_default_device(monkeypatch, device):
    monkeypatch.setattr(jax, "default_backend", lambda: "other")
    assert dispatch.default_platform() == "other"
    with jax.default_device(device):
        assert dispatch.default_platform() == "cpu"


@pytest.mark.parametrize(
    "version, platform",
    [("PJRT C API\ncuda 13000", "cuda"), ("PJRT C API\nrocm 60300", "rocm"), ("oneapi", "gpu")],
)
def test_gpus_are_told_apart(monkeypatch, version, platform):
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(platform="gpu", client=client)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda backend: [device])
    assert dispatch.default_platform() == platform


def test_optional_dependencies(tmp_path, monkeypatch):
    """One that is installed and lacks one of its own is not called missing."""
    assert _errors.require("op", "json", "some").loads("1") == 1
    (tmp_path / "needs_another.py").write_text("import no_such")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'no_such'$"):
        _errors.require("op", "needs_another", "some")


def test_float64_parameters_need_float64():
    with jax.enable_x64(False), pytest.raises(TypeError) as caught:
        mhc.init_params(KEY, streams=N, hidden=C, dtype=jnp.float64)
    check(caught.value, "init_params", "dtype", "float64")


def test_static_params_are_accepted():
    static = MHCParams(phi=None, alpha=None, bias=PARAMS.bias)
    assert mhc.pre(X, static)[0].shape == Y.shape
