"""Trainings that end in their middle, however they do: they go on to the same losses."""

import csv
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from programs import ENVIRONMENT, README, ROOT, run

sys.path.append(str(ROOT / "examples"))

from gpt import training  # noqa: E402 - in the folder that the line above adds
from gpt.checkpoints import Checkpoints  # noqa: E402 - likewise
from gpt.files import replacing  # noqa: E402 - likewise
from gpt.settings import Settings  # noqa: E402 - likewise

# ---- trainings from the command line ------------------------------------------------------------

TRAIN = "examples/train_gpt.py"
NUM_STEPS = 16
OPTIONS = (
    f"--connections mhc --depth 1 --width 16 --heads 1 --batch 8 --seq 8 --steps {NUM_STEPS} "
    f"--validation-windows 2 --text {README}"
).split()
# A step takes about as long as a save, so that one is under way nearly all the time.
SAVING = [*OPTIONS, "--checkpoint-every", "1"]


def records(out):
    """Rows that each step wrote, without its time."""
    with open(out / "records.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "step_ms"} for row in csv.DictReader(file)]


@pytest.fixture(autouse=True)
def implicit_promotion():
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    status, output = run(TRAIN, *OPTIONS, "--out", out)
    assert status == 0, output
    told = records(out)
    assert [int(record["step"]) for record in told] == list(range(NUM_STEPS + 1))
    return told


def kill_in_a_save(out, seconds):
    """Kill a run some time after it began to save; whether in a save, or None if it had ended."""
    folder = out / "checkpoints" / "mhc-0"

    def saves():
        return set(os.listdir(folder)) if folder.exists() else set()

    options = [*SAVING, "--resume", "--out", out]
    before = saves()
    process = subprocess.Popen(
        [sys.executable, ROOT / TRAIN, *options], env=os.environ | ENVIRONMENT, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None and not saves() - before:
            time.sleep(1e-3)
        time.sleep(seconds)
    finally:
        process.kill()
    if process.wait() != -signal.SIGKILL:
        return None
    # A save writes into a folder of another name, and removes the checkpoint before it at its end.
    return len(saves()) > 1 or not all(name.isdecimal() for name in saves())


# Twice in `make test`; `make kills` for more.
def test_killed_runs_lose_nothing(whole, tmp_path, request):
    """At random moments, most of them in saves; resumed, the run equals one run to the bit."""
    rng = random.Random(17)
    in_saves, lost, rounds = [], 0, 0
    while len(in_saves) < request.config.getoption("--kills"):
        out, rounds = tmp_path / str(rounds), rounds + 1
        for _ in range(min(3, request.config.getoption("--kills") - len(in_saves))):
            # Of few kills the first is at once: a fast disk has saved within any time to wait.
            seconds = rng.uniform(0, 0.2) if in_saves else 0
            if (in_save := kill_in_a_save(out, seconds)) is not None:
                in_saves.append(in_save)
        status, output = run(TRAIN, *SAVING, "--resume", "--out", out)
        assert status == 0, output
        got = records(out)
        lost += sum(a != b for a, b in zip(got, whole, strict=True))
        left = os.listdir(out / "checkpoints" / "mhc-0")
        assert left == [str(NUM_STEPS)]
    print(f"\n{len(in_saves)} kills, {sum(in_saves)} in a save, {rounds} runs, {lost} records lost")
    assert lost == 0
    assert any(in_saves)


def test_a_run_goes_on_to_the_same_losses(whole, tmp_path):
    """After --minutes, which ends it at a checkpoint."""
    options = [*OPTIONS, "--checkpoint-every", "4", "--out", tmp_path]
    status, output = run(TRAIN, *options, "--minutes", 1e-6)
    assert status == 0 and "The same command with --resume goes on" in output
    assert not (tmp_path / "records.csv").exists()
    status, output = run(TRAIN, *options, "--resume")
    assert status == 0 and "goes on after step 4" in output, output
    assert records(tmp_path) == whole
    # As after a kill between the last checkpoint and the report.
    (tmp_path / "records.csv").unlink()
    status, output = run(TRAIN, *options, "--resume")
    assert status == 0 and "finished before" in output and "compiled in" not in output
    assert records(tmp_path) == whole


@pytest.mark.cpu("its devices are simulated")
def test_a_run_goes_on_on_another_number_of_devices(whole, tmp_path):
    """Losses are those of one device: fully sharded over eight, killed, and resumed on four."""
    options = [*SAVING, "--out", tmp_path]
    process = subprocess.Popen(
        [sys.executable, ROOT / TRAIN, *options, "--devices", "8"],
        env=os.environ | ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    folder = tmp_path / "checkpoints" / "mhc-0"
    try:
        while process.poll() is None and not [p for p in folder.glob("*") if p.name.isdecimal()]:
            time.sleep(1e-3)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    status, output = run(TRAIN, *options, "--devices", "4", "--resume")
    assert status == 0 and "goes on after step" in output, output
    num, num_on_each = (
        int(re.search(rf"([\d,]+) {what}", output)[1].replace(",", ""))
        for what in ("parameters", "of them on each of 4 devices")
    )
    assert num / 4 <= num_on_each < num / 2
    for got, expected in zip(records(tmp_path), whole, strict=True):
        assert got.keys() == expected.keys() and got["step"] == expected["step"]
        for name in ("loss", "validation_loss"):
            if expected[name]:
                assert float(got[name]) == pytest.approx(float(expected[name]), rel=1e-5)


# ---- checkpoints --------------------------------------------------------------------------------

# Orbax's threads; their warnings are not ours.
orbax = pytest.mark.filterwarnings("default")


class Run:
    """A model in training as checkpoints see it: small, and compiled within a second."""

    def __init__(self, num_in=2, num_out=3, bias=True):
        self.settings, self.facts = Settings(), {}
        self.model = nnx.Linear(num_in, num_out, use_bias=bias, rngs=nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(0.1), wrt=nnx.Param)
        self.records = [{"step": 0}]

    def step(self):
        _update(self.model, self.optimizer)
        self.records.append({"step": len(self.records)})

    def arrays(self):
        state = nnx.to_pure_dict(nnx.state((self.model, self.optimizer)))
        return jax.tree.map(np.array, state)


@nnx.jit(donate_argnames=("model", "optimizer"))
def _update(model, optimizer):
    def loss(model):
        return (model(np.ones(2, np.float32)) ** 2).sum()

    optimizer.update(model, nnx.grad(loss)(model))


@orbax
def test_a_checkpoint_is_of_one_moment(tmp_path, monkeypatch):
    """Nothing is written here before the run has gone on."""
    went_on, dumps = threading.Event(), json.dumps

    def dumps_later(value, *args, **options):
        if isinstance(value, dict) and "records" in value:
            assert went_on.wait(60)
        return dumps(value, *args, **options)

    monkeypatch.setattr(json, "dumps", dumps_later)
    run, checkpoints = Run(), Checkpoints(tmp_path)
    run.step()
    expected, told = run.arrays(), list(run.records)
    checkpoints.save(1, run)
    for _ in range(3):
        run.step()
    went_on.set()
    checkpoints.close()

    checkpoints, restored = Checkpoints(tmp_path), Run()
    assert checkpoints.load(run.settings)["records"] == told
    checkpoints.restore(restored)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored.arrays(), expected)
    assert restored.optimizer.step[...] == 1


def saved(folder, step, num_records, num_updates):
    """A checkpoint of a run, whether its parts fit or not, and opened again."""
    run, checkpoints = Run(), Checkpoints(folder)
    for _ in range(num_updates):
        run.step()
    run.records = [{"step": i} for i in range(num_records)]
    checkpoints.save(step, run)
    checkpoints.close()
    return Checkpoints(folder)


def refusal(capsys, function, *args):
    """The error that ends the program."""
    with pytest.raises(SystemExit) as ended:
        function(*args)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@orbax
def test_a_run_is_not_lost_by_mistake(tmp_path, capsys):
    settings = Settings(out=tmp_path, checkpoint_every=1)
    folder = tmp_path / "checkpoints" / "mhc-0"
    checkpoints = saved(folder, step=1, num_records=2, num_updates=1)
    error = refusal(capsys, training.train, "mhc", 0, settings, None, None, 0.0)
    assert f"--out: {folder} holds a run; add --resume to go on, or choose another" in error
    other = dataclasses.replace(settings, resume=True, seq=16)
    error = refusal(capsys, checkpoints.load, other)
    assert f"--out: {tmp_path} has a run with --seq 64, here it is 16; choose another" in error
    checkpoints.close()


@orbax
@pytest.mark.parametrize(
    ("num_records", "got"), [(4, "4, of the steps 0 to 3"), (2, "2, of the steps"), (0, "none")]
)
def test_records_of_another_step_are_refused(num_records, got, tmp_path, capsys):
    checkpoints = saved(tmp_path, step=2, num_records=num_records, num_updates=2)
    error = refusal(capsys, checkpoints.load, Settings())
    assert f"--out: {tmp_path}: expected records of the steps 0 to 2, got {got}" in error
    assert "remove the folder to begin that run anew" in error
    checkpoints.close()


@orbax
def test_arrays_of_another_step_are_refused(tmp_path, capsys):
    checkpoints = saved(tmp_path, step=2, num_records=3, num_updates=1)
    checkpoints.load(Settings())
    error = refusal(capsys, checkpoints.restore, Run())
    assert f"--out: {tmp_path}: expected arrays of step 2, got those of step 1" in error
    checkpoints.close()


@orbax
@pytest.mark.parametrize(
    ("features", "message"),
    [
        ((2, 4), "expected model.bias float32[4], got float32[3]"),
        ((2, 3, False), "expected model.bias none, got float32[3]"),
    ],
)
def test_arrays_of_another_model_are_refused(features, message, tmp_path, capsys):
    """Checkpoints of a version whose parameters have other shapes."""
    checkpoints = saved(tmp_path, step=1, num_records=2, num_updates=1)
    error = refusal(capsys, checkpoints.restore, Run(*features))
    assert f"--out: {tmp_path}: {message}; remove the folder to begin that run anew" in error
    checkpoints.close()


@orbax
@pytest.mark.parametrize("part", ["told", "state"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_checkpoints_are_refused(part, damage, tmp_path, capsys):
    """As a file system leaves them that lost power, or someone's hand."""
    checkpoints = saved(tmp_path, step=1, num_records=2, num_updates=1)
    for path in [p for p in (tmp_path / "1" / part).rglob("*") if p.is_file()]:
        path.unlink() if damage == "missing" else os.truncate(path, path.stat().st_size // 2)
    restore = {"told": (checkpoints.load, Settings()), "state": (checkpoints.restore, Run())}
    error = refusal(capsys, *restore[part])
    assert f"--out: {tmp_path}: expected a whole checkpoint of step 1, got" in error
    checkpoints.close()


@orbax
def test_a_save_that_was_cut_off_leaves_the_one_before(tmp_path):
    checkpoints = saved(tmp_path, step=1, num_records=2, num_updates=1)
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "told").mkdir(parents=True)
    # A removal that was cut off, too: of what is older than the newest.
    (tmp_path / "0" / "told").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.step == 1
    run = types.SimpleNamespace(**vars(Run()), step=None)
    run.records = checkpoints.load(Settings())["records"]
    checkpoints.restore(run)
    checkpoints.save(2, run)
    checkpoints.close()
    assert os.listdir(tmp_path) == ["2"]


@orbax
def test_one_process_has_the_folder(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    error = refusal(capsys, Checkpoints, tmp_path)
    assert f"--out: {tmp_path} is in use by another process" in error
    checkpoints.close()
    Checkpoints(tmp_path).close()


# ---- files --------------------------------------------------------------------------------------


def test_files_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["summary.json"]
