"""Hooks of mkdocs.

Links to files beside docs/ lead to the repository, to notebooks to Colab; the site has its address;
nothing is lost as a tag of HTML.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

_GITHUB, _COLAB = "https://github.com/", "https://colab.research.google.com/github/"
_LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]*)")


def on_config(config: Any) -> Any:
    """Returns the configuration with the address of GitHub Pages, which the page for 404 needs."""
    if found := re.fullmatch(r"https://github\.com/([^/]+)/([^/]+)/?", config.repo_url or ""):
        config.site_url = f"https://{found[1].lower()}.github.io/{found[2]}/"
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Returns the page with an address in place of each path that begins with `../`."""
    root = Path(config.docs_dir).parent
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def address(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (root / path).exists():
            raise ValueError(f"{page.file.src_uri}: no file {path} for the link {match[1]}")
        # Without a repository the site is looked at beside the checkout that it was built from.
        if not config.repo_url:
            return (root / path).as_uri()
        repository = config.repo_url.rstrip("/")
        if path.endswith(".ipynb") and repository.startswith(_GITHUB):
            return f"{_COLAB}{repository.removeprefix(_GITHUB)}/blob/main/{path}"
        return f"{repository}/blob/HEAD/{path}"

    return _LINK.sub(address, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Returns the page; a dot product written as <a, b> would be lost, as a tag of that name."""
    if lost := re.search(r"<\w+[,\[(][^>]*>", html):
        raise ValueError(f"{page.file.src_uri}: {lost[0]} becomes a tag of HTML; write ⟨a, b⟩")
    return html
