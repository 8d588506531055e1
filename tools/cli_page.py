"""Run the commands of docs/cli.md and compare what they print: `python tools/cli_page.py`.

With `--write` the page gets what the commands print now. A test does the comparison, so the page
cannot fall behind.

In the page's `console` blocks a line that begins with `$ ` is a command, and what follows is what
it prints, on both of its streams. A line that is only `…` stands for any lines. Fractions, large
numbers, times, digests and keys are compared by their place, not by their digits. Besides
`quickchange` there are `cat FILE`, `echo $?` and `export NAME=$(quickchange …)`.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

from quickchange_client.cli import app
from typer.testing import CliRunner, Result

from tests.clients.cli_world import hub_of, make_world
from tests.clients.real_server import COMMAND, free_port, stop, wait_until_healthy

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
PROMPT = "$ "
ANYTHING = "…"
WIDTH = "110"
LAST_WORDS = "Stop with Ctrl-C"
SAID_TIMEOUT_S = 20.0
FOREIGN: dict[str, str | None] = dict.fromkeys(
    name for name in os.environ if name.startswith("QUICKCHANGE_")
)
"""Variables that would change what the commands do; they are unset for them."""
_BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
_EXPORT = re.compile(r"export (\w+)=\$\((.*)\)")
_SECRET = re.compile(r"(qc-[0-9a-f]{16})-[\w-]+")
_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{12,}")
_MASKS = (
    (re.compile(r"qc-[0-9a-f]{16}-[\w…-]+"), "qc-#"),
    (_ID, "#"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "#"),
    (re.compile(r"^probe .*"), "probe #"),  # left out where it would take longer than a second
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:#"),
    (re.compile(r"\d+(?:\.\d+)+(e[-+]?\d+|\+\w+)?|\d[\d,]{3,}"), "#"),
    (re.compile(r"\b\d+ ([KMG]iB|B|s)\b|# ([KMG]iB|B|s)\b"), "#"),
    (re.compile(r"[ \t─]+"), " "),
)


@dataclass(frozen=True)
class Step:
    """A command of the page, and what the page says that it prints."""

    command: str
    shown: str


@dataclass(frozen=True)
class Outcome:
    """A step, and what the command really printed."""

    step: Step
    printed: str

    def __str__(self) -> str:
        return f"{self.step.command}--- the page\n{self.step.shown}--- printed\n{self.printed}"

    @property
    def is_right(self) -> bool:
        """Whether the page is right about it."""
        return matches(self.step.shown, self.printed)


def steps_of(block: str) -> list[Step]:
    """Return the commands of a block, continued lines joined for reading only."""
    parts = re.split(r"^(?=\$ )", block, flags=re.MULTILINE)
    steps = []
    for part in filter(None, parts):
        lines = part.splitlines(keepends=True)
        end = next(i for i, line in enumerate(lines) if not line.rstrip().endswith("\\")) + 1
        steps.append(Step("".join(lines[:end]), "".join(lines[end:])))
    return steps


def matches(shown: str, printed: str) -> bool:
    """Whether two texts are equal where they must be."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == ANYTHING else re.escape(masked(line)) + r"\n"
        for line in shown.splitlines()
    )
    found = "".join(f"{masked(line)}\n" for line in printed.splitlines())
    return re.fullmatch(pattern, found) is not None


def masked(line: str) -> str:
    """Return a line without what differs from run to run and from machine to machine."""
    for pattern, mask in _MASKS:
        line = pattern.sub(mask, line)
    return line.strip()


@dataclass
class Shell:
    """Runs the page's commands in a folder, one after the other."""

    folder: Path
    env: dict[str, str]
    servers: ExitStack
    exit_code: int = 0

    def run(self, command: str) -> str:
        """Return what a command prints, on both of its streams."""
        text = command.removeprefix(PROMPT).replace("\\\n", " ").strip()
        if text == "echo $?":
            return f"{self.exit_code}\n"
        if export := _EXPORT.fullmatch(text):
            printed = self._invoke(shlex.split(export[2])[1:])
            self.env[export[1]] = printed.stdout.strip()
            return printed.stderr
        if text.startswith("cat "):
            return (self.folder / text.removeprefix("cat ")).read_text()
        return self._quickchange(text)

    def _quickchange(self, text: str) -> str:
        program, *words = shlex.split(text)
        assert program == "quickchange", f"the page may not use {program!r}"
        if words[0] == "serve" and "--help" not in words:
            return self._serve(words)
        return self._invoke(words).output

    def _invoke(self, words: Sequence[str]) -> Result:
        with chdir(self.folder):
            result = CliRunner(env=FOREIGN | self.env).invoke(app, list(words))
        self.exit_code = result.exit_code
        assert result.exception is None or isinstance(result.exception, SystemExit), words
        return result

    def _serve(self, words: Sequence[str]) -> str:
        """Start a server beside the shell; return what it prints until it is ready."""
        port = free_port()
        log = self.folder / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [COMMAND, *words, "--port", str(port)],
                cwd=self.folder,
                env=self.env | {"OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.servers.callback(stop, process)
        self.env["QUICKCHANGE_URL"] = f"http://127.0.0.1:{port}"
        wait_until_healthy(self.env["QUICKCHANGE_URL"], process, log)
        deadline_s = time.monotonic() + SAID_TIMEOUT_S
        while (said := log.read_text()).count(LAST_WORDS) == 0 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return said


def run_page(text: str, shell: Shell) -> Iterator[Outcome]:
    """Run all commands of a page in their order.

    Where a command names an id that the page has shown before, it gets the id that was printed
    there instead.
    """
    ids: dict[str, str] = {}
    for block in _BLOCK.findall(text):
        for step in steps_of(block):
            command = _ID.sub(lambda match: ids.get(match[0], match[0]), step.command)
            outcome = Outcome(step, shell.run(command))
            yield outcome
            ids.update(zip(_ID.findall(step.shown), _ID.findall(outcome.printed), strict=False))


@contextmanager
def shell_in(folder: Path) -> Iterator[Shell]:
    """Give a shell in a new world."""
    make_world(folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb", "TZ": "UTC"}
    with ExitStack() as servers, hub_of(folder / "my-adapter") as hub:
        inherited = {name: text for name, text in os.environ.items() if name not in FOREIGN}
        variables = inherited | env | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "1"}
        yield Shell(folder, variables, servers)


def rewritten(text: str, outcomes: Sequence[Outcome]) -> str:
    """Return the page with what the commands printed, where it was wrong about that."""
    left = list(outcomes)

    def rewrite(block: re.Match[str]) -> str:
        done = [left.pop(0) for _ in steps_of(block[0])]
        return "".join(each.step.command + _shown(each) for each in done)

    return _BLOCK.sub(rewrite, text)


def _shown(outcome: Outcome) -> str:
    if outcome.is_right:
        return outcome.step.shown
    printed = _SECRET.sub(r"\1-…", outcome.printed)
    return "".join(f"{line.rstrip()}\n" for line in printed.splitlines())


def main() -> None:
    """Check or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put what is printed into the page")
    is_write = parser.parse_args().write
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, shell_in(Path(folder)) as shell:
        outcomes = list(run_page(text, shell))
    if is_write:
        PAGE.write_text(rewritten(text, outcomes), encoding="utf-8")
    wrong = [each for each in outcomes if not each.is_right]
    for each in wrong:
        print(each)
    sys.exit(1 if wrong and not is_write else 0)


if __name__ == "__main__":
    main()
