"""Wheels: what the build says where it cannot go on; without CUDA kernels, or without any."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from programs import ROOT

from jax_mhc._call import library

_SPEC = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
hatch_build = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hatch_build)


def program(folder, name, text="exit 0"):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def env(tmp_path):
    """Variables of a machine that has cargo, a new rustc and compilers, and nothing else."""
    for name in ("cargo", "c++", "cc"):
        program(tmp_path, name)
    program(tmp_path, "rustc", "echo 'release: 99.1.0-nightly'")
    return {"PATH": str(tmp_path)}


def refusal(env):
    with pytest.raises(hatch_build.BuildError) as error:
        hatch_build.check(ROOT, env)
    return str(error.value)


def test_nothing_is_missing(env):
    assert hatch_build.check(ROOT, env) == ""


@pytest.mark.parametrize("name", ["cargo", "rustc"])
def test_no_rust(env, tmp_path, name):
    (tmp_path / name).unlink()
    assert refusal(env).startswith("Rust is missing (cargo and rustc): install Rust 1.")


def test_rust_too_old(env, tmp_path):
    program(tmp_path, "rustc", "echo 'release: 1.75.0'")
    said = refusal(env)
    assert said.startswith("expected Rust 1.") and "got 1.75.0: run rustup update stable" in said


@pytest.mark.parametrize("name, variable", [("c++", "CXX"), ("cc", "CC")])
def test_no_compiler(env, tmp_path, name, variable):
    (tmp_path / name).rename(tmp_path / "other")
    assert f"there is no C++ compiler ({name}): install one, such as" in refusal(env)
    assert hatch_build.check(ROOT, env | {variable: "other -O2"}) == ""


@pytest.mark.parametrize(
    "system, machine", [("win32", "AMD64"), ("linux", "riscv64"), ("freebsd15", "x86_64")]
)
def test_unsupported_platform(monkeypatch, env, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(hatch_build.platform, "machine", lambda: machine)
    said = refusal(env)
    assert said.startswith("expected Linux or macOS on x86_64 or arm64 for the kernels, got ")
    assert f"on {machine}: set JAX_MHC_WHEEL=any" in said


def test_unknown_wheel(env):
    said = refusal(env | {"JAX_MHC_WHEEL": "win_amd64"})
    assert said.startswith("JAX_MHC_WHEEL: expected any or one of manylinux_2_28_x86_64, ")
    assert said.endswith("got win_amd64")


def test_portable_wheel(env, tmp_path):
    wanted = env | {"JAX_MHC_WHEEL": "manylinux_2_28_aarch64"}
    assert refusal(wanted).startswith("cargo-zigbuild is missing: run make wheels")
    program(tmp_path, "cargo-zigbuild")
    program(tmp_path, "rustc", "echo release: 99.1.0; echo $4 >&2")
    assert refusal(wanted).startswith("Rust has no aarch64-unknown-linux-gnu: run rustup target")
    program(tmp_path, "rustc", f"[ $1 = -vV ] && echo release: 99.1.0 || echo {tmp_path}")
    assert hatch_build.check(ROOT, wanted) == "aarch64-unknown-linux-gnu.2.28"


@pytest.mark.parametrize(
    "system, variables, packages",
    [
        ("linux", {}, ["jaxlib", "nvidia-cuda-nvrtc-cu12"]),
        ("linux", {"JAX_MHC_CUDA_ARCHITECTURES": "sm_90"}, ["jaxlib", "nvidia-cuda-nvrtc-cu12"]),
        ("linux", {"JAX_MHC_CUDA_ARCHITECTURES": "none"}, ["jaxlib"]),
        ("linux", {"JAX_MHC_NVRTC": "there"}, ["jaxlib"]),
        ("linux", {"XLA_FFI_INCLUDE_DIR": "there"}, ["nvidia-cuda-nvrtc-cu12"]),
        ("darwin", {}, ["jaxlib"]),
    ],
)
def test_packages_that_a_build_needs(monkeypatch, system, variables, packages):
    monkeypatch.setattr(sys, "platform", system)
    needed = hatch_build._dependencies(variables)
    assert [package.partition("==")[0] for package in needed] == packages


ASK = "from hatchling import build; print(build.get_requires_for_build_wheel())"


def ask(env):
    """What a build answers pip, which asks for its packages."""
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_an_obstacle_comes_before_downloads(env, tmp_path):
    assert ask(env)[1].strip() == str([hatch_build.HEADERS, hatch_build.NVRTC])
    assert ask(env | {"JAX_MHC_WHEEL": "any", "PATH": ""})[1].strip() == "[]"
    (tmp_path / "rustc").unlink()
    status, printed = ask(env)
    (line,) = printed.splitlines()
    assert status == 1 and line.startswith("jax-mhc: Rust is missing (cargo and rustc): install")


def build(folder, **variables):
    """A build of the wheel, as pip does it."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    done = subprocess.run(
        [*command, str(folder)], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "cargo, said",
    [
        ("exit 101", "the crates of Cargo.lock cannot be fetched: run cargo fetch --locked"),
        ('[ "$1" = fetch ]', "cargo build failed; its messages are above"),
    ],
)
def test_an_obstacle_is_one_sentence(env, tmp_path, cargo, said):
    program(tmp_path, "cargo", cargo)
    status, printed = build(tmp_path, CARGO_TARGET_DIR=str(tmp_path), **env)
    assert status == 1
    (line,) = printed.splitlines()
    assert line.startswith(f"jax-mhc: {said}")


def test_progress_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hatch_build, "PROGRESS_SECONDS", 0.02)
    progress = tmp_path / "progress"
    progress.write_text("of an earlier build")
    script = f"for i in 1 2 3; do echo -n $i of 3 > {progress}; sleep 0.3; done"
    hatch_build._run(["sh", "-c", script], ROOT, dict(os.environ), progress)
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("CUDA kernels: ") and "of 3" in line] == [
        f"CUDA kernels: {i} of 3 are compiled" for i in (1, 2, 3)
    ]


WITHOUT_KERNELS = """
import logging
import jax, jax.numpy as jnp, jax_mhc

for z in jnp.ones((2, 2)), jnp.ones((3, 2, 2)):
    assert jax.grad(lambda z: jax_mhc.sinkhorn(z).sum())(z).shape == z.shape
try:
    jax_mhc.sinkhorn(z, implementation="fused")
except RuntimeError as error:
    print(error)
print(jax_mhc.__file__)
"""


@pytest.mark.cpu("the wheel has kernels for no platform")
def test_the_wheel_without_kernels(tmp_path):
    """Without Rust it is built, and it runs in plain JAX, which it says once."""
    status, printed = build(tmp_path, JAX_MHC_WHEEL="any", PATH="")
    assert status == 0, printed
    (wheel,) = tmp_path.glob("jax_mhc-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".dylib"))]
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_KERNELS],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    reason = "this is the wheel of jax-mhc without kernels; on Linux and macOS"
    (warning,) = (line for line in done.stderr.splitlines() if "jax-mhc" in line)
    assert warning.startswith(f"no fused kernels, the ops run in plain JAX: {reason}")
    error, file = done.stdout.splitlines()
    assert error.startswith(f"jax_mhc: no fused kernels: {reason}")
    assert file.startswith(str(tmp_path))


# The fuzzer's library has no CUDA kernels; `make test` builds it first.
WITHOUT_CUDA = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "fuzz" / library._PATH.name
ON_A_GPU = """
import jax.numpy as jnp, jax_mhc
from jax_mhc._call import dispatch

dispatch.default_platform = lambda: "cuda"
z = jnp.ones((2, 2))
assert (jax_mhc.sinkhorn(z) == 0.5).all()
try:
    jax_mhc.sinkhorn(z, implementation="fused")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.cpu("the library has kernels for CPUs alone")
@pytest.mark.skipif(not WITHOUT_CUDA.exists(), reason="make test builds the library")
def test_a_library_without_cuda_kernels(tmp_path):
    """Built with JAX_MHC_CUDA_ARCHITECTURES=none: info says why, and a GPU has plain JAX."""
    package = tmp_path / "jax_mhc"
    ignored = shutil.ignore_patterns("*.so", "*.dylib", "__pycache__")
    shutil.copytree(library._PATH.parent, package, ignore=ignored)
    shutil.copy(WITHOUT_CUDA, package)

    def python(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip

    described = json.loads(python("-m", "jax_mhc.info", "--json").stdout)
    reason = "this build of jax-mhc has no CUDA kernels; reinstall it on Linux with "
    reason += "JAX_MHC_CUDA_ARCHITECTURES unset"
    assert described["library"]["path"] == str(package / library._PATH.name)
    assert described["fused"] == {"cpu": "registered"}
    assert described["cuda"]["architectures"] == [] and described["cuda"]["compiler"] is None
    assert described["cuda"]["error"].startswith(reason)

    done = python("-c", ON_A_GPU)
    (warning,) = (line for line in done.stderr.splitlines() if "jax-mhc" in line)
    assert warning.startswith(f"no fused kernels, the ops run in plain JAX: {reason}")
    assert done.stdout.startswith("jax_mhc") and reason in done.stdout
