"""docs/cli.md shows every verb, and what it shows is what the commands print."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from quickchange_client.cli import app
from typer.testing import CliRunner

from tools.cli_page import PAGE, Outcome, Step, matches, rewritten, run_page, shell_in, steps_of

ROOT = PAGE.parent.parent
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Outcome]]:
    with shell_in(tmp_path_factory.mktemp("cli-page")) as shell:
        yield list(run_page(TEXT, shell))


def test_what_the_page_shows_is_what_the_commands_print(outcomes: list[Outcome]) -> None:
    wrong = "\n".join(str(each) for each in outcomes if not each.is_right)
    assert wrong == "", f"run: python tools/cli_page.py --write\n{wrong}"
    assert rewritten(TEXT, outcomes) == TEXT


def verbs() -> list[str]:
    """Return every command, also those that the server's distribution adds."""
    own = [str(command.name) for command in app.registered_commands]
    more = [f"keys {command}" for command in ("create", "list", "revoke")] + ["train sweep"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return sorted({*own, *more, *project["entry-points"]["quickchange.commands"]})


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_is_tried_on_the_page(verb: str) -> None:
    assert re.search(rf"^\$ (.*\()?quickchange {verb}( |$)", TEXT, re.MULTILINE), (
        f"docs/cli.md does not show {verb!r}: write the command, then "
        "run: python tools/cli_page.py --write"
    )


@pytest.mark.parametrize("verb", [*verbs(), "base path"])
def test_every_verb_has_help_with_examples(verb: str) -> None:
    env = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = CliRunner(env=env).invoke(app, [*verb.split(), "--help"])
    assert done.exit_code == 0, done.output
    if verb != "base":  # a group: its one command has them
        examples = re.split(r"Examples?:|For example:", done.output, maxsplit=1)
        assert len(examples) == 2, done.output
        assert f"quickchange {verb}" in examples[1]


def test_a_wrong_page_would_be_noticed(tmp_path: Path) -> None:
    steps = steps_of("$ quickchange a \\\n  --b\none 1.25 s\n$ quickchange c\n")
    assert [step.command for step in steps] == ["$ quickchange a \\\n  --b\n", "$ quickchange c\n"]
    assert matches(steps[0].shown, "one   7.5 s\n")
    assert not matches(steps[0].shown, "two 1.25 s\n")
    assert not matches("3 versions\n", "4 versions\n")
    assert matches("a\n…\nz\n", "a\nb\nc\nz\n")
    assert not matches("a\n…\nz\n", "a\nb\nc\n")
    assert not matches("", "more\n")
    page = "```console\n$ quickchange x\nold\n```\n"
    outcome = Outcome(Step("$ quickchange x\n", "old\n"), "new\n")
    assert rewritten(page, [outcome]) == page.replace("old", "new")
