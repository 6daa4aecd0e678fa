"""The bench of a user's machine, where there is no GPU."""

import json
import re
import sys

import jax
import pytest
from cases import PLATFORM

from jax_mhc import bench
from jax_mhc._call import library
from jax_mhc._measure import sublayer, times, traffic

SMALL = {"hidden": 32, "tokens": 24, "layers": 1}
cpu = pytest.mark.cpu("its sizes are for the CPU")


@pytest.fixture(autouse=True)
def quick(monkeypatch, default_dtypes):
    monkeypatch.setattr(bench, "_COPY_BYTES", dict.fromkeys(bench._COPY_BYTES, 2**20))


@cpu
def test_what_is_measured(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    told = []
    measured = bench.measure(**SMALL, dtype="float32", constraint="identity", report=told.append)
    assert json.loads(json.dumps(measured)) == measured
    names = ["forward", "forward and backward", "stack of 2, forward and backward"]
    assert [row["what"] for row in measured["rows"]] == names
    for row in measured["rows"]:
        assert row["plain_us"] > 0 and row["fused_us"] > 0
    floors = [row["floor_us"] * measured["copy_gb_per_s"] * 1e3 for row in measured["rows"]]
    u = 32 * 24 * 4
    assert floors == pytest.approx([14 * u, 37 * u, (2 * 25 + 12) * u])
    assert 0 < measured["error"]["streams"] < 2e-5
    assert told[0] == "check of the results" and told[-1] == f"timing: {names[-1]}, fused"

    text = bench.table(measured)
    head, *lines = text[text.index("plain JAX") :].splitlines()
    assert re.split(r"  +", head.strip()) == [
        "plain JAX", "fused", "faster by", "floor", "floor / fused",
    ]  # fmt: skip
    assert [line.split("  ")[0] for line in lines] == names
    path = tmp_path / "bench.svg"
    bench.picture(measured, path)
    drawn = path.read_text()
    assert "<svg" in drawn and len(drawn) > 5000


@cpu
def test_the_command(capsys, monkeypatch):
    seen = {}
    measured = {
        "device": "cpu", "jax": "1", "library_commit": "0", "copy_gb_per_s": 8.0,
        "error": {"streams": 1e-3, "parameters": 1e-6}, "hidden": 8, "tokens": 5, "streams": 2,
        "dtype": "float16", "constraint": "none", "rows": [
            {"what": "forward", "plain_us": 4000.0, "fused_us": 2000.0, "floor_us": 1000.0}
        ],
    }  # fmt: skip

    def measure(**given):
        given.pop("report")("forward")
        seen.update(given)
        return measured

    monkeypatch.setattr(bench, "measure", measure)
    options = "--tokens 5 --hidden 8 --streams 2 --dtype float16 --constraint none --layers 3"
    bench._main(options.split())
    assert seen == {
        "tokens": 5, "hidden": 8, "streams": 2, "dtype": "float16", "constraint": "none",
        "layers": 3,
    }  # fmt: skip
    printed = capsys.readouterr()
    assert re.search(r"\nforward +4 +2 +2\.0 +1 +0\.50\n", printed.out)
    assert printed.err == "forward ...\n"


@pytest.mark.parametrize(
    "options, error",
    [
        ("--hidden 0", "hidden: expected an int from 1 to "),
        ("--tokens 0", "tokens: expected an int from 1 to "),
        ("--streams 17", "streams: expected an int from 1 to 16, got 17"),
        ("--streams 5 --constraint permutations", "streams: expected an int from 1 to 4, got 5"),
        ("--dtype float64", "dtype: expected one of .*, got 'float64'"),
        ("--constraint head", "constraint: expected one of .*, got 'head'"),
        ("--layers 0", "layers: expected an int from 1 to "),
        ("--picture bench.xyz", "--picture: expected a file that ends in .*, got 'bench.xyz'"),
        ("--picture none/bench.svg", "--picture: expected a file in a folder that is there"),
        ("--tokens many", "argument --tokens: invalid int value: 'many'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_sentence(capsys, options, error):
    with pytest.raises(SystemExit) as caught:
        bench._main([*"--tokens 5 --hidden 8".split(), *options.split()])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(error, printed.err.splitlines()[-1]), printed.err


def test_a_picture_without_matplotlib_is_refused_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        bench._main("--tokens 5 --hidden 8 --picture a.svg".split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert "matplotlib: expected an installed package" in last and "jax-mhc[plots]" in last


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setitem(sublayer.LIMITS, "bfloat16", (1e-12, 1.0))
    with pytest.raises(RuntimeError, match="wrong results of the kernels: errors of streams"):
        bench.measure(**SMALL)


def test_a_machine_without_kernels(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda platform: "no library")
    with pytest.raises(RuntimeError, match=f"default device: expected .*, got {PLATFORM}: no lib"):
        bench.measure(**SMALL)


@cpu
def test_what_does_not_fit_into_memory(monkeypatch):
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 10)
    with pytest.raises(ValueError, match=r"tokens: expected sizes that need at most the 0\.0 GB"):
        bench.measure(**SMALL)


def test_the_bytes_of_a_sublayer():
    assert sum(traffic.of_stack(4, 1)) == 37 and sum(traffic.of_head(4)) == 5 + 9
    one, two = (sum(traffic.of_stack(3, sublayers)) for sublayers in (1, 2))
    assert two - one == 5 * 3 + 5


def test_a_stack_in_plain_jax_is_that_of_the_kernels():
    case = sublayer.Case(2, 16, 7, "float32")
    arguments = sublayer.inputs(case)(jax.random.key(0))
    with jax.numpy_rank_promotion("allow"):
        plain, fused = (
            jax.jit(sublayer.program(case, ops, "stack", 3))(*arguments)
            for ops in (case.plain_ops, sublayer.FUSED)
        )
    for got, wanted in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        assert times.relative_error(got, wanted) < 1e-4
