"""What mHC adds to a model's step, by formula, beside what was measured."""

import json
import re
import subprocess
import sys

import jax
import pytest
from programs import ROOT

import jax_mhc as mhc
from jax_mhc._call import faster
from jax_mhc.estimate import GPUS, __main__

RECORDS = ROOT / "benches" / "results" / "h200"
SEAMS, AUTO, AUTO_MHC = (
    mhc.Recompute(),
    mhc.Recompute(every="auto"),
    mhc.Recompute(every="auto", policy="mhc"),
)
# A record, its layers, the connection, and what is computed again.
STEPS = [
    ("2026-11-30-train-step", 12, "seams", SEAMS),
    ("2026-11-29-train-step-1024", 12, "seams", SEAMS),
    ("2026-11-29-train-step-768", 12, "seams", SEAMS),
    ("2026-11-29-loop-4096", 4, "mhc-streams-loop", SEAMS),
    ("2026-11-29-recompute", 12, "seams-auto", AUTO),
    ("2026-11-29-recompute", 12, "seams-auto-mhc", AUTO_MHC),
    ("2026-11-29-recompute", 48, "seams", SEAMS),
    ("2026-11-29-recompute", 48, "seams-auto", AUTO),
    ("2026-11-29-recompute", 48, "seams-auto-mhc", AUTO_MHC),
]


def row_of(name, layers, connection):
    """The rows of a connection, and the sizes of its model."""
    record = json.loads((RECORDS / f"{name}.json").read_text())
    (row,) = (
        row for row in record["rows"] if (row["layers"], row["connection"]) == (layers, connection)
    )
    model = record["model"]
    sizes = {"hidden": model["hidden"], "tokens": model["batch"] * model["length"]}
    return row, sizes | {"layers": layers}


@pytest.mark.parametrize("name, layers, connection, recompute", STEPS)
def test_the_time_is_that_of_the_kernels_in_a_training_step(name, layers, connection, recompute):
    row, sizes = row_of(name, layers, connection)
    kernels = (k["us"] for n, k in row["kernels"].items() if n.startswith("mhc_"))
    ms = mhc.estimate(**sizes, recompute=recompute).ms
    assert ms == pytest.approx(sum(kernels) / 1e3, rel=0.2)


@pytest.mark.parametrize(
    "name, layers, less, more, recompute",
    [
        ("2026-11-29-loop", 12, "residual-loop", "seams-loop", SEAMS),
        ("2026-11-29-loop-4096", 4, "residual-loop", "mhc-streams-loop", SEAMS),
        ("2026-11-29-loop-8192", 2, "residual-loop", "mhc-streams-loop", SEAMS),
        ("2026-11-29-recompute", 12, "seams-auto", "seams", AUTO),
        ("2026-11-29-recompute", 48, "seams-auto", "seams", AUTO),
        ("2026-11-29-recompute", 48, "seams-auto-mhc", "seams", AUTO_MHC),
    ],
)
def test_the_memory_is_what_a_step_needs_more(name, layers, less, more, recompute):
    """The temporary memory of a step beyond that of plain residuals, or with recomputation."""
    (low, sizes), (high, _) = (row_of(name, layers, connection) for connection in (less, more))
    expected = high["memory"]["temp_bytes"] - low["memory"]["temp_bytes"]
    got = mhc.estimate(**sizes).memory_bytes
    if recompute != SEAMS:
        got -= mhc.estimate(**sizes, recompute=recompute).memory_bytes
    assert got == pytest.approx(expected, rel=0.2)


STACKS = [
    (4, 768, "bfloat16", "birkhoff"),
    (4, 2048, "bfloat16", "birkhoff"),
    (4, 4096, "bfloat16", "birkhoff"),
    (4, 7168, "bfloat16", "birkhoff"),
    (4, 2048, "float32", "birkhoff"),
    (4, 4096, "bfloat16", "identity"),
    (8, 2048, "bfloat16", "birkhoff"),
]


@pytest.mark.parametrize("streams, hidden, dtype, constraint", STACKS)
def test_a_stack_that_is_left_out_of_the_table(monkeypatch, streams, hidden, dtype, constraint):
    """Its measured time is right, to 25 %, by its neighbours in the table."""
    key = streams, hidden, dtype, constraint, False
    rows = faster.measured()
    (own,) = (row for row in rows if _key(row) == key and row.configuration.tokens > 32)
    monkeypatch.setattr(faster, "measured", lambda: tuple(row for row in rows if row is not own))
    found = mhc.estimate(
        hidden=hidden, layers=2, tokens=own.configuration.tokens, streams=streams, dtype=dtype,
        constraint=constraint, bandwidth=faster.description()["copy_gb_per_s"],
    )  # fmt: skip
    assert found.ms * 1e3 == pytest.approx(own.stack_us, rel=0.25)


def _key(row):
    c = row.configuration
    return c.streams, c.hidden, c.dtype, c.constraint, c.norm


def test_the_bytes_of_a_chain():
    found = mhc.estimate(hidden=128, layers=3, tokens=1000)
    assert found.u_bytes == 2 * 128 * 1000 and found.sublayers == 6
    assert found.moved_bytes == (25 * 6 + 12) * found.u_bytes
    assert found.memory_bytes == (5 * 6 + 6) * found.u_bytes
    params = mhc.init_params(jax.random.key(0), streams=4, hidden=128)
    assert found.parameters == 6 * sum(
        leaf.size for leaf in (params.phi, params.alpha, params.bias)
    )
    wide = mhc.estimate(hidden=128, layers=3, tokens=1000, dtype="float32")
    assert wide.moved_bytes == 2 * found.moved_bytes
    static = mhc.estimate(hidden=128, layers=3, tokens=1000, constraint="static")
    assert static.parameters == 6 * 24
    parallel = mhc.estimate(hidden=128, layers=3, tokens=1000, sublayers_per_layer=1)
    assert parallel.sublayers == 3


def test_gpus():
    def ms(**options):
        return mhc.estimate(hidden=2048, layers=12, tokens=8192, **options).ms

    assert ms(gpu="h100 sxm") == pytest.approx(ms() * 4800 / 3350)
    assert ms(bandwidth=4250 / 2) == pytest.approx(2 * ms(), rel=1e-3)
    # Kernels that read the streams twice: 59 u and not 25.
    of_a100, of_h200 = (GPUS[name].gb_per_s for name in ("A100 80GB SXM", "H200"))
    assert ms(gpu="A100 80GB SXM") * of_a100 > 1.8 * ms() * of_h200
    static = {"constraint": "static"}
    assert ms(gpu="A100 80GB SXM", **static) * of_a100 == pytest.approx(ms(**static) * of_h200)
    for gpu in GPUS.values():
        assert re.match(r"https://(www|images)\.nvidia\.com/", gpu.source)


def test_the_command(capsys):
    given = "--hidden 2048 --layers 12 --tokens 8192 --gpu l4 --every auto --policy mhc".split()
    __main__._main(given)
    printed = capsys.readouterr().out
    recompute = mhc.Recompute(every="auto", policy="mhc")
    found = mhc.estimate(hidden=2048, layers=12, tokens=8192, gpu="L4", recompute=recompute)
    assert printed == f"{found}\n"
    assert re.search(r"\nmemory += \(n L / 4 \+ \(n \+ 2\) 4\) u = [\d.]+ GB", printed)
    __main__._main([*given, "--json"])
    assert json.loads(capsys.readouterr().out)["ms"] == found.ms


def test_the_command_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "jax_mhc.estimate"]
    done = subprocess.run([*command, "--hidden", "64"], capture_output=True, text=True)
    assert done.returncode == 2 and "required: --layers, --tokens" in done.stderr


@pytest.mark.parametrize(
    "options, error",
    [
        ("--hidden 0", "hidden: expected an int from 1 to "),
        ("--layers 0", "layers: expected an int of at least 1, got 0"),
        ("--tokens -1", "tokens: expected an int of at least 1, got -1"),
        ("--streams 17", "streams: expected an int from 1 to 16, got 17"),
        ("--streams 5 --constraint permutations", "streams: .* from 1 to 4, got 5"),
        ("--dtype float64", "dtype: .*, got 'float64'"),
        ("--constraint head", "constraint: .*, got 'head'"),
        ("--gpu V100", "gpu: expected one of H200, .*, got 'V100'"),
        ("--bandwidth 0", "bandwidth: expected a finite number above 0, got 0"),
        ("--every 5", "recompute.every: expected one of 1, 2, 4, 6, 8, 12, 24, got 5"),
        ("--every some", "every: expected an int, got 'some'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_error(capsys, options, error):
    with pytest.raises(SystemExit) as caught:
        __main__._main([*"--hidden 64 --layers 12 --tokens 8192".split(), *options.split()])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(error, printed.err.splitlines()[-1]), printed.err


def test_what_cannot_be_estimated():
    sizes = {"hidden": 64, "layers": 2, "tokens": 8}
    with pytest.raises(TypeError, match=r"recompute: expected jax_mhc.Recompute, got 2 \(int\)"):
        mhc.estimate(**sizes, recompute=2)
    policy = mhc.Recompute(every=2, policy=lambda *avals, **options: True)
    with pytest.raises(ValueError, match=r"recompute.policy: expected 'streams' or 'mhc'"):
        mhc.estimate(**sizes, recompute=policy)
