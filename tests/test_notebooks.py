"""Notebooks of examples/ in a kernel of Jupyter, as a reader runs them, with shorter trainings."""

import json

import nbclient
import nbformat
import pytest
from programs import ENVIRONMENT, ROOT

NOTEBOOKS = ROOT / "examples" / "notebooks"

# Warnings of jupyter_client and zmq are theirs.
pytestmark = pytest.mark.filterwarnings("default")


def run(name, parameters, facts, monkeypatch):
    """Cells with other parameters, executed; `facts` is an expression of what to tell, as JSON."""
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += f"\n{parameters}"
    told = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({facts}))")
    notebook.cells.append(told)
    nbclient.NotebookClient(notebook, timeout=600).execute()
    return notebook, json.loads(notebook.cells[-1].outputs[0].text)


def pictures(notebook):
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


def test_a_converted_gpt_starts_where_the_plain_one_is(monkeypatch):
    facts = "dict(difference=difference, first=losses, plain=plain_losses, mhc=mhc_losses)"
    notebook, told = run("convert_a_gpt.ipynb", "STEPS, BLOCKS = 20, 2", facts, monkeypatch)
    assert 0 < told["difference"] < 1e-5
    assert told["first"][-1] < told["first"][0] - 0.5
    # On one batch from the same weights; steps of the warm-up are 0 at first.
    assert told["mhc"][0] == pytest.approx(told["plain"][0], rel=1e-5)
    assert told["mhc"][-1] != told["plain"][-1]
    assert told["mhc"][-1] < told["first"][-1]
    assert pictures(notebook) == 2


def test_the_gain_of_hc_grows_and_that_of_mhc_does_not(monkeypatch):
    facts = (
        "dict(summary=[[*key, float(told['largest gain'])] for key, told in summary.items()],"
        " first={name: float(np.max(gain)) for name, gain in gains(0, slice(None)).items()})"
    )
    parameters = "STEPS, BLOCKS, RATES = 40, 4, (0.01,)"
    notebook, told = run("gain.ipynb", parameters, facts, monkeypatch)
    assert told["first"] == {"mHC": pytest.approx(1, abs=1e-4), "HC": pytest.approx(1, abs=1e-4)}
    largest = {name: gain for name, rate, gain in told["summary"]}
    assert largest["mHC"] < 1.1 < 1.5 < largest["HC"]
    assert pictures(notebook) == 3
