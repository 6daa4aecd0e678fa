"""The description of an installation."""

import functools
import json
import re
import subprocess
import sys

import jax
import pytest
from cases import PLATFORM

import jax_mhc
from jax_mhc import info
from jax_mhc._call import faster, library


def test_a_working_installation():
    described = info.collect()
    assert described["versions"]["jax-mhc"] == jax_mhc.__version__
    assert described["versions"]["jax"] == jax.__version__
    assert described["devices"] == {jax.default_backend(): jax.device_count()}
    assert described["devices_error"] is None
    assert described["library"]["instruction_set"]
    assert described["library"]["ffi_api_version"] == "0.1"
    assert described["fused"] == dict.fromkeys({"cpu", PLATFORM}, "registered")
    assert described["cuda"] == library.cuda_status()
    assert json.loads(json.dumps(described)) == described


def test_a_missing_library_is_no_obstacle(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_outcome", None)
    monkeypatch.setattr(library, "_PATH", tmp_path / "lib.so")
    described = info.collect()
    assert "is missing" in described["library"]["error"]
    assert "is missing" in described["fused"]["cpu"]
    assert described["library"]["handlers"] == {}
    assert "is missing" in described["cuda"]["error"]


def test_gpus_are_described(monkeypatch, capsys):
    devices = [
        {"name": "NVIDIA H100", "capability": "9.0", "error": None},
        {"name": "Tesla V100", "capability": "7.0", "error": "expected 8.0 or newer"},
    ]
    cuda = {"architectures": ["sm_80", "sm_90"], "compiler": "NVRTC 12.9", "driver": "13.0"}
    cuda |= {"devices": devices, "error": None}
    monkeypatch.setattr(library, "cuda_status", lambda: cuda)
    assert info.collect()["cuda"] == cuda
    info._main([])
    printed = capsys.readouterr().out
    for line in (
        r"cuda\n  architectures +sm_80\n +sm_90",
        r"compiler +NVRTC 12\.9",
        r"driver +13\.0",
        r"devices +name NVIDIA H100, capability 9\.0, error None",
        r" +name Tesla V100, capability 7\.0, error expected 8\.0 or newer",
    ):
        assert re.search(line, printed), line


def test_no_devices_are_no_obstacle(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend")

    monkeypatch.setattr(jax, "devices", fail)
    described = info.collect()
    assert described["devices"] == {}
    assert described["devices_error"] == "Unable to initialize backend"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(as_json):
    command = [sys.executable, "-W", "error", "-m", "jax_mhc.info", *["--json"] * as_json]
    printed = subprocess.run(command, check=True, text=True, capture_output=True)
    if PLATFORM == "cpu":  # XLA may have something to say about a GPU
        assert printed.stderr == ""
    if as_json:
        assert json.loads(printed.stdout)["fused"]["cpu"] == "registered"
    else:
        assert library.target_name("pre_fwd") in printed.stdout
        assert "registered" in printed.stdout


# ---- one configuration --------------------------------------------------------------------------

H200 = {"name": "NVIDIA H200", "capability": "9.0", "error": None}
OLD = {"name": "Tesla V100", "capability": "7.0", "error": "expected 8.0 or newer"}


@pytest.fixture
def gpus(monkeypatch):
    """Sets the GPUs of the machine."""

    def set_devices(*devices):
        monkeypatch.setattr(library, "cuda_status", lambda: {"devices": devices})

    return set_devices


def needs_kernels():
    if library.cuda_status()["compiler"] is None:
        pytest.skip("the library has no kernels for GPUs")


@pytest.mark.parametrize("row", faster.measured(), ids=str)
def test_a_configuration_that_was_measured(gpus, row):
    needs_kernels()
    gpus(OLD, H200)
    own = row.configuration
    if own.constraint == "permutations" and own.streams > 4:
        pytest.skip("there is no such call")
    described = info.configuration(
        own.streams, own.hidden, own.dtype, own.constraint, norm=own.norm, tokens=own.tokens
    )
    assert described["gpu"] == "NVIDIA H200, compute capability 9.0"
    assert described["configuration"] == described["measured"]["configuration"] == str(own)
    assert described["measured"]["fused_us"] == row.fused_us
    assert (described["implementation"] == "reference") == (row.plain_us < row.fused_us)
    ops = ["head"] if own.constraint == "head" else ["pre", "post", "post_pre"]
    assert list(described["calls"]) == [f"{op}_{way}" for op in ops for way in ("fwd", "bwd")]
    for plan in described["calls"].values():
        assert plan["schedule"] and plan["kernels"]
        assert all(kernel.startswith("mhc_") for kernel in plan["kernels"])
    assert json.loads(json.dumps(described)) == described


def test_what_differs_gets_other_kernels():
    needs_kernels()
    of = functools.partial(info.configuration, 4, 4096, capability="9.0")
    usual = of()["calls"]
    (kernel,) = usual["pre_fwd"]["kernels"]
    assert kernel == "mhc_pre_fwd_one_pass_w256_bf16"
    for others in ({"dtype": "float32"}, {"constraint": "static"}, {"norm": True}):
        assert of(**others)["calls"]["pre_fwd"] != usual["pre_fwd"]
    delayed = of(schedule="delayed", norm=True)["calls"]
    others = [call for call, plan in usual.items() if delayed[call] != plan]
    assert others == ["post_pre_fwd", "post_pre_bwd"]


@pytest.mark.parametrize(
    "options, error",
    [
        ("--streams 17 --hidden 64", "streams: expected an int from 1 to 16, got 17"),
        ("--streams 5 --hidden 64 --constraint permutations", "streams: .* from 1 to 4, got 5"),
        ("--streams 4 --hidden 0", "hidden: expected an int from 1 to "),
        ("--streams 4 --hidden 64 --tokens -1", "tokens: expected an int from 0 to "),
        ("--streams 4 --hidden 64 --dtype float64", "dtype: .*'float16', got 'float64'"),
        ("--streams 4 --hidden 64 --constraint some", "constraint: .*, got 'some'"),
        ("--streams 4 --hidden 64 --constraint head --norm", "norm: expected none with"),
        ("--streams 4 --hidden 64 --constraint head --schedule delayed", "schedule: expected 'imm"),
        ("--streams 4 --hidden 64 --schedule late", "schedule: .*'delayed', got 'late'"),
        ("--streams 4 --hidden 64 --capability 9", "capability: expected two numbers"),
        ("--streams 4 --hidden 64 --capability 7.5", "expected a GPU of .* 8.0|CUDA"),
        ("--streams 4 --hidden 64", "capability: expected an NVIDIA GPU .*, got none"),
        ("--streams 4", "--streams and --hidden: expected both, got one"),
        ("--norm --tokens 3", "--streams and --hidden: expected both with --norm, --tokens"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_error(gpus, capsys, options, error):
    gpus(OLD)
    with pytest.raises(SystemExit) as caught:
        info._main(options.split())
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(error, printed.err.splitlines()[-1]), printed.err


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_for_a_configuration(capsys, as_json):
    needs_kernels()
    options = "--streams 4 --hidden 4096 --constraint none --capability 9.0".split()
    info._main([*options, *["--json"] * as_json])
    printed = capsys.readouterr().out
    if as_json:
        assert json.loads(printed) == info.configuration(
            4, 4096, constraint="none", capability="9.0"
        )
    else:
        assert re.search(r"implementation +fused", printed)
        assert re.search(
            r"  pre_fwd\n    schedule +one pass\n    kernels +mhc_pre_fwd_one_", printed
        )
