"""Code blocks of the pages: the README, docs/ and the READMEs of the examples."""

import dataclasses
import re

from programs import README, ROOT

PAGES = (
    README,
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
)

_LINE = re.compile(r"^(?:(?P<indent> *)```(?P<language>.*)|#+ (?P<section>.*))$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; `number` counts those of a section."""

    page: str
    section: str
    number: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page}: {self.section}, {self.number}"

    def run(self, **names):
        """Runs it with these names alone; returns them, and those that it defines."""
        names["__name__"] = "__main__"
        exec(compile(self.code, str(self), "exec"), names)
        return names


def blocks(page):
    """The blocks of a page in their order."""
    found, section, lines = [], "", iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if (match := _LINE.match(line)) is None:
            continue
        if match["section"]:
            section = match["section"]
            continue
        end, code = match["indent"] + "```", []
        while (line := next(lines)) != end:
            code.append(line.removeprefix(match["indent"]) + "\n")
        number = sum(block.section == section for block in found)
        name = page.relative_to(ROOT).as_posix()
        found.append(Block(name, section, number, match["language"], "".join(code)))
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def block(page, section, number=0):
    """The block of this place."""
    (found,) = (b for b in ALL if (b.page, b.section, b.number) == (page, section, number))
    return found
