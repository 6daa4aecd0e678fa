"""Pages of docs/: the one that is written from the code, and the paths that all of them name."""

import copy
import importlib.util
import itertools
import re

import pytest
from programs import README, ROOT

from jax_mhc._call import library

PAGE = ROOT / "docs" / "calls.md"

# Links are rumdl's to check. In backticks stand files and folders, by their path or its end.
PATH = re.compile(r"`([\w./-]+(?:\.(?:cc|cu|cuh|h|json|md|py|rs|toml|ya?ml)|/))`")
FOLDERS = (
    ".ci", ".github", "benches", "docs", "examples", "ffi", "fuzz", "kernels", "python", "recipe",
    "tests", "xla_plugin",
)  # fmt: skip
# What tools write, and what users do.
OTHERS = {"demo/", "dist/fuzz/", "summary.json", "values.json"}


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
    assert "surplus³" in after
    assert "| `surplus_mode` | int64 | 0 to 7 | `pre_fwd` |" in after


def test_values_of_one_name_have_one_shape(calls):
    description = copy.deepcopy(library.description())
    description["calls"][1]["operands"][0]["dims"] = ["n"]
    with pytest.raises(ValueError, match="x: expected one shape in all calls"):
        calls.text(description)


@pytest.fixture(scope="module")
def paths():
    """The files and folders of the repository, and all ends of their paths; folders end in /."""
    trees = ((ROOT / folder).rglob("*") for folder in FOLDERS)
    folders = (ROOT / folder for folder in FOLDERS)
    ends = set()
    for path in itertools.chain(ROOT.glob("*.*"), folders, *trees):
        parts = path.relative_to(ROOT).parts
        last = "/" if path.is_dir() else ""
        ends.update("/".join(parts[at:]) + last for at in range(len(parts)))
    return ends


@pytest.mark.parametrize(
    "page",
    [
        README,
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "examples").rglob("README.md")),
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_paths_that_a_page_names_are_there(page, paths):
    named = set(PATH.findall(page.read_text(encoding="utf-8")))
    missing = sorted(named - OTHERS - paths)
    assert not missing, f"{page.name}: no such files or folders: {missing}"
