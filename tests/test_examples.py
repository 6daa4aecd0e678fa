"""The examples as a user runs them: from the command line, on a small configuration."""

import csv
import importlib
import json
import math
import re
import runpy
import sys

import jax
import numpy as np
import pytest
from cases import PLATFORM, assert_close
from programs import README, ROOT, run

EXAMPLES = ROOT / "examples"

SMALL = "--depth 2 --width 32 --heads 2 --batch 4 --seq 32 --steps 30".split()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The output, summary and records of one comparison of all connections."""
    out = tmp_path_factory.mktemp("demo")
    status, output = run("examples/train_gpt.py", *SMALL, "--out", out)
    assert status == 0, output
    with open(out / "records.csv", newline="") as file:
        records = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return out, output, json.loads((out / "summary.json").read_text()), records


def test_the_compiled_step_of_hc_and_mhc_holds_the_fused_calls(comparison):
    _, output, summary, _ = comparison
    calls = {r["connection"]: r["num_fused_calls"] for r in summary["results"]}
    # The seams of two sublayers in a loop forward and one backward over the blocks, and a post
    # after the one and before the other. In a GPU's program some appear twice.
    num = 6 if PLATFORM == "cpu" else calls["mhc"]
    assert calls == {"residual": 0, "hc": num, "mhc": num}
    assert num >= 6
    assert output.count(f"fused: {num} custom calls in the compiled step") == 2


def test_all_connections_start_as_the_plain_residual_model(comparison):
    _, _, summary, _ = comparison
    losses = {r["connection"]: r["initial_validation_loss"] for r in summary["results"]}
    for connection in ("hc", "mhc"):
        # Mean of 1024 losses of about 6, computed in float32 in another order.
        assert losses[connection] == pytest.approx(losses["residual"], rel=2e-6)


def test_losses_fall(comparison):
    _, _, summary, records = comparison
    for result in summary["results"]:
        own = [r for r in records if r["connection"] == result["connection"]]
        losses = [float(r["loss"]) for r in own if "loss" in r]
        assert [int(r["step"]) for r in own] == list(range(31))
        assert len(losses) == 30
        assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
        assert result["validation_loss"] < result["initial_validation_loss"] - 0.5
        # A model of the frequencies of single bytes stays above 2.5; below 1 would be a leak.
        assert 1 < result["validation_loss"] < math.log(256)


def test_gains_are_measured(comparison):
    _, _, summary, _ = comparison
    gains = {
        r["connection"]: (r["max_gain_forward"], r["max_gain_backward"]) for r in summary["results"]
    }
    assert gains["residual"] == (1, 1)
    # The rows of h_res sum to 1 to rounding, its columns to what 20 iterations reach.
    assert gains["mhc"] == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-2))
    assert max(gains["hc"]) > 1.01
    for result in summary["results"]:
        for direction in ("forward", "backward"):
            mean, most = (result[f"max_{what}gain_{direction}"] for what in ("mean_", ""))
            assert mean <= most + 1e-6
            assert (most - mean > 1e-3) == (result["connection"] == "hc")


def test_iterations_hold_the_backward_gain(comparison, tmp_path):
    """Without any, two steps take it farther from 1 than 30 do with 20 iterations."""
    options = "--connections mhc --sinkhorn-iters 0 --steps 2".split()
    status, output = run("examples/train_gpt.py", *SMALL[:-2], *options, "--out", tmp_path)
    assert status == 0, output
    (without,) = json.loads((tmp_path / "summary.json").read_text())["results"]
    _, _, summary, _ = comparison
    (held,) = [r for r in summary["results"] if r["connection"] == "mhc"]
    of_without, of_held = (abs(r["max_gain_backward"] - 1) for r in (without, held))
    assert of_without > 1e-3 and of_without > 3 * of_held, (of_without, of_held)


def test_every_step_samples_the_gain(comparison):
    *_, records = comparison
    of_steps = {
        connection: [
            float(r["sampled_gain_forward"])
            for r in records
            if r["connection"] == connection and r["step"] != "0"
        ]
        for connection in ("residual", "hc", "mhc")
    }
    assert of_steps["residual"] == 30 * [1]
    np.testing.assert_allclose(of_steps["mhc"], np.ones(30), atol=1e-5)
    assert of_steps["hc"][0] == pytest.approx(1, abs=1e-5) and max(of_steps["hc"]) > 1.01


def test_table_shows_the_results(comparison):
    out, output, summary, _ = comparison
    for label, key, style in (
        ("parameters", "num_params", ",d"),
        ("fused calls in the step", "num_fused_calls", "d"),
        ("validation loss, final", "validation_loss", ".4f"),
        ("training loss, last 20 steps", "train_loss", ".4f"),
        ("gradient norm, largest", "max_grad_norm", ".3g"),
        ("tokens per second", "tokens_per_s", ",.0f"),
        ("composite gain forward, largest", "max_gain_forward", ".5g"),
        ("composite gain backward, largest", "max_gain_backward", ".5g"),
        ("mean of tokens forward, largest", "max_mean_gain_forward", ".5g"),
        ("mean of tokens backward, largest", "max_mean_gain_backward", ".5g"),
        ("step, ms, median", "step_ms", ".1f"),
    ):
        cells = [format(r[key], style) for r in summary["results"]]
        assert re.search(rf"{label} +{' +'.join(map(re.escape, cells))}\s", output), (label, cells)
    assert str(out / "train_gpt.png") in output


def test_figure_has_curves_in_all_panels(comparison):
    out, *_ = comparison
    from matplotlib.image import imread

    assert (out / "train_gpt.png").stat().st_size < 200_000
    pixels = imread(out / "train_gpt.png")[..., :3]
    for panel in np.array_split(pixels, 3, axis=1):
        for color in (0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2):
            # Within 0.1, because edges of lines are blended with what is beneath them.
            assert (np.abs(panel - np.divide(color, 255)).max(-1) < 0.1).sum() > 400


def test_figure_shows_the_runs_beside_the_plain_residual(comparison, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    report = importlib.import_module("gpt.report")
    *_, records = comparison
    runs = {}
    for record in records:
        name = record["connection"]
        run = runs.setdefault(name, dict(connection=name, seed=0, records=[]))
        run["records"].append({k: float(v) for k, v in record.items() if k != "connection"})
    panels = report.draw_figure(list(runs.values()), report.Settings()).axes
    for panel in panels:
        plain, hc, mhc = panel.lines
        # On top of the others, but dotted and thinner.
        assert plain.zorder > mhc.zorder and plain.get_linewidth() < mhc.get_linewidth()
        assert plain.is_dashed() and not mhc.is_dashed()
        assert "plain residual: " in panel.get_legend().texts[0].get_text()
    gain, norm, loss = ([np.array(line.get_ydata()) for line in panel.lines] for panel in panels)
    np.testing.assert_array_equal(gain[0], 1)
    np.testing.assert_allclose(gain[2], 1, atol=1e-2)
    assert gain[1].max() > 1.01
    np.testing.assert_array_equal(norm[0][1:], 1)
    np.testing.assert_array_equal(loss[0], 0)
    ends = [float(run["records"][-1]["validation_loss"]) for run in runs.values()]
    assert [losses[-1] for losses in loss] == pytest.approx(np.array(ends) - ends[0])

    # Without plain residuals there are the numbers themselves.
    *_, loss = report.draw_figure([runs["mhc"]], report.Settings()).axes
    assert loss.lines[0].get_ydata()[-1] == ends[2]


def test_the_other_connections_start_alike_and_learn(tmp_path):
    options = "--connections residual static identity lite published --steps 8".split()
    options += ["--sample-tokens", "5"]
    status, output = run("examples/train_gpt.py", *SMALL[:-2], *options, "--out", tmp_path)
    assert status == 0, output
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    for result in results:
        first = results[0]["initial_validation_loss"]
        assert result["initial_validation_loss"] == pytest.approx(first, rel=2e-6)
        assert result["validation_loss"] < first - 0.5
        assert (result["num_fused_calls"] > 0) == (result["connection"] != "residual")
        if result["connection"] != "published":  # whose streams mix freely
            assert max(result["max_gain_forward"], result["max_gain_backward"]) < 1 + 1e-2
    for label in ("static mHC", "identity (iHC)", "mHC-lite", "HC as published"):
        assert f"{label}, seed 0" in output


def test_own_text_bfloat16_and_reference(tmp_path):
    for i in range(2):
        text = "to be, or not to be, that is the question. " * (50 + i)
        for name in (f"{i}.txt", f"copy of {i}.txt"):  # of equal files one is enough
            (tmp_path / name).write_text(text)
    (tmp_path / "ignored.bin").write_bytes(b"\0" * 1000)
    out = tmp_path / "out"
    options = "--connections mhc --dtype bfloat16 --implementation reference --streams 2".split()
    options += ["--text", tmp_path, "--out", out]
    status, output = run("examples/train_gpt.py", *SMALL, *options)
    assert status == 0, output
    assert "reference: no custom calls in the compiled step" in output
    assert "2 files" in " ".join(output.split())
    (result,) = json.loads((out / "summary.json").read_text())["results"]
    assert result["num_fused_calls"] == 0
    # The text has few letters, which a model learns first.
    assert result["validation_loss"] < result["initial_validation_loss"] - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--width 100 --heads 3", "--width: expected a multiple of --heads 3, got 100"),
        ("--batch 6 --devices 4", "--batch: expected a multiple of --devices 4, got 6"),
        ("--streams 17", "--streams: expected 1 to 16, got 17"),
        ("--sinkhorn-iters -1", "--sinkhorn-iters: expected 0 to 10000, got -1"),
        ("--steps 0", "--steps: expected at least 1, got 0"),
        ("--learning-rate nan", "--learning-rate: expected a number above 0, got nan"),
        ("--connections hyper", "invalid choice 'hyper' for argument '--connections'"),
        ("--connections mhc mhc", "each once, got mhc mhc"),
        ("--connections lite --streams 8", "--streams: expected 1 to 4, got 8"),
        ("--seeds 1 1", "--seeds: expected some of numbers, each once, got 1 1"),
        ("--preset h100", "invalid choice 'h100' for argument '--preset'"),
        ("--preset h200 --dtype float32", "--attention: cudnn takes --dtype bfloat16"),
        ("--sample-tokens 0", "--sample-tokens: expected at least 1, got 0"),
        ("--minutes 5", "--minutes: expected --checkpoint-every too"),
        ("--checkpoint-every 5 --minutes 0", "--minutes: expected a number above 0, got 0.0"),
        ("--checkpoint-every -5", "--checkpoint-every: expected at least 0, got -5"),
        ("--dtype int8", "invalid choice 'int8' for argument '--dtype'"),
        ("--text no/such/file", "--text: no such file or folder: no/such/file"),
        ("--text {empty}", "--text: no text in"),
        ("--text {short}", "--text: expected more than 64 bytes (--seq) for training, got 9"),
        ("--out {short}", "--out: expected a folder, got the file"),
    ],
)
# Run in this process, which has the imports already; their warnings are not ours.
@pytest.mark.filterwarnings("default")
def test_wrong_options_are_refused_before_any_work(options, message, tmp_path, monkeypatch, capsys):
    empty, short = tmp_path / "empty", tmp_path / "short.txt"
    empty.mkdir()
    short.write_text("too short\n")
    if "--out" not in options:
        options += f" --out {tmp_path / 'out'}"
    command = ["train_gpt.py", *options.format(empty=empty, short=short).split()]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "train_gpt.py"), run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.cpu("a GPU has cuDNN")
def test_the_large_preset_wants_a_gpu():
    status, output = run("examples/train_gpt.py", "--preset", "h200")
    assert status == 2 and "--attention: cudnn needs a GPU, got cpu; xla runs anywhere" in output


def test_all_held_out_windows_are_measured(tmp_path):
    """Also where they are no whole number of batches; one at a time they give the same."""
    options = [*SMALL[:-2], "--steps", 1, "--connections", "residual", "--text", README]
    losses = []
    for batch in (4, 7):
        given = [*options, "--batch", batch, "--validation-windows", 7, "--out", tmp_path]
        status, output = run("examples/train_gpt.py", *given)
        assert status == 0, output
        (result,) = json.loads((tmp_path / "summary.json").read_text())["results"]
        losses.append(result["initial_validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_quickstart():
    status, output = run("examples/quickstart.py")
    assert status == 0, output
    losses = [float(loss) for loss in re.findall(r"step +\d+  loss (\S+)", output)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 3


@pytest.mark.usefixtures("default_dtypes")
@pytest.mark.parametrize("model", ["deepseek_v4", "hy4"])
def test_logits_of_whole_models_are_those_of_transformers(model, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    folder = ROOT / "tests" / "vectors" / f"{model}_tiny"
    example, parts = map(importlib.import_module, (model, "decoder_parts"))
    vectors = np.load(folder / "logits.npz")
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.default_matmul_precision("highest"),
    ):
        loaded = parts.load(folder)
        logits = jax.jit(lambda tokens: example.logits(*loaded, tokens))
        for tokens, expected in zip(vectors["tokens"], vectors["logits"], strict=True):
            # Four layers in float32, of which each picks experts and tokens or windows of them.
            assert_close(logits(tokens.astype(np.int32)), expected, 5e-6)
        parts.run(example.logits, folder, *vectors["tokens"][-1])
    assert f"the likeliest next token is {expected[-1].argmax()}" in capsys.readouterr().out


@pytest.mark.parametrize("setting", [{"n_group": 2}, {"rope_parameters": {"rope_type": "yarn"}}])
def test_settings_that_the_models_do_not_have_are_refused(setting, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example, parts = map(importlib.import_module, ("hy4", "decoder_parts"))
    checkpoint, tensors, config = parts.load(ROOT / "tests" / "vectors" / "hy4_tiny")
    error = pytest.raises(SystemExit, match=r"expected (1|default), got (2|yarn)")
    with error, jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        jax.eval_shape(
            lambda ids: example.logits(checkpoint, tensors, config | setting, ids),
            np.arange(3, dtype=np.int32),
        )


SMALL_PIPELINE = "--steps 2 --hidden 32 --mlp 64 --length 16".split()


@pytest.mark.cpu("it needs a device for each stage")
def test_the_pipeline_trains():
    losses = {}
    for options in ([], ["--no-overlap"], ["--connection", "residual"]):
        status, output = run("examples/pipeline.py", *SMALL_PIPELINE, *options)
        assert status == 0, output
        losses[tuple(options)] = [float(loss) for loss in re.findall(r": loss ([\d.]+)", output)]
        num_calls = int(re.search(r"(\d+) fused calls", output)[1])
        assert (num_calls > 0) == ("residual" not in options)
    # 4 micro-batches of 4 sequences of 16 tokens and 32 channels in bfloat16.
    assert "0.02 MB forward and as much backward" in output
    assert losses[()] == pytest.approx(losses["--no-overlap",], abs=1e-3)


@pytest.mark.cpu("it needs a device for each stage")
def test_the_pipeline_refuses_sizes_that_do_not_fit():
    status, output = run("examples/pipeline.py", "--layers", 5)
    assert status == 1
    assert output == ("pipeline.py: layers: expected a multiple of stages times chunks, 2, got 5\n")


def test_the_dial_shows_that_one_iteration_tames_the_gain(tmp_path):
    options = "--depth", 64, "--samples", 100, "--out", tmp_path
    status, output = run("examples/manifold_dial.py", *options)
    assert status == 0, output
    with open(tmp_path / "manifold_dial.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 64
    deepest = {int(r["sinkhorn_iterations"]): r for r in rows if r["sublayers"] == "64"}
    for direction in ("forward", "backward"):
        gains = {k: float(row[direction]) for k, row in deepest.items()}
        assert 1e15 < gains.pop(0) < 1e17
        assert all(0.99 < gain < 1.5 for gain in gains.values())
    assert (tmp_path / "manifold_dial.png").read_bytes().startswith(b"\x89PNG")


def test_the_diagnostics_warn_of_hc_alone(tmp_path):
    status, output = run("examples/diagnostics.py", "--steps", 11, "--out", tmp_path)
    assert status == 0, output
    found = re.search(
        r"HC: (\d+) warnings in 11 steps. composite gain of HC at step (\d+): ", output
    )
    # At the first step both are plain residual models.
    assert 1 <= int(found[2]) <= 11 - int(found[1])
    assert "mHC: 0 warnings in 11 steps." in output
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")


def logged(*options):
    """Numbers by name of the steps that the training prints, by step."""
    status, output = run("examples/logging_training.py", "--depth", 4, *options)
    assert status == 0, output
    return {
        int(step): {name: float(value) for name, value in re.findall(r"([\w/]+) ([\d.e+-]+)", line)}
        for step, line in re.findall(r"^step (\d+): (.*)$", output, re.MULTILINE)
    }


def test_a_training_logs_its_loss_and_the_mixing():
    numbers = logged("--steps", 41, "--every", 20)
    assert list(numbers) == [0, 20, 40]
    assert numbers[40]["loss"] < numbers[0]["loss"] / 3
    assert len({"loss", *numbers[0]} & set(numbers[40])) == 10
    for own in numbers.values():
        assert own["mhc/composite_gain_forward"] == pytest.approx(1, abs=1e-3)
        assert 0 < own["mhc/entropy"] < math.log(4)


def test_a_training_logs_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    options = "--steps", 5, "--every", 2
    printed = logged(*options)
    assert logged(*options, "--to", "tensorboard", "--out", tmp_path) == {}
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data, numbers = path.read_bytes(), {}
    while data:
        # A record: its length in 8 bytes, a checksum of 4, the event, a checksum of 4.
        length = int.from_bytes(data[:8], "little")
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            numbers.setdefault(event.step, {})[value.tag] = value.simple_value
    assert list(numbers) == [0, 2, 4]
    for step, own in printed.items():
        assert numbers[step] == pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize("library", ["tensorboardX", "wandb"])
def test_a_logging_library_that_is_missing_is_named(library, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(sys.modules, library, None)
    example = importlib.import_module("logging_training")
    to = {"tensorboardX": "tensorboard"}.get(library, library)
    error = f"--to {to}: expected {library}, got none; pip install it"
    with pytest.raises(SystemExit, match=error):
        example.logger(example.Options(to=to))


def test_the_dial_refuses_what_it_cannot_simulate():
    status, output = run("examples/manifold_dial.py", "--iterations", -1)
    assert status == 1 and "expected depth and samples of at least 1" in output
    assert "Traceback" not in output
