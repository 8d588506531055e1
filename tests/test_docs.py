"""What the pages say is true: blocks run, links lead somewhere, and whatever is named exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from quickchange_client import Quickchange
from quickchange_client.cli.application import app
from quickchange_server.api.field_policy import (
    BOOKKEEPING,
    NEUTRAL_IN_CHAT,
    NEUTRAL_IN_COMPLETIONS,
)
from quickchange_server.api.schemas import ChatBody, CompletionBody
from quickchange_server.cli import app as server_app
from quickchange_server.config import OPTIONS, load_config
from quickchange_server.vllm_flags import VLLM_FLAGS

from tests.clients.real_server import real_server
from tests.conftest import MakeAdapter
from tests.documentation import ROOT, Block, Page, code_spans, names_in, page, pages, table_rows
from tools.configuration_page import PAGE as CONFIGURATION_PAGE
from tools.configuration_page import render

README = page("README.md")
API = page("docs/api.md")
PAGES = pages()
# Pages with tests of their own, or with commands that run for minutes.
RUN_ELSEWHERE = ("clients/python/", "adapters/examples/", "docs/benchmarks.md", "docs/cli.md")
RUN_HERE = [each for each in PAGES if not each.name.startswith(RUN_ELSEWHERE)]
URL = "http://127.0.0.1:8000"
BASE = "smollm2-135m"
EXAMPLES = ("sentiment", "shakespeare", "product")
METRIC = re.compile(r"quickchange_(?!server\b|client\b|adapters/|adapters\.)\w+")


def test_no_merge_was_left_half_done() -> None:
    marks = re.compile(r"^(<<<<<<<|=======|>>>>>>>)( |$)", re.MULTILINE)
    files = (ROOT / each.name for each in PAGES)
    assert not [file for file in files if marks.search(file.read_text())]


def named(each: Page) -> str:
    return each.name


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, make_adapter: MakeAdapter) -> Path:
    """Folder of the examples as the pages name them: random weights, each with its own task."""
    folder = tmp_path_factory.mktemp("examples")
    for seed, name in enumerate(EXAMPLES, start=3):
        shutil.copytree(make_adapter(seed=seed), folder / name / "adapter")
        shutil.copy(ROOT / f"adapters/examples/{name}/adapter/task.json", folder / name / "adapter")
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, examples: Path) -> Iterator[str]:
    """Address of a real server that has what the pages speak of, in tiny."""
    with real_server(tiny_base, tmp_path_factory.mktemp("docs") / "store", BASE) as address:
        with Quickchange(address) as client:
            for name in EXAMPLES:
                client.adapters.upload(examples / name / "adapter", name=name)
        yield address


@pytest.fixture
def folder(tmp_path: Path, make_adapter: MakeAdapter, examples: Path) -> Path:
    """Folder that holds the files which the pages name."""
    (tmp_path / "my-adapter").symlink_to(make_adapter(seed=4))
    (tmp_path / "my-second-adapter").symlink_to(make_adapter(seed=5))
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/examples").symlink_to(examples)
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    return tmp_path


def run(block: Block, folder: Path, url: str) -> None:
    program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail"]
    words = [*program, *([] if block.language == "python" else ["-c"])]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "QUICKCHANGE_URL": url, "CURL_HOME": str(folder)}
    done = subprocess.run(
        [*words, block.text.replace(URL, url)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.skipif(not shutil.which("curl"), reason="the pages use curl, and it is not here")
@pytest.mark.parametrize(
    "each", [each for each in RUN_HERE if each.blocks("bash", "python")], ids=named
)
def test_blocks_run_and_pages_clean_up(each: Page, folder: Path, url: str) -> None:
    for block in each.blocks("bash", "python"):
        if block.is_run:
            run(block, folder, url)
    with Quickchange(url) as client:
        assert sorted(adapter.name for adapter in client.adapters.iterate()) == sorted(EXAMPLES)


def test_the_tour_is_among_the_blocks_that_run() -> None:
    text = "\n".join(block.text for block in README.blocks("bash", "python") if block.is_run)
    for word in ("curl", "openai", "quickchange push", "merge", "DELETE", '"stream": true'):
        assert word in text


@pytest.mark.parametrize("each", PAGES, ids=named)
def test_links_lead_somewhere(each: Page) -> None:
    for link in each.links():
        file, _, anchor = link.partition("#")
        target = (each.path.parent / file).resolve() if file else each.path
        assert target.exists(), f"{each.name}: {link}"
        assert not anchor or anchor in Page(target).anchors(), f"{each.name}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [README.path]
    while waiting:
        path = waiting.pop()
        if path not in reached and path.suffix == ".md" and path.is_file():
            reached.add(path)
            files = (link.partition("#")[0] for link in Page(path).links())
            waiting += [(path.parent / file).resolve() for file in files if file]
    assert {each.path for each in PAGES if each.name.startswith("docs/")} <= reached


@pytest.mark.parametrize("each", PAGES, ids=named)
def test_tests_that_are_named_exist(each: Page) -> None:
    for test in each.tests():
        file, _, name = test.removeprefix("tests/").partition("::")
        assert name in names_in(file), f"{each.name}: {test}"


def test_support_table_has_three_values_and_only_planned_names_no_test() -> None:
    rows = list(table_rows(README.section("## What works")))
    assert {state for _, state, _ in rows} == {"works", "refused", "planned"}
    for what, state, held_by in rows:
        assert ("::test_" in held_by) == (state != "planned"), what


def test_each_of_ten_promises_names_a_test() -> None:
    rows = list(table_rows(README.section("## Ten promises")))
    assert [number for number, *_ in rows] == [str(number) for number in range(1, 11)]
    assert all("::test_" in held_by for _, _, held_by, _ in rows)


def options_of(command: Any) -> set[str]:
    names = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    return {name for name in names if name.startswith("-")} | {"--help"}


def known_options() -> dict[str, set[str]]:
    """Return what each command of `quickchange` takes."""
    group: Any = typer.main.get_command(app)
    known = {name: options_of(command) for name, command in group.commands.items()}
    flags = {option.flag for option in OPTIONS.values()}
    switches = {f"--no-{o.flag[2:]}" for o in OPTIONS.values() if o.kind == "switch"}
    theirs = {flag.flag for flag in VLLM_FLAGS}
    theirs |= {f"--no-{flag.flag[2:]}" for flag in VLLM_FLAGS if flag.is_switch}
    known["serve"] = flags | switches | theirs | {"--config", "--help"}
    known["keys"] = set().union(*map(options_of, group.commands["keys"].commands.values()))
    known["fsck"] = {"--store", "--catalog", "--repair", "--json", "--config", "--help"}
    server: Any = typer.main.get_command(server_app)
    known["train"] = set().union(*map(options_of, server.commands["train"].commands.values()))
    known["export"] = options_of(server.commands["export"])
    known["doctor"] = options_of(server.commands["doctor"])
    known["base"] = {"--model", "--revision", "--config", "--help"}
    return known


@pytest.mark.parametrize("each", PAGES, ids=named)
def test_commands_and_options_exist(each: Page) -> None:
    known = known_options()
    for line in each.code_lines():
        if found := re.match(r"(?:\$ |\S*/)?quickchange ([a-z][a-z-]*)(.*)", line):
            assert found[1] in known, f"{each.name}: {line}"
            words = shlex.split(found[2], comments=True)
            options = {word for word in words if word.startswith("-") and word != "-"}
            assert options <= known[found[1]], f"{each.name}: {line}"


@pytest.mark.parametrize("each", RUN_HERE, ids=named)
def test_options_that_stand_alone_exist(each: Page) -> None:
    everything = set().union(*known_options().values())
    for span in each.spans():
        if span.startswith("--"):
            assert re.split(r"[ =]", span)[0] in everything, f"{each.name}: {span}"


@pytest.mark.parametrize("each", PAGES, ids=named)
def test_make_targets_exist(each: Page) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in each.code_lines():
        if found := re.match(r"make ([a-z-]+)", line):
            assert found[1] in targets, f"{each.name}: {line}"


def test_metrics_are_those_that_the_server_shows(url: str) -> None:
    text = httpx.get(f"{url}/metrics").text
    served = dict(re.findall(r"^# TYPE (quickchange_\w+) (\w+)$", text, re.MULTILINE))
    rows = table_rows(page("docs/observability.md").section("## Metrics"))
    assert {code_spans(name)[0]: kind for name, kind, *_ in rows} == served
    for each in PAGES:
        for span in each.spans():
            assert not METRIC.fullmatch(span) or span in served, f"{each.name}: {span}"


def test_routes_are_those_that_the_server_has(url: str) -> None:
    paths: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()["paths"]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    cells = [row[0] for row in table_rows(API.section("## Routes"))]
    assert {route for cell in cells for route in code_spans(cell)} == served


def test_request_fields_are_those_that_are_read() -> None:
    text = API.section("## Generation")
    rows = [code_spans(row[0]) for row in table_rows(text)]
    fields = {*ChatBody.model_fields, *CompletionBody.model_fields} - {"model"}
    assert {field for spans in rows for field in spans if not field.startswith("x-")} == fields
    accepted, refused, _ = text.partition("**Accepted without")[2].split("\n\n", 2)
    assert set(code_spans(accepted)) == BOOKKEEPING
    names = {*NEUTRAL_IN_CHAT, *NEUTRAL_IN_COMPLETIONS, "best_of"} - {"echo"}
    found = {span for span in code_spans(refused) if span.isidentifier()}
    assert found - {"unsupported_field"} == names


def test_error_codes_are_those_that_the_code_gives() -> None:
    folders = (ROOT / "server", ROOT / "adapters" / "quickchange_adapters")
    source = "\n".join(file.read_text() for folder in folders for file in folder.rglob("*.py"))
    errors = [row[1] for row in table_rows(API.section("## Errors"))]
    refusals = page("docs/adapters.md").section("## What is refused")
    cells = [*errors, *(row[0] for row in table_rows(refusals))]
    codes = {span for cell in cells for span in code_spans(cell) if span.isidentifier()}
    made = {f"{what}_not_found" for what in ("adapter", "version", "alias", "key")}
    assert len(codes) > 30
    assert [code for code in sorted(codes - made) if f'"{code}"' not in source] == []


def test_architecture_names_files_that_exist_and_ten_hops() -> None:
    each = page("docs/architecture.md")
    roots = (ROOT, ROOT / "server/quickchange_server", ROOT / "adapters/quickchange_adapters")
    for span in each.spans():
        if span.endswith(".py"):
            assert any((root / span).is_file() for root in roots), span
    hops = re.findall(r"^(\d+)\. ", each.section("## A request's way, in ten hops"), re.MULTILINE)
    assert hops == [str(number) for number in range(1, 11)]


def test_configuration_page_is_what_the_settings_say(tmp_path: Path) -> None:
    assert CONFIGURATION_PAGE.read_text(encoding="utf-8") == render(), (
        "run: python tools/configuration_page.py"
    )
    (example,) = Page(CONFIGURATION_PAGE).blocks("toml")
    file = tmp_path / "serve.toml"
    file.write_text(example.text)
    config = load_config({"config": str(file)}, {})
    assert config.port == tomllib.loads(example.text)["port"]
