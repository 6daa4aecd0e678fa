"""Texts of a release, for the workflow that publishes it and for whoever wants to see them before.

    python .github/release.py v0.1.0            notes for GitHub, from CHANGELOG.md
    python .github/release.py v0.1.0 --sdist dist/jax_mhc-0.1.0.tar.gz --repository https://…
                                                recipe for conda-forge, from recipe/recipe.yaml

Both refuse a tag that is not the version of the sources, and a version without dated notes.
"""

import argparse
import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def notes(tag):
    """The version's section of the changelog, a line for each paragraph: GitHub keeps line breaks.

    Raises:
        SystemExit: the tag and the sources do not belong together, in one sentence.
    """
    version = re.search(r'^version = "(.*)"$', (ROOT / "Cargo.toml").read_text("utf-8"), re.M)[1]
    if tag != f"v{version}":
        raise SystemExit(f"expected the tag v{version}, the version in Cargo.toml, got {tag}")
    heading = rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)"
    section = re.search(heading, (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M | re.S)
    if section is None:
        raise SystemExit(
            f"expected a section `## {version} - <date>` in CHANGELOG.md, found none: name what is "
            "unreleased after the version"
        )
    return re.sub(r"(?<=\S)\n *(?=[^\s#-])", " ", section[1]).strip() + "\n"


def recipe(tag, sdist, repository):
    """The recipe, with the sdist of this release in it; whoever submits it answers for it."""
    filled = {
        "VERSION": tag.removeprefix("v"),
        "REPOSITORY": repository.rstrip("/"),
        "SHA256": hashlib.sha256(sdist.read_bytes()).hexdigest(),
        "OWNER": repository.rstrip("/").split("/")[-2],
    }
    text = (ROOT / "recipe" / "recipe.yaml").read_text("utf-8")
    return re.sub(rf"\b({'|'.join(filled)})\b", lambda word: filled[word[0]], text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints the notes of a release, or its recipe.")
    parser.add_argument("tag")
    parser.add_argument("--sdist", type=Path)
    parser.add_argument("--repository")
    options = parser.parse_args()
    if (options.sdist is None) != (options.repository is None):
        parser.error("--sdist and --repository go together")
    text = notes(options.tag)
    print(recipe(**vars(options)) if options.sdist else text, end="")
