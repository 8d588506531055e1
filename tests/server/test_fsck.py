"""The command `fsck`: what it says, what it exits with, and that a wrong name makes nothing."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quickchange_server.cli import app
from typer.testing import CliRunner, Result

from tests.adapters.crash_model import Operation, file_records
from tests.adapters.crash_run import World

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
CONFIG, WEIGHTS = (record.sha256 for record in file_records(0))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a store with one version, `ada:1`."""
    world = World(tmp_path / "store")
    world.do(Operation("upload", "ada", 0))
    return world


def fsck(world: World, *words: str) -> Result:
    url = f"sqlite:///{world.root / 'catalog.db'}"
    return runner.invoke(app, ["fsck", "--store", str(world.root), "--catalog", url, *words])


def test_a_sound_store_ends_with_0(world: World) -> None:
    done = fsck(world)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("1 versions, 2 files, ")
    assert done.stdout.endswith("bytes: no problems\n")


def test_a_problem_ends_with_1_and_says_what_to_do(world: World) -> None:
    world.store.path(WEIGHTS).write_bytes(b"rotten")
    done = fsck(world)
    assert done.exit_code == 1
    assert f"problem: blob_damaged: {WEIGHTS}: the blob's 6 bytes have the sha256" in done.stdout
    assert "needed by: ada:1" in done.stdout
    assert "upload the same files again" in done.stdout
    assert done.stdout.endswith(": 1 problem\n")


def test_json_is_the_report_and_nothing_else(world: World) -> None:
    world.store.delete(CONFIG)
    done = fsck(world, "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["object"], report["ok"]) == (1, "fsck.report", False)
    assert report["checked"]["versions"] == 1
    (problem,) = report["problems"]
    assert (problem["code"], problem["where"]) == ("blob_missing", CONFIG)
    assert (problem["used_by"], problem["repaired"]) == (["ada:1"], False)


def test_what_was_all_repaired_ends_with_0(world: World) -> None:
    left = world.root / "incoming" / "left"
    left.write_bytes(b"half an upload")
    os.utime(left, (time.time() - 3700,) * 2)
    assert fsck(world).exit_code == 1
    assert left.exists()
    done = fsck(world, "--repair")
    assert done.exit_code == 0
    assert "repaired: incoming_left: incoming/left" in done.stdout
    assert done.stdout.endswith("no problems, 1 repaired\n")
    assert not left.exists()


def test_a_store_that_is_not_there_ends_with_2_and_is_not_made(tmp_path: Path) -> None:
    done = runner.invoke(app, ["fsck", "--store", str(tmp_path / "nothing")])
    assert done.exit_code == 2
    assert "there is no store in this folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_catalog_that_is_none_ends_with_2_and_stays_as_it_is(
    world: World, tmp_path: Path
) -> None:
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE bookmarks (url)")
    (tmp_path / "text.db").write_text("no database at all, but long enough to have a header" * 20)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.db")}
    for name in ("other.db", "text.db", "nothing.db"):
        words = ["fsck", "--store", str(world.root), "--catalog", f"sqlite:///{tmp_path / name}"]
        done = runner.invoke(app, words)
        assert done.exit_code == 2
        assert f"{name}: there is no catalog in this file" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("*.db")} == before


def test_a_catalog_with_a_damaged_page_ends_with_1(world: World) -> None:
    world.do(Operation("upload", "ada", 1))
    with sqlite3.connect(world.root / "catalog.db") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'version_files'"
        (page,) = database.execute(query).fetchone()
        (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
    database.close()
    world.catalog.close()
    with (world.root / "catalog.db").open("r+b") as file:
        file.seek((page - 1) * page_bytes)
        file.write(b"\xa5" * page_bytes)
    done = fsck(world)
    assert done.exit_code == 1
    assert "problem: catalog_damaged: catalog: " in done.stdout
    assert "restore the catalog from a backup" in done.stdout


def test_settings_come_from_variables_and_the_file_too(world: World, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(f'catalog = "sqlite:///{world.root}/catalog.db"\nmodel = "/models/x"\n')
    variables = {"QUICKCHANGE_STORE": str(world.root)}
    done = runner.invoke(app, ["fsck", "--config", str(file)], env=variables)
    assert done.exit_code == 0


def test_help_has_examples_and_exit_codes() -> None:
    text = runner.invoke(app, ["fsck", "--help"]).output
    assert "quickchange fsck --store /srv/adapters --repair" in text
    assert "Exit codes: 0 nothing is wrong" in text


def test_it_runs_beside_a_writer_and_takes_nothing_from_it(world: World) -> None:
    """A process uploads, moves aliases and deletes all the while."""
    program = (
        "import random, sys; from pathlib import Path\n"
        "from tests.adapters.crash_model import ALL_KINDS, Model, Operation\n"
        "from tests.adapters.crash_run import World\n"
        "world, model, chance = World(Path(sys.argv[1])), Model(), random.Random(1)\n"
        "model.apply(Operation('upload', 'ada', 0)); print('ready', flush=True)\n"
        "while True:\n"
        "    operation = model.choose(chance, ALL_KINDS)\n"
        "    world.do(operation); model.apply(operation)\n"
    )
    words = [sys.executable, "-c", program, str(world.root)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        done = [fsck(world, "--json", *words) for words in ([], ["--repair"]) for _ in range(3)]
        assert writer.poll() is None
        writer.kill()
    problems = [problem for each in done for problem in json.loads(each.stdout)["problems"]]
    # What a deletion leaves for a moment may be seen; a loss may not.
    assert {problem["code"] for problem in problems} <= {"blob_unused"}
    assert fsck(world, "--repair").exit_code == 0
