"""The text of a version's task.json in the catalog: written, read and removed with its version."""

import hashlib
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.catalog_check import check_versions
from quickchange_adapters.records import FileRecord, NewVersion, VersionRecord, version_digest

TASK = '{"prompt": "naïve {input} 🙂", "max_tokens": 4}\n'
FILES = (
    FileRecord("adapter_config.json", "1" * 64, 10),
    FileRecord("adapter_model.safetensors", "2" * 64, 100),
)
PLAIN = NewVersion("a", FILES, "tiny", "b" * 64, (4,), ("q_proj",), {"ok": True})
WITH_TASK = replace(
    PLAIN, files=(*FILES, FileRecord("task.json", "3" * 64, len(TASK.encode()))), task_text=TASK
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


def catalog_of(file: Path) -> Catalog:
    return Catalog(sqlite_url(file))


def resolved(catalog: Catalog, model: str) -> VersionRecord:
    version = catalog.resolve(model)
    assert version is not None
    return version


def rows_of(file: Path) -> list[tuple[int, str]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute("SELECT version_id, text FROM tasks").fetchall()


def test_a_task_belongs_to_its_version_alone_and_is_there_after_opening_again(file: Path) -> None:
    catalog = catalog_of(file)
    catalog.publish(PLAIN)
    published = catalog.publish(WITH_TASK)
    assert (published.created, published.version.number) == (True, 2)
    assert published.version.task_text == TASK
    assert published.version.digest == version_digest(WITH_TASK.files) != PLAIN.digest
    catalog.close()
    catalog = catalog_of(file)
    assert resolved(catalog, "a:1").task_text is None
    assert resolved(catalog, "a:2").task_text == TASK
    assert [v.task_text for each in catalog.list_adapters() for v in each.versions] == [None, TASK]
    again = catalog.publish(WITH_TASK)
    assert (again.created, again.version.task_text) == (False, TASK)
    assert len(rows_of(file)) == 1


def test_the_check_of_a_store_tells_a_task_that_is_not_the_uploaded_one(file: Path) -> None:
    text = '{"top_p": 0.5}'
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    files = (*FILES, FileRecord("task.json", sha256, len(text)))
    catalog = catalog_of(file)
    sound = catalog.publish(replace(WITH_TASK, files=files, task_text=text)).version
    assert sound.has_its_task
    assert check_versions([sound]) == []
    changed = [replace(sound, task_text=each) for each in (text + " ", None)]
    changed.append(replace(sound, files=FILES, digest=version_digest(FILES)))
    for version in changed:
        assert not version.has_its_task
        (finding,) = check_versions([version])
        assert (finding.code, finding.where) == ("digest_wrong", "a:1")
        assert "task" in finding.message


def test_a_task_goes_with_its_version(file: Path) -> None:
    catalog = catalog_of(file)
    catalog.publish(PLAIN)
    version = catalog.publish(WITH_TASK).version
    catalog.begin_delete_version("a", version.number)
    assert [each.task_text for each in catalog.list_deleting()] == [TASK]
    catalog.purge(version)
    assert rows_of(file) == []
    gone: list[str] = []

    def delete_blob(sha256: str) -> int:
        gone.append(sha256)
        return 1

    catalog.collect(delete_blob)
    assert gone == ["3" * 64]


def test_a_catalog_of_before_there_were_tasks_gets_their_table(file: Path) -> None:
    catalog = catalog_of(file)
    catalog.publish(PLAIN)
    catalog.close()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DROP TABLE tasks")
    catalog = catalog_of(file)
    assert resolved(catalog, "a").task_text is None
    assert catalog.publish(WITH_TASK).version.task_text == TASK
