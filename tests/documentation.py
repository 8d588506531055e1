"""The project's pages as tests see them: blocks, code spans, links, tables. Knows no server."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

_FENCE = re.compile(r"(<!--[^>]*-->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_TEST = re.compile(r"[\w/]+\.py::test_\w+")


@dataclass(frozen=True)
class Block:
    """A fenced block; `comment` is what stands on the line before it, if that is a comment."""

    language: str
    text: str
    comment: str

    @property
    def is_run(self) -> bool:
        return "not run:" not in self.comment


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The text without its fenced blocks."""
        return _FENCE.sub("", self.text)

    def blocks(self, *languages: str) -> list[Block]:
        found = [Block(kind, text, note) for note, kind, text in _FENCE.findall(self.text)]
        return [block for block in found if block.language in languages]

    def spans(self) -> list[str]:
        """What stands between backticks in the prose."""
        return _SPAN.findall(self.prose)

    def code_lines(self) -> list[str]:
        """Code spans, and the lines of shell blocks with continued ones joined."""
        shell = [
            block.text.replace("\\\n", " ") for block in self.blocks("bash", "console", "text")
        ]
        return [*self.spans(), *(line.strip() for text in shell for line in text.splitlines())]

    def links(self) -> list[str]:
        """Links to other files and places of the project."""
        return [link for link in _LINK.findall(self.prose) if "://" not in link]

    def anchors(self) -> set[str]:
        """Return the names that headings have as link targets."""
        titles = (heading.lower().replace("`", "") for heading in _HEADING.findall(self.prose))
        return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}

    def section(self, heading: str) -> str:
        """Return the text below a heading, up to the next one of its kind."""
        level = heading.partition(" ")[0]
        _, _, rest = self.text.partition(f"{heading}\n")
        assert rest, f"{self.name} has no {heading!r}"
        return rest.partition(f"\n{level} ")[0]

    def tests(self) -> set[str]:
        """Return the tests that the page names, such as `server/test_x.py::test_y`."""
        return set(_TEST.findall(self.prose))


def pages() -> list[Page]:
    """Return every page that belongs to the project's documentation."""
    patterns = (
        "*.md",
        "docs/**/*.md",
        "clients/python/*.md",
        "adapters/examples/**/*.md",
        "examples/*.md",
    )
    return [Page(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def page(name: str) -> Page:
    return Page(ROOT / name)


def table_rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of all table rows, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if not below.startswith("|--") and not line.startswith("|--"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            yield [cell.strip() for cell in cells]


def code_spans(text: str) -> list[str]:
    return _SPAN.findall(text)


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the names of the test functions in a file under tests/; none if there is no file."""
    path = ROOT / "tests" / file
    if not path.is_file():
        return frozenset()
    functions = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in functions if isinstance(node, kinds))
