"""The description of an installation."""

import json
import re
import subprocess
import sys

import jax
import pytest
from cases import PLATFORM

import jax_mhc
from jax_mhc import info
from jax_mhc._call import library


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
