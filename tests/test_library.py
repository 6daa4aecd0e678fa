"""The shared library: calls that its handlers refuse, and installations that Python refuses."""

import os
import re
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from cases import PLATFORM, WIDEST

import jax_mhc
from jax_mhc import _limits, _types, presets
from jax_mhc._call import Settings, dispatch, library, table

ATTRIBUTES = table.attributes(table.Call("sinkhorn_fwd", jax_mhc.MHCConfig()))
OF_PRE = table.attributes(
    table.Call("pre_fwd", jax_mhc.MHCConfig(), (("norm_scale_eps", 0.0),), ("dynamic",))
)


GROUPS = "dynamic", "norm"


def call(name, args, rets, attributes=ATTRIBUTES, **options):
    """A custom call without any of Python's checks."""
    library.ensure_registered(PLATFORM)
    rets = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in rets]
    args = [jnp.ones(shape, dtype) for shape, dtype in args]
    raw = jax.ffi.ffi_call(library.target_name(name), rets, **options)
    return jax.block_until_ready(jax.jit(lambda *args: raw(*args, **attributes))(*args))


Z = ((3, 4, 4), "float32")
POST_ARGS = [
    ((5, 4, 8), "bfloat16"),
    ((5, 8), "bfloat16"),
    ((5, 4), "float32"),
    ((5, 4, 4), "float32"),
]


def without(name):
    return {key: value for key, value in ATTRIBUTES.items() if key != name}


# The fault, the call, and what the error says besides the name of the op.
MALFORMED = {
    "no operands": ("sinkhorn_fwd", [], [Z], {}, "operands"),
    "an operand too many": ("sinkhorn_fwd", [Z, Z], [Z], {}, "operands"),
    "an operand too few": (
        "sinkhorn_bwd", [Z], [Z], {}, "`d_h_res`: expected an operand, got none",
    ),
    "a result too many": ("sinkhorn_fwd", [Z], [Z, Z], {}, "results"),
    "a result too few": (
        "post_bwd", [*POST_ARGS, POST_ARGS[0]], POST_ARGS[1:3], {"attributes": {}},
        "`d_h_res`: expected a result, got none",
    ),
    "integers": (
        "sinkhorn_fwd", [((3, 4, 4), "int32")], [Z], {},
        "operand 0: expected F32, F64, BF16 or F16, got S32",
    ),
    "complex numbers": (
        "sinkhorn_fwd", [Z], [((3, 4, 4), "complex64")], {},
        "result 0: expected F32, F64, BF16 or F16, got C64",
    ),
    "a type younger than the library": (
        "sinkhorn_fwd", [((3, 4, 4), "float4_e2m1fn")], [Z], {}, "operand 0: expected F32",
    ),
    "another result type": ("sinkhorn_fwd", [Z], [((3, 4, 4), "float64")], {}, "h_res"),
    "another result shape": ("sinkhorn_fwd", [Z], [((3, 4, 5), "float32")], {}, "h_res"),
    "a longer result": ("sinkhorn_fwd", [Z], [((4, 4, 4), "float32")], {}, "h_res"),
    "a scalar": ("sinkhorn_fwd", [((), "float32")], [((), "float32")], {}, "z"),
    "other tokens": (
        "post_fwd", [*POST_ARGS[:3], ((6, 4, 4), "float32")], POST_ARGS[:1], {"attributes": {}},
        "h_res",
    ),
    "17 streams": ("sinkhorn_fwd", [((17, 17), "float32")], [((17, 17), "float32")], {}, "16"),
    "an unknown word": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"order": "diagonal"}},
        'attribute `order`: expected one of ["column_row", "row_column"], got "diagonal"',
    ),
    "an attribute of another type": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"order": np.int64(1)}},
        "attribute `order`: expected a string, got S64",
    ),
    "an attribute of another width": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"norm_eps": np.float32(1)}},
        "attribute `norm_eps`: expected F64, got F32",
    ),
    "a negative count": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"sinkhorn_iters": np.int64(-1)}},
        "attribute `sinkhorn_iters`: expected 0 or more, got -1",
    ),
    "a count without end": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"sinkhorn_iters": np.int64(10**12)}},
        "`sinkhorn_iters`: expected at most 10000",
    ),
    "several numbers": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"pre_eps": np.ones(2)}},
        "attribute `pre_eps`: expected F64, got an array of F64",
    ),
    "a dictionary": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"pre_eps": {"a": np.int64(1)}}},
        "attribute `pre_eps`: expected F64, got a dictionary",
    ),
    **{
        f"{field} = {value}": (
            "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {field: np.float64(value)}},
            f"`{field}`: expected a number of 0 or more that is finite in float32, got {text}",
        )
        for field, value, text in [
            ("sinkhorn_eps", np.nan, "NaN"), ("norm_eps", np.inf, "inf"), ("pre_eps", -1, "-1.0"),
            ("post_scale", 1e39, "1e39"),
        ]
    },
    "a missing attribute": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": without("post_scale")},
        "attribute `post_scale`: expected F64, got none",
    ),
    "an attribute too many": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"gain": "1"}},
        "expected 10 attributes, got 11",
    ),
    "a cotangent of unknown kind": (
        "pre_bwd", [Z], [Z], {"attributes": OF_PRE},
        "attribute `deferred`: expected S64, got none",
    ),
    "a cotangent of another kind": (
        "post_pre_bwd", [Z], [Z],
        {"attributes": OF_PRE | {"given": np.int64(0), "deferred": np.int64(2)}},
        "attribute `deferred`: expected 0 or 1, got 2",
    ),
    "given weights and a norm": (
        "post_pre_fwd", [Z], [Z],
        {"attributes": OF_PRE | {"given": np.int64(1), "norm": np.int64(1)}},
        "`given`: expected 0 with `norm` 1, got 1",
    ),
    "no eps of the norm": (
        "pre_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {key: OF_PRE[key] for key in GROUPS}},
        "attribute `norm_scale_eps`: expected F64, got none",
    ),
    "a group of unknown presence": (
        "pre_fwd", [Z], [Z], {"attributes": ATTRIBUTES},
        "attribute `dynamic`: expected S64, got none",
    ),
    "a group that is half there": (
        "pre_fwd", [Z], [Z], {"attributes": OF_PRE | {"norm": np.int64(2)}},
        "attribute `norm`: expected 0 or 1, got 2",
    ),
    "a norm where there is none": (
        "sinkhorn_fwd", [Z], [Z], {"attributes": ATTRIBUTES | {"norm_scale_eps": np.float64(1)}},
        "expected 10 attributes, got 11",
    ),
    "a cotangent where there is none": (
        "sinkhorn_bwd", [Z, Z], [Z], {"attributes": ATTRIBUTES | {"deferred": np.int64(1)}},
        "expected 10 attributes, got 11",
    ),
    "attributes where there are none": (
        "post_fwd", POST_ARGS, POST_ARGS[:1], {}, "expected 0 attributes, got 10",
    ),
    "a result on its operand": (
        "sinkhorn_fwd", [Z], [Z], {"input_output_aliases": {0: 0}},
        "result 0: expected memory of its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_call_is_refused(case):
    name, args, rets, options, message = MALFORMED[case]
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        call(name, args, rets, **options)
    assert re.match(rf"INVALID_ARGUMENT: {name}: .*{re.escape(message)}", str(error.value))


@pytest.mark.parametrize(
    "name", ["pre_fwd_v2", "seam_bwd_v2", "post_pre_bwd_v3", "post_pre_bwd_v4"]
)
def test_a_program_of_an_earlier_version_is_told_to_be_exported_again(name):
    z = jnp.ones(*Z)
    raw = jax.ffi.ffi_call(f"jax_mhc_{name}", jax.ShapeDtypeStruct(*Z))
    message = (
        "INVALID_ARGUMENT: jax_mhc: program: expected calls of version 5, got those of an earlier "
        "version; export or compile the program again with this version of jax-mhc"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
        jax.block_until_ready(jax.jit(lambda z: raw(z, any="attributes"))(z))


def test_limits_are_those_of_the_library():
    described = library.description()
    assert described["limits"] == {
        "streams": _limits.MAX_STREAMS,
        "permuted_streams": _limits.MAX_PERMUTED_STREAMS,
        "sinkhorn_iters": _limits.MAX_SINKHORN_ITERS,
    }
    assert {k: tuple(v) for k, v in described["dtypes"].items()} == _limits.KERNEL_DTYPES


def test_words_of_settings_are_those_of_the_library():
    (call,) = (call for call in library.description()["calls"] if call["name"] == "pre_fwd")
    attributes = [attribute for attribute in call["attributes"] if "choices" in attribute]
    # Plain JAX alone knows other forms, and Python alone which h_pre makes the layer's input.
    words = {f: of for f, of in _types.WORDS.items() if f not in ("form", "schedule")}
    assert {each["name"]: tuple(each["choices"]) for each in attributes} == words


def test_a_call_works_after_a_refused_one():
    with pytest.raises(jax.errors.JaxRuntimeError):
        call("sinkhorn_fwd", [], [Z])
    (h_res,) = call("sinkhorn_fwd", [Z], [Z])
    np.testing.assert_allclose(h_res, 0.25)


OUT_OF_MEMORY = """
import resource, sys
import jax, jax.numpy as jnp, jax_mhc

def gradient(iters):
    config = jax_mhc.MHCConfig(sinkhorn_iters=iters)
    sinkhorn = lambda z: jax_mhc.sinkhorn(z, config=config, implementation="fused").sum()
    return jax.jit(jax.grad(sinkhorn)).lower(z).compile()

z = jnp.ones((3, 16, 16), jnp.float32)
small, large = gradient(20), gradient(10_000)
expected = small(z)
with open("/proc/self/statm") as statm:
    in_use = int(statm.read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (in_use + (100 << 20), before[1]))
for _ in range(2):
    try:
        jax.block_until_ready(large(z))
    except jax.errors.JaxRuntimeError as error:
        print(error)
    assert (small(z) == expected).all()
resource.setrlimit(resource.RLIMIT_AS, before)
print(large(z).shape)
"""


@pytest.mark.cpu("scratch memory on a GPU is XLA's")
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the memory in use")
def test_scratch_that_cannot_be_had_is_an_error():
    first, second, shape = run(OUT_OF_MEMORY).stdout.splitlines()
    assert first == second
    pattern = (
        r"RESOURCE_EXHAUSTED: sinkhorn_bwd: scratch memory: expected (\d+) bytes more, got none"
    )
    assert int(re.match(pattern, first)[1]) > 100 << 20
    assert "run fewer tokens at a time, fewer Sinkhorn iterations" in first
    assert shape == "(3, 16, 16)"


def test_a_workspace_is_accepted():
    """Of a program compiled for a GPU, or on one for a call that needs none."""
    h_res, _ = call("sinkhorn_fwd", [Z], [Z, ((7,), "float32")])
    np.testing.assert_allclose(h_res, 0.25)


def test_the_library_answers_every_call():
    described = library.status()
    for platform in {"cpu", PLATFORM}:
        handlers = described["handlers"][platform]
        assert sorted(handlers) == sorted(map(library.target_name, table.rows()))
    assert described["version"] == metadata.version("jax-mhc")
    assert described["error"] is None


# ---- the table of calls -------------------------------------------------------------------------


def with_groups(name, groups):
    row = table.rows()[name]
    names = [value.name for value in row.operands if value.group in (None, *groups)]
    more = {"deferred": True} if "deferred" in row.attributes else {}
    return Settings(presets.PAPER, norm_scale_eps=0.5).call(name, names, **more), names


@pytest.mark.parametrize(
    "groups", [(), ("dynamic",), ("norm",), ("dynamic", "norm"), ("dynamic", "given")]
)
@pytest.mark.parametrize("name", ["pre_fwd", "pre_bwd", "post_pre_fwd", "post_pre_bwd", "head_bwd"])
def test_a_call_has_the_operands_of_its_groups(name, groups):
    made, names = with_groups(name, groups)
    assert made.operands == names
    has = set(made.groups)
    assert has == set(groups).intersection(table.rows()[name].groups)
    gone = {"norm_scale", "rho", "u_norm", "d_norm_scale"} if "norm" not in groups else set()
    if "dynamic" not in groups and not name.startswith("head"):
        gone |= {"phi", "alpha", "m", "d_phi", "d_alpha"}
    if "given" not in groups:
        gone |= {"h_given", "d_h_given"}
    assert gone.isdisjoint([*made.operands, *made.results])
    # Each gradient belongs to an operand that is there.
    gradients = [result.removeprefix("d_") for result in made.results if result.startswith("d_")]
    assert set(gradients) <= {*made.operands, "x_new"}


@pytest.mark.parametrize("name", ["phi", "h_res_new"])
def test_a_call_without_an_operand_is_refused(name):
    _, names = with_groups("post_pre_bwd", ("dynamic",))
    operands = [other for other in names if other != name]
    with pytest.raises(TypeError, match="post_pre_bwd: expected operands"):
        Settings(presets.PAPER).call("post_pre_bwd", operands, deferred=True)


@pytest.mark.parametrize(
    "name", ["pre_fwd", "post_bwd", "post_pre_bwd", "sinkhorn_bwd", "head_fwd"]
)
def test_attributes_are_those_of_the_table(name):
    made, _ = with_groups(name, ("norm",))
    assert sorted(table.attributes(made)) == sorted(table.rows()[name].attributes)


def test_values_of_one_name_are_alike():
    """Operands and results of a call may have a name in common, and so may calls."""
    found = {}
    for row in table.rows().values():
        for value in (*row.operands, *row.results):
            assert found.setdefault(value.name, value)[:4] == value[:4]


# ---- the file -----------------------------------------------------------------------------------


def test_the_library_does_not_tell_where_it_was_built():
    contents = library._PATH.read_bytes()
    checkout = Path(__file__).parents[1]
    for folder in (Path.home(), checkout, Path(os.environ.get("CARGO_HOME", checkout))):
        assert f"{folder}/".encode() not in contents, folder


def test_the_library_is_registered_once(monkeypatch):
    """With the handlers of all platforms that it has."""
    registered = []
    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.setattr(
        jax.ffi,
        "register_ffi_target",
        lambda name, *_, platform: registered.append((platform.lower(), name)),
    )
    in_threads(lambda: library.missing("cpu"))
    handlers = library.status()["handlers"]
    own = [(p, name) for p, name in registered if not name.endswith(("_v2", "_v3", "_v4"))]
    assert sorted(own) == sorted((p, name) for p in handlers for name in handlers[p])
    # Names of earlier versions answer with an error, on every platform.
    assert len(set(registered) - set(own)) == len(registered) - len(own) == 72


def test_an_interrupted_registration_starts_over(monkeypatch):
    """Ctrl-C, at any handler; XLA takes those again that it has."""
    original, calls = jax.ffi.register_ffi_target, []

    def interrupt(name, *_, **__):
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(name, *_, **__)

    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", interrupt)
    with pytest.raises(KeyboardInterrupt):
        library.missing("cpu")
    assert library.missing("cpu") is None
    assert calls[5:10] == calls[:5]
    np.testing.assert_allclose(jax_mhc.sinkhorn(jnp.ones((2, 2), WIDEST)), 0.5)


def in_threads(function):
    """Calls `function` in several threads at once."""
    threads = [threading.Thread(target=function) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def unregistered(monkeypatch):
    """A process that has not used the library and must not register anything."""

    def refuse(name, *_, **__):
        raise AssertionError(f"{name} was registered")

    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)


def check_unusable(reason):
    """Every fused use raises the same error, and all else goes on."""
    z = jnp.ones((2, 2), WIDEST)
    messages = set()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="jax_mhc: no fused kernels: ") as error:
            jax_mhc.sinkhorn(z, implementation="fused")
        messages.add(str(error.value))
    assert len(messages) == 1
    assert re.search(reason, messages.pop())
    assert re.search(reason, library.status()["error"])
    np.testing.assert_allclose(jax_mhc.sinkhorn(z, implementation="reference"), 0.5)


@pytest.mark.usefixtures("unregistered")
class TestUnusableLibrary:
    def test_missing(self, monkeypatch, tmp_path):
        monkeypatch.setattr(library, "_PATH", tmp_path / "lib.so")
        check_unusable(r"lib\.so is missing; reinstall jax-mhc")

    def test_no_library(self, monkeypatch, tmp_path):
        path = tmp_path / "lib.so"
        path.write_bytes(b"not a shared library")
        monkeypatch.setattr(library, "_PATH", path)
        check_unusable(r"lib\.so cannot be loaded on this machine \(.+\); reinstall jax-mhc")

    @pytest.mark.skipif(sys.platform != "linux", reason="its loader maps what is not there")
    @pytest.mark.parametrize("share", [0.0, 1e-6, 1e-5, 0.1, 0.9, 0.999])
    def test_cut_off(self, monkeypatch, tmp_path, share):
        """To map it and read on would end the process."""
        code = library._PATH.read_bytes()
        path = tmp_path / "lib.so"
        path.write_bytes(code[: int(share * len(code))])
        monkeypatch.setattr(library, "_PATH", path)
        check_unusable(r"lib\.so is cut off; reinstall jax-mhc")

    @pytest.mark.skipif(sys.platform != "linux", reason="another format")
    def test_for_another_machine(self, monkeypatch, tmp_path):
        """The loader would say that there is no such file."""
        code = bytearray(library._PATH.read_bytes())
        code[18] = {62: 183, 183: 62}[code[18]]
        path = tmp_path / "lib.so"
        path.write_bytes(code)
        monkeypatch.setattr(library, "_PATH", path)
        check_unusable(r"lib\.so is for (x86_64|aarch64), and this machine is \w+; reinstall")

    def test_of_somebody_else(self, monkeypatch):
        monkeypatch.setattr(library, "_PATH", Path(np._core._multiarray_umath.__file__))
        check_unusable("is not the library of jax-mhc")

    def test_of_another_version(self, monkeypatch):
        monkeypatch.setattr(metadata, "version", lambda name: "9.8.7")
        check_unusable(r"expected version 9\.8\.7, got version \d")

    def test_of_an_older_table_of_calls(self, monkeypatch):
        described = library._load()
        description = {key: described[key] for key in ("version", "target_version")}
        monkeypatch.setattr(library.json, "loads", lambda *_, **__: description)
        check_unusable("is not the library of jax-mhc")

    @pytest.mark.parametrize("version", ["0.8.3", "0.4.38", "?"])
    def test_jaxlib_too_old(self, monkeypatch, version):
        monkeypatch.setattr(jaxlib.version, "__version__", version)
        check_unusable(rf"expected jaxlib 0\.9 or newer, got {re.escape(version)}; run pip install")


@pytest.mark.parametrize("version", ["0.9.0", "0.9.0.1", "0.12.0.dev20260901", "1.0"])
def test_jaxlib_new_enough(monkeypatch, version):
    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.setattr(jaxlib.version, "__version__", version)
    assert library.missing("cpu") is None


def test_a_refused_handler(monkeypatch):
    def refuse(name, *_, **__):
        raise ValueError("too new")

    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    check_unusable(r"XLA refused jax_mhc_pre_fwd_v\d+ \(too new\)")


def test_a_platform_without_kernels():
    with pytest.raises(RuntimeError, match="this build of jax-mhc has none for platform 'tpu'"):
        library.ensure_registered("tpu")


# ---- NVIDIA GPUs --------------------------------------------------------------------------------

CUDA = {
    "architectures": ["sm_80", "sm_90"],
    "compiler": "NVRTC 12.9",
    "driver": "13.0",
    "devices": [{"name": "NVIDIA H100", "capability": "9.0", "error": None}],
    "error": None,
}
OLD_GPU = {"name": "Tesla V100", "capability": "7.0", "error": "expected 8.0 or newer"}
UNUSABLE = {
    "no driver": ({"driver": None, "error": "there is no driver; install one"}, "no driver"),
    "old driver": ({"driver": "11.8", "error": "expected 12.0, got 11.8"}, "expected 12.0, got"),
    "no kernels": ({"architectures": [], "error": "built without CUDA"}, "built without CUDA"),
    "old GPU": (
        {"devices": [*CUDA["devices"], OLD_GPU]},
        "GPU 1, Tesla V100 of compute capability 7.0: expected 8.0 or newer; .*VISIBLE_DEVICES",
    ),
}


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU: `cuda(status)` says which, and what was registered comes back."""
    registered = []

    def register(name, target, platform):
        registered.append((name, platform, sorted(target)))

    def set_status(status):
        handlers = [
            {"name": name, "platform": "CUDA", "initialize": 8 * i + 8, "execute": 8 * i + 16}
            for i, name in enumerate(map(library.target_name, table.rows()))
        ]
        description = {**library._load(), "handlers": handlers}
        monkeypatch.setattr(library, "_outcome", description)
        monkeypatch.setattr(library, "_cuda_outcome", None)
        monkeypatch.setattr(library, "cuda_status", lambda: status)
        monkeypatch.setattr(dispatch, "default_platform", lambda: "cuda")
        monkeypatch.setattr(jax.ffi, "register_ffi_target", register)
        dispatch._log_once.cache_clear()
        return registered

    return set_status


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_gpu_that_cannot_be_used(cuda, caplog, what):
    changes, reason = UNUSABLE[what]
    registered = cuda({**CUDA, **changes})
    z = jnp.ones((2, 2), jnp.float32)
    np.testing.assert_allclose(jax_mhc.sinkhorn(z), 0.5)
    np.testing.assert_allclose(jax_mhc.sinkhorn(z), 0.5)
    (record,) = (record for record in caplog.records if record.name == "jax_mhc")
    assert record.levelname == "WARNING"
    assert re.search(f"no fused kernels, the ops run in plain JAX: .*{reason}", record.getMessage())
    with pytest.raises(RuntimeError, match=f"{reason}.*python -m jax_mhc.info"):
        jax_mhc.sinkhorn(z, implementation="fused")
    assert not registered


def test_gpus_are_asked_for_once(cuda, monkeypatch):
    registered, asked = cuda(CUDA), []
    monkeypatch.setattr(library, "cuda_status", lambda: asked.append(1) or CUDA)
    in_threads(lambda: library.ensure_registered("cuda"))
    assert len(asked) == 1
    # The handlers are there since the import.
    assert not registered


def test_a_refused_handler_for_gpus(monkeypatch):
    """CPUs have their kernels nevertheless."""
    original = jax.ffi.register_ffi_target

    def refuse(name, *rest, platform):
        if platform == "CUDA":
            raise ValueError("too new")
        original(name, *rest, platform=platform)

    description = library._load()
    description["handlers"] += [
        {
            "name": library.target_name("pre_fwd"),
            "platform": "CUDA",
            "initialize": 8,
            "execute": 16,
        }
    ]
    monkeypatch.setattr(library, "_load", lambda: description)
    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.setattr(library, "_cuda_outcome", None)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    with pytest.raises(RuntimeError, match=r"XLA refused jax_mhc_pre_fwd_v\d+ \(too new\)"):
        library.ensure_registered("cuda")
    assert library.missing("cpu") is None


def test_what_the_library_tells_of_gpus():
    status = library.cuda_status()
    assert status.keys() == CUDA.keys()
    for device in status["devices"]:
        assert device.keys() == OLD_GPU.keys()
    if PLATFORM == "cuda":
        assert status["error"] is None and status["driver"] and status["architectures"]
        assert len(status["devices"]) >= jax.device_count()
    else:
        # The reason why there are none.
        assert status["devices"] or status["error"]


def test_a_cpu_program_leaves_the_driver_alone():
    code = "import jax_mhc._call.library as library; assert library._cuda_outcome is None"
    run(f"{SINKHORN}; {code}", JAX_PLATFORMS="cpu")


def run(code, **variables):
    """Runs `code` in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", code]
    env = {**os.environ, **variables}
    return subprocess.run(command, env=env, check=True, text=True, capture_output=True)


SINKHORN = "import jax, jax_mhc; print(jax_mhc.sinkhorn(jax.numpy.ones((3, 2, 2))).sum())"


@pytest.mark.cpu("a GPU has no pool of threads to share")
def test_many_devices_share_the_pool():
    """Calls that run at the same time on several devices lend each other threads."""
    code = """
import jax, jax.numpy as jnp, jax_mhc
z = jax.random.normal(jax.random.key(0), (8, 4096, 4, 4))
expected = jax_mhc.sinkhorn(z)
f = jax.pmap(jax_mhc.sinkhorn)
for _ in range(50):
    assert (f(z) == expected).all()
"""
    run(code, XLA_FLAGS="--xla_force_host_platform_device_count=8")
