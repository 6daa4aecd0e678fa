"""Pages of docs/ that are written from the code."""

import copy
import importlib.util
from pathlib import Path

import pytest

from jax_mhc._call import library

PAGE = Path(__file__).parents[1] / "docs" / "calls.md"


@pytest.fixture(scope="module")
def calls():
    """The generator of docs/calls.md."""
    spec = importlib.util.spec_from_file_location("docs_calls", PAGE.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_calls_is_that_of_the_library(calls):
    written = calls.text(library.description())
    assert PAGE.read_text(encoding="utf-8") == written, "run python docs/calls.py"


def test_the_page_of_the_calls_has_all_that_the_library_describes(calls):
    description = copy.deepcopy(library.description())
    before = calls.text(description)
    call = description["calls"][0]
    call["operands"].append(
        {**call["operands"][0], "name": "surplus", "dims": ["n"], "group": "norm"}
    )
    call["attributes"].append({"name": "surplus_mode", "type": "int64", "max": 7})
    after = calls.text(description)
    assert "surplus" not in before
    assert "| `surplus` | `[..., n]` | streams |" in after
    assert "surplus²" in after
    assert "| `surplus_mode` | int64 | 0 to 7 | `pre_fwd` |" in after


def test_values_of_one_name_have_one_shape(calls):
    description = copy.deepcopy(library.description())
    description["calls"][1]["operands"][0]["dims"] = ["n"]
    with pytest.raises(ValueError, match="x: expected one shape in all calls"):
        calls.text(description)
