"""The example in Rust as a user runs it: a program from JAX in a process without Python."""

import json
import re
import shutil
import subprocess
from importlib import metadata

import numpy as np
import pytest
from programs import ROOT, run

from jax_mhc._call import library


def find_plugin():
    """XLA's PJRT plugin for CPUs; None where it is not installed."""
    try:
        files = metadata.files("xla-cpu-pjrt")
    except metadata.PackageNotFoundError:
        return None
    return next(str(file.locate()) for file in files if file.name == "xla_cpu_pjrt.so")


PLUGIN = find_plugin()
LIBRARY = library.status()["path"]
VERSION = library.description()["target_version"]

pytestmark = [
    pytest.mark.cpu("with a plugin for GPUs the example is run by hand (examples/rust/README.md)"),
    pytest.mark.skipif(PLUGIN is None, reason="xla-cpu-pjrt is there for Linux on x86-64 alone"),
    pytest.mark.skipif(shutil.which("cargo") is None, reason="without Rust there is no example"),
]


@pytest.fixture(scope="module")
def binary():
    """The example, built."""
    command = "cargo build --locked --package jax-mhc-run --message-format json".split()
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    messages = map(json.loads, done.stdout.splitlines())
    return next(path for message in messages if (path := message.get("executable")))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The program that `export.py` writes for CPUs."""
    folder = tmp_path_factory.mktemp("rust") / "program"
    status, output = run("examples/rust/export.py", "--platform", "cpu", folder)
    assert status == 0, output
    return folder


@pytest.fixture
def program(exported, tmp_path):
    """A copy of that program, to change."""
    return shutil.copytree(exported, tmp_path / "program")


def start(*arguments):
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=300)


def run_program(binary, program):
    return start(binary, "--plugin", PLUGIN, "--library", LIBRARY, program)


def replace(path, old, new):
    """Puts bytes of the same number in place of others."""
    assert len(old) == len(new)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def assert_ends_with(error, done):
    """Asserts that a process could not run and said why in one line."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(f"jax-mhc-run: .*{error}", line), line


def test_the_results_are_those_of_jax(binary, exported):
    done = run_program(binary, exported)
    assert done.returncode == 0, done.stderr
    num = len(library.description()["calls"])
    assert f"registered the handlers of {num} calls for cpu" in done.stdout
    results = json.loads((exported / "values.json").read_text())["results"]
    assert len(results) == 1 + 3 * 3 + 1  # the loss, gradients of three sublayers and of u
    for result in results:
        assert f"run 1, {result['name']} {result['dims']}: difference" in done.stdout
    assert "the results are those of JAX in 3 runs" in done.stdout


def test_no_result_is_zero(exported):
    """Zeros would be right whatever computes them."""
    index = json.loads((exported / "values.json").read_text())
    numbers = np.fromfile(exported / "values.bin", "<f4")
    sizes = [np.prod(v["dims"], dtype=int) for v in index["arguments"] + index["results"]]
    parts = np.split(numbers, np.cumsum(sizes))
    assert len(parts.pop()) == 0
    for result, part in zip(index["results"], parts[len(index["arguments"]) :], strict=True):
        assert np.all(part), result["name"]


@pytest.mark.parametrize("wrong", [lambda number: number + 1, lambda number: np.nan])
def test_other_numbers_are_found(binary, program, wrong):
    numbers = np.fromfile(program / "values.bin", "<f4")
    numbers[-1] = wrong(numbers[-1])
    numbers.tofile(program / "values.bin")
    done = run_program(binary, program)
    assert done.returncode == 1
    assert "results are NOT those of JAX" in done.stdout


def changed(file, *change):
    return lambda program: replace(program / file, *change)


def calls_of(version):
    return changed("program.mlirbc", b"_v%d" % VERSION, b"_v%d" % version)


def cut_off(file):
    return lambda program: (program / file).write_bytes((program / file).read_bytes()[:-100])


@pytest.mark.parametrize(
    "change, error",
    [
        (calls_of(VERSION - 1), f"expected calls of version {VERSION}, got those of an earlier"),
        (calls_of(VERSION + 1), f"jax_mhc_pre_fwd_v{VERSION + 1}.*; export it again with jax-mhc"),
        (cut_off("program.mlirbc"), "Failed to parse.*; export it again with jax-mhc"),
        (cut_off("values.bin"), "values.bin: expected the float32 numbers that values.json lists"),
        (cut_off("values.json"), "values.json: EOF while parsing.*; export it again"),
        (lambda program: shutil.rmtree(program), "values.json: No such file"),
        (changed("values.json", b' "cpu"', b'"cuda"'), "expected PJRT's extension for custom"),
        (changed("values.json", b'"cpu"', b'"tpu"'), "expected handlers for tpu, got a build"),
    ],
)  # fmt: skip
def test_a_program_that_cannot_run_is_one_sentence(binary, program, change, error):
    change(program)
    assert_ends_with(error, run_program(binary, program))


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"--plugin": "/nowhere.so"}, "plugin /nowhere.so: cannot be loaded: .*No such file"),
        ({"--plugin": LIBRARY}, "expected a PJRT plugin, got a library without"),
        ({"--library": "/nowhere.so"}, "library /nowhere.so: cannot be loaded: .*No such file"),
        ({"--library": PLUGIN}, "expected jax-mhc's libjax_mhc_xla.so, got another library"),
        ({"--library": None}, "--library is missing; see --help"),
        ({"--surplus": "1"}, "invalid option '--surplus'"),
    ],
)
def test_other_libraries_are_one_sentence(binary, exported, arguments, error):
    options = {"--plugin": PLUGIN, "--library": LIBRARY} | arguments
    given = [part for pair in options.items() if pair[1] is not None for part in pair]
    assert_ends_with(error, start(binary, *given, exported))
