"""The benchmarks that `make bench-gpu` runs, where there is no GPU."""

import json
import re
import shutil

import numpy as np
import plots
import pytest
from programs import README, ROOT, python, run

from jax_mhc._call import faster


def test_the_programs_are_listed():
    status, output = python("-m", "benches")
    assert status == 0, output
    scripts = {path.stem for path in (ROOT / "benches").glob("*.py")}
    usage, _, *lines = output.splitlines()
    assert "python -m benches <name>" in usage
    assert len(lines) == len({line.split()[0] for line in lines} & scripts) > 0
    assert all(line.endswith(".") for line in lines)


def test_a_program_of_another_name_is_refused():
    status, output = python("-m", "benches", "cpus")
    assert status == 1
    assert output.startswith("benches: name: expected one of cpu, gpu, ")
    assert output.endswith(", got cpus.\n")


def test_the_first_call_says_what_it_prints():
    status, output = run("benches/first_call.py", "--help")
    assert status == 0, output
    assert "usage: first_call.py [-h] platform" in output and "first fused call" in output


@pytest.mark.cpu("its platform is named")
def test_the_first_call_is_timed_by_its_stages():
    status, output = run("benches/first_call.py", "cpu")
    assert status == 0, output
    costs = json.loads(output)
    assert costs.pop("import") > 0
    assert costs.keys() == {"x_plus_1", "pre", "next_shape"}
    for stages in costs.values():
        assert stages.keys() == {"lower", "compile", "first", "again"}
        assert all(milliseconds > 0 for milliseconds in stages.values())


@pytest.mark.cpu("its tiny model is for the CPU")
def test_train_step(tmp_path):
    connections = "residual", "mhc", "seams-checkpoint"
    status, output = run(
        "benches/train_step.py",
        "--tiny",
        "--connections",
        *connections,
        "--commit",
        "0",
        "--output",
        tmp_path,
    )
    assert status == 0, output
    (path,) = tmp_path.rglob("*.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-train-step\.json", path.name)
    rows = json.loads(path.read_text())["rows"]
    assert [row["connection"] for row in rows] == list(connections)
    residual, mhc, seams = (np.array(row["losses"]) for row in rows)
    assert residual[0] == pytest.approx(mhc[0], abs=2e-3)
    assert residual[-1] < residual[0] - 0.1
    np.testing.assert_allclose(mhc, seams, atol=1e-3)
    assert all(row["ms"] > 0 and row["memory"]["peak_bytes"] > 0 for row in rows)
    assert path.with_suffix(".md").read_text() in output


@pytest.mark.cpu("its tiny model is for the CPU")
def test_a_step_of_modules(tmp_path):
    connections = "seams-loop", "nnx-loop", "linen-loop", "equinox-loop"
    options = "--tiny", "--connections", "residual-loop", *connections, "--commit", "0"
    status, output = run("benches/train_step.py", *options, "--output", tmp_path)
    assert status == 0, output
    (path,) = tmp_path.rglob("*.json")
    _, seams, *modules = (np.array(row["losses"]) for row in json.loads(path.read_text())["rows"])
    np.testing.assert_allclose(modules, 3 * [seams], atol=1e-3)


@pytest.mark.cpu("its tiny model is for the CPU")
@pytest.mark.parametrize(
    "name, options",
    [
        ("mesh_step", ("--devices", 4, "--layouts", "tensor 2 x data, tokens split")),
        ("pipeline_step", ("--connections", "mhc", "--chunks", 2)),
        ("recompute", ("--connections", "seams", "seams-auto-mhc")),
        ("diagnostics_step", ("--connections", "seams", "seams-told")),
    ],
)
def test_steps(name, options, tmp_path):
    options = "--tiny", *options, "--commit", "0", "--output", tmp_path
    status, output = python("-m", "benches", name, *options)
    assert status == 0, output
    (path,) = tmp_path.rglob("*.json")
    record = json.loads(path.read_text())
    assert record["commit"] == "0" and all(row["ms"] > 0 for row in record["rows"])
    assert path.with_suffix(".md").read_text() in output


@pytest.mark.cpu("its tiny model is for the CPU")
def test_scaling(tmp_path):
    """The figure and the table of the page come from the record."""
    options = "--tiny", "--scaling", "--devices", 2, "--commit", "0", "--output", tmp_path
    status, output = python("-m", "benches", "mesh_step", *options)
    assert status == 0, output
    (path,) = tmp_path.glob("cpu/*-mesh-scaling-64.json")
    rows = json.loads(path.read_text())["rows"]
    tokens = {(row["devices"], row["is_strong"]): row["tokens"] for row in rows}
    one = tokens[1, False]
    assert tokens == {(1, False): one, (2, False): 2 * one, (2, True): one}
    split = {kind for row in rows if row["devices"] > 1 for kind in row["collectives"]}
    assert {"all-gather", "all-reduce"} <= split

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "sharding.md").write_text("<!-- mesh_scaling -->\n<!-- /mesh_scaling -->\n")
    status, output = run("benches/plots.py", "--results", path.parent, "--docs", docs)
    assert status == 0, output
    assert (docs / "sharding.md").read_text().count("| plain residual ") == 3
    assert (docs / "images" / "mesh_scaling.svg").stat().st_size > 10_000


@pytest.mark.cpu("its tiny model is for the CPU")
def test_a_mesh_that_does_not_divide_is_refused():
    layout = "tensor 2 x data, tokens split"
    options = "--tiny", "--devices", 3, "--layouts", layout
    status, output = python("-m", "benches", "mesh_step", *options)
    assert status == 1
    assert output == f"mesh_step.py: devices: expected a multiple of 2 for {layout}, got 3\n"


@pytest.mark.cpu("its sizes are for the CPU")
def test_configurations(tmp_path):
    options = "--tiny", "--commit", "0", "--output", tmp_path
    status, output = python("-m", "benches", "configurations", *options)
    assert status == 0, output
    (path,) = tmp_path.rglob("*.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-configurations\.json", path.name)
    rows = json.loads(path.read_text())["rows"]
    assert {row["constraint"] for row in rows} == {"birkhoff", "identity", "static", "head"}
    for row in rows:
        assert all(us > 0 for name in ("fused", "plain") for us in row[name].values())
        assert 0 < row["error"]["streams"] < 4e-3 and row["error"]["parameters"] < 5e-3
    assert path.with_suffix(".md").read_text() in output

    # What is chosen is run again, and the other rows are kept.
    again = "--commit", "1", "--add", path, "--dtype", "float32", "--constraint", "identity"
    status, output = python(
        "-m", "benches", "configurations", *options, *again, "--implementations", "fused"
    )
    assert status == 0, output
    record = json.loads(path.read_text())
    (new,) = (row for row in record["rows"] if row["commit"] == "1")
    (old,) = (row for row in rows if row["constraint"] == "identity")
    assert new["constraint"] == "identity" and len(record["rows"]) == len(rows)
    assert new["plain"] == old["plain"] and new["fused"] != old["fused"]
    assert record["commit"] == "0, 1"

    # With wrong kernels, or what is left out, the record is another.
    some = *options, "--dtype", "float32", "--what", "fb", "--implementations", "fused"
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        f"import sys, tyro; sys.path.insert(0, {str(ROOT / 'benches')!r})\n"
        "import configurations as c\n"
        "from jax_mhc._measure import sublayer\n"
        "sublayer.LIMITS['float32'] = 1e-12, 1.0\n"
        "c.main(tyro.cli(c.Options))\n"
    )
    status, output = run(wrong, *some)
    assert status == 1 and output.count("errors of streams and parameters ") == 4, output
    (path,) = tmp_path.rglob("*-configurations-part-wrong.json")
    assert json.loads(path.read_text())["rows"] == []


@pytest.mark.cpu("its sizes are for the CPU")
def test_batches():
    status, output = run("benches/batches.py", "--tiny")
    assert status == 0, output
    assert output.count("calls in plain JAX") == 4


@pytest.mark.cpu("its tiny model is for the CPU")
def test_training(tmp_path):
    """Runs of both kinds, two at once; then the page's figure and table of the record."""
    options = (
        "--tiny --gpus 2 --seeds 0 --connections residual mhc --others lite --commit 0".split()
    )
    folders = "--folder", tmp_path / "runs", "--output", tmp_path
    status, output = run("benches/training.py", *options, *folders)
    assert status == 0, output
    (path,) = tmp_path.glob("cpu/*-training.json")
    record = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() in output
    assert [r["connection"] for r in record["results"]] == ["residual", "mhc", "lite"]
    for own, result in zip(record["runs"], record["results"], strict=True):
        assert [point["step"] for point in own["points"]] == list(range(21))
        assert own["points"][-1]["validation_loss"] == result["validation_loss"]
    assert str(tmp_path) not in path.read_text()

    # On another machine only what is not in that record runs.
    again = "--finished", path, "--folder", tmp_path / "others", "--output", tmp_path
    again += ("--name", "published")
    status, output = run("benches/training.py", *options[:-2], "published", *options[-2:], *again)
    assert status == 0, output
    assert output.count(" s on GPU ") == 1 and "published, seed 0: " in output
    (whole,) = tmp_path.glob("cpu/*-training-published.json")
    merged = json.loads(whole.read_text())
    for what in ("results", "runs"):
        assert merged[what][:3] == record[what] and merged[what][3]["connection"] == "published"
    points = merged["runs"][3]["points"]
    assert points[-1]["validation_loss"] < points[0]["validation_loss"] - 0.5
    other = tmp_path / "other.json"
    other.write_text(json.dumps(merged | {"text": "another"}))
    status, output = run("benches/training.py", *options, "--finished", path, other)
    assert status == 1 and "expected records that agree in text, got " in output

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "results.md").write_text(
        "<!-- training -->\n<!-- /training -->\n"
        "<!-- training_published -->\n<!-- /training_published -->\n"
    )
    status, output = run("benches/plots.py", "--results", path.parent, "--docs", docs)
    assert status == 0, output
    all_runs, with_published = (docs / "results.md").read_text().split("<!-- /training -->")
    assert "| mHC-lite " in all_runs and "| HC as published " not in all_runs
    assert "| HC as published " in with_published
    assert (docs / "images" / "training.svg").stat().st_size > 10_000


def test_the_pages_and_their_figures_come_from_the_records(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    pages = "README.md", "docs/performance.md", "docs/diagnostics.md", "docs/results.md"
    for page in pages:
        shutil.copy(ROOT / page, tmp_path / page)
    # The links in the page are those of its own folder.
    (tmp_path / "benches").symlink_to(ROOT / "benches")
    status, output = run(
        "benches/plots.py", "--results", "benches/results/h200", "--docs", "docs",
        "--faster", "faster.json", cwd=tmp_path,
    )  # fmt: skip
    assert status == 0, output
    assert (tmp_path / "faster.json").read_text() == faster._PATH.read_text()
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    drawn = {path.name for path in (docs / "images").iterdir()}
    assert drawn == {"kernels.svg", "configurations.svg", "train_step.svg", "training.svg"}
    for name in drawn:
        assert (ROOT / "docs" / "images" / name).stat().st_size < 150_000


def test_the_readme_tells_what_the_training_showed():
    path, record = plots.newest(ROOT / "benches" / "results" / "h200", "-training")
    runs = {(r["connection"], r["seed"]): r for r in record["results"]}
    seeds = [seed for connection, seed in runs if connection == "mhc"]
    assert len(seeds) == 3, path

    def of(connection, key):
        return np.array([runs[connection, seed][key] for seed in seeds])

    below = of("residual", "validation_loss") - of("mhc", "validation_loss")
    readme = " ".join(README.read_text().split())
    told = f"{below.mean():.4f} ({below.min():.4f} to {below.max():.4f}) below the plain residual's"
    assert told in readme
    _, newest = plots.newest(path.parent, "-training-published")
    speed = {r["connection"]: r["tokens_per_s"] for r in newest["results"]}
    longer = 100 * (speed["residual"] / speed["mhc"] - 1)
    assert f"at C = 512 the step takes {longer:.0f} % longer than with plain residuals" in readme
    gains = of("mhc", "max_mean_gain_forward"), of("mhc", "max_mean_gain_backward")
    assert np.all(np.array(gains) >= 0.99) and np.all(np.array(gains) < 1.8)
    assert np.all(of("hc", "max_mean_gain_forward") > 2500)
    assert np.all(of("mhc", "num_fused_calls") > 0)
