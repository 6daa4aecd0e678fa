"""Texts of a release, which the workflow makes from a tag."""

import importlib.util

import pytest
from programs import ROOT

_SPEC = importlib.util.spec_from_file_location("release", ROOT / ".github" / "release.py")
release = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(release)

CHANGELOG = """# Changelog

## Unreleased

- Later.

## 1.2.0 - 2026-01-31

The first
line.

### Added

- A thing that
  is long.
- Another.

## 1.1.0 - 2026-01-01

- Earlier.
"""


@pytest.fixture
def sources(monkeypatch, tmp_path):
    (tmp_path / "Cargo.toml").write_text('[workspace.package]\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    return tmp_path


def test_notes_are_the_section_of_the_version(sources):
    said = "The first line.\n\n### Added\n\n- A thing that is long.\n- Another.\n"
    assert release.notes("v1.2.0") == said


@pytest.mark.parametrize("tag", ["v1.2", "1.2.0", "v1.1.0"])
def test_the_tag_is_the_version(sources, tag):
    with pytest.raises(SystemExit) as refusal:
        release.notes(tag)
    assert str(refusal.value) == f"expected the tag v1.2.0, the version in Cargo.toml, got {tag}"


def test_the_version_has_a_date(sources):
    (sources / "CHANGELOG.md").write_text(CHANGELOG.replace("## 1.2.0 - 2026-01-31", "## 1.2.0"))
    with pytest.raises(SystemExit, match="expected a section `## 1.2.0 - <date>` in CHANGELOG"):
        release.notes("v1.2.0")


def test_the_recipe_has_this_release(tmp_path):
    sdist = tmp_path / "jax_mhc-1.2.0.tar.gz"
    sdist.write_bytes(b"")
    recipe = release.recipe("v1.2.0", sdist, "https://github.com/someone/jax-mhc/")
    source = "https://github.com/someone/jax-mhc/releases/download/v${{ version }}/jax_mhc-"
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for line in (
        '  version: "1.2.0"',
        f"  url: {source}${{{{ version }}}}.tar.gz",
        f"  sha256: {empty}",
        "  homepage: https://github.com/someone/jax-mhc",
        "  recipe-maintainers: [someone]",
    ):
        assert line in recipe.splitlines()
