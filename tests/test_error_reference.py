"""docs/api.md lists every status and code that the server can answer with, and no others."""

import ast
from collections.abc import Iterator
from pathlib import Path

from quickchange_server.api.error_shapes import GENERATE
from quickchange_server.api.route_answers import EVERYWHERE, REFUSALS, WITH_KEY
from quickchange_server.errors import CannotStart, QuickchangeError

from tests.documentation import ROOT, code_spans, page, table_rows

SOURCES = (ROOT / "server" / "quickchange_server", ROOT / "adapters" / "quickchange_adapters")
NAMED_THINGS = ("adapter", "version", "alias", "key")
ONLY_TGI_S = {422, 424}


def documented() -> dict[int, set[str]]:
    """Read the table of errors: status -> codes."""
    rows = table_rows(page("docs/api.md").section("## Errors"))
    return {int(status): set(code_spans(text)) for status, text in rows if status.isdigit()}


def refusals() -> set[str]:
    """Read the codes of a refused upload."""
    rows = table_rows(page("docs/adapters.md").section("## What is refused"))
    return {code for row in rows for code in code_spans(row[0])}


def classes(kind: type[QuickchangeError] = QuickchangeError) -> Iterator[type[QuickchangeError]]:
    """Yield the tree of what can be an answer; what other modules add has its parent's status."""
    if not issubclass(kind, CannotStart) and kind.__module__ == QuickchangeError.__module__:
        yield kind
        for child in kind.__subclasses__():
            yield from classes(child)


def literal_codes(source: str) -> Iterator[str]:
    """Yield the codes that a module spells: `code="…"`, `Problem("…", …)`, a failure's first."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            values = [each.value for each in node.keywords if each.arg == "code"]
            if name in ("Problem", "RequestFailure"):
                values += node.args[:1]
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def given() -> set[str]:
    files: list[Path] = [file for folder in SOURCES for file in folder.rglob("*.py")]
    found = {code for file in files for code in literal_codes(file.read_text(encoding="utf-8"))}
    return found | {f"{thing}_not_found" for thing in NAMED_THINGS}


def test_every_class_of_the_tree_stands_at_its_status_with_its_code() -> None:
    rows = documented()
    tree = list(classes())
    assert len(tree) > 15
    for kind in tree:
        assert kind.code in rows[kind.status] | refusals(), kind


def test_every_code_that_is_given_is_listed() -> None:
    listed: set[str] = set().union(*documented().values()) | refusals()
    assert len(given()) > 40
    assert sorted(given() - listed) == []


def test_every_status_that_a_route_may_answer_is_listed() -> None:
    statuses = {*EVERYWHERE, *WITH_KEY, 405, *(s for each in REFUSALS.values() for s in each)}
    assert statuses - ONLY_TGI_S == set(documented())
    text = page("docs/compatibility.md").section("## TGI and LoRAX")
    shown = {GENERATE.status(kind("")) for kind in classes() if kind.__name__ != "ScopeMissing"}
    assert shown >= ONLY_TGI_S
    assert all(str(status) in text for status in ONLY_TGI_S)
