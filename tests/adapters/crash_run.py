"""Kill writers at each named point, and look at what they leave. Run in a process without torch.

The parent forks a child per hit. The child does random operations through the code that the server
uses, writes to a pipe what it begins and what it acknowledges, and kills itself with SIGKILL when
it reaches the point, or is killed by the parent at any moment. The parent, which survives, knows
what was acknowledged.

    python -m tests.adapters.crash_run FOLDER HITS        prints {point: hits} as JSON
"""

import contextlib
import gc
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from quickchange_adapters import fault_points
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.errors import StoreUnavailable
from quickchange_adapters.publication import finish_deletion, publish_upload
from quickchange_adapters.records import AdapterRecord, NewVersion, VersionRecord
from quickchange_adapters.store import LocalStore, StagedFile
from quickchange_adapters.store_check import StoreCheck

from tests.adapters.crash_model import (
    ALL_KINDS,
    Kind,
    Model,
    Operation,
    contents,
    file_records,
    shown_by,
)

MAX_OPERATIONS = 100
AGED = 1e12
ANY_MOMENT = "any moment"
LONGEST_LIFE_S = 0.05
DELETES: tuple[Kind, ...] = ("delete_version", "delete_adapter")
KINDS_THAT_REACH: dict[str, tuple[Kind, ...]] = {
    "release.commit": ("lose_upload",),
    "set_alias.commit": ("set_alias",),
    "delete_alias.commit": ("delete_alias",),
    "begin_delete.commit": DELETES,
    "purge.commit": DELETES,
    "delete.remove": ("delete_adapter", "lose_upload"),
    "delete.sync": ("delete_adapter", "lose_upload"),
    "collect.commit": (*DELETES, "lose_upload"),
    "reply": ALL_KINDS,
}
"""What is done after a few operations of any kind, so that a child soon reaches its point."""


def named_points() -> list[str]:
    """Return the points of the table in the docstring of the fault points, two a step."""
    assert fault_points.__doc__ is not None
    steps = re.findall(r"^\| `([a-z_.]+)` \|", fault_points.__doc__, re.MULTILINE)
    return [f"{when} {step}" for step in steps for when in ("before", "after")]


class World:
    """A store and a catalog in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = LocalStore(root)
        self.catalog = Catalog(sqlite_url(root / "catalog.db"))

    def do(self, operation: Operation) -> None:
        """Do what the server does for an operation."""
        name, catalog = operation.name, self.catalog
        if operation.kind in ("upload", "lose_upload"):
            self._upload(operation)
        elif operation.kind == "set_alias":
            assert operation.alias is not None
            catalog.set_alias(operation.alias, self._version(name, operation.number))
        elif operation.kind == "delete_alias":
            assert operation.alias is not None
            catalog.delete_alias(name, operation.alias)
        elif operation.kind == "delete_version":
            gone = catalog.begin_delete_version(name, operation.number)
            finish_deletion(catalog, self.store, [gone])
        else:
            finish_deletion(catalog, self.store, catalog.begin_delete_adapter(name))

    def _version(self, name: str, number: int) -> VersionRecord:
        adapter = self.catalog.get(name)
        version = None if adapter is None else adapter.version(number)
        assert version is not None
        return version

    def _upload(self, operation: Operation) -> None:
        staged: list[StagedFile] = []
        try:
            for data in contents(operation.content).values():
                staged.append(self._stage(data))
            self._publish(operation, staged)
        finally:
            for file in staged:
                self.store.discard(file)

    def _publish(self, operation: Operation, staged: list[StagedFile]) -> None:
        new = NewVersion(
            name=operation.name,
            files=file_records(operation.content),
            base_name="tiny",
            base_digest="b" * 64,
            ranks=(4,),
            target_modules=("q_proj",),
            report={},
            alias=operation.alias,
            upload_id=os.urandom(8).hex(),
        )
        if operation.kind == "upload":
            publish_upload(self.catalog, self.store, new, staged)
            return
        lost = StagedFile(staged[1].path.with_name("lost"), "0" * 64, 1)
        with contextlib.suppress(StoreUnavailable):
            publish_upload(self.catalog, self.store, new, [staged[0], lost])

    def _stage(self, data: bytes) -> StagedFile:
        with self.store.stage(1 << 20) as writer:
            writer.write(data)
            return writer.finish()


def work_until_killed(world: World, model: Model, point: str, seed: int, pipe: int) -> NoReturn:
    """Do operations in a child until it kills itself at a point."""
    chance = random.Random(seed)
    num_passed, num_before = chance.choice((0, 0, 1)), chance.choice((0, 0, 1, 3))
    kinds = KINDS_THAT_REACH.get(point.partition(" ")[2], ("upload",))

    def kill_at_point(reached: str) -> None:
        nonlocal num_passed
        if reached == point:
            if num_passed == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            num_passed -= 1

    fault_points.observe(kill_at_point)
    for count in range(MAX_OPERATIONS):
        operation = model.choose(chance, ALL_KINDS if count < num_before else kinds)
        os.write(pipe, f"begin {json.dumps(asdict(operation))}\n".encode())
        world.do(operation)
        model.apply(operation)
        with fault_points.step("reply"):
            os.write(pipe, b"done\n")
    os._exit(3)


def run_child(world: World, model: Model, point: str, seed: int) -> list[str]:
    """Return the lines that a child wrote before it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work_until_killed(world, model, point, seed, writing)
        except BaseException as error:
            print(f"child, point {point!r}: {error!r}", file=sys.stderr, flush=True)
            os._exit(4)
    os.close(writing)
    if point == ANY_MOMENT:
        time.sleep(random.Random(seed).uniform(0, LONGEST_LIFE_S))
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"{point!r}, seed {seed}: ended with {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL
    return lines


def replay(model: Model, lines: list[str]) -> Operation | None:
    """Apply what was acknowledged; return what was under way."""
    under_way: Operation | None = None
    for line in lines:
        if line == "done":
            assert under_way is not None
            model.apply(under_way)
            under_way = None
        else:
            under_way = Operation(**json.loads(line.removeprefix("begin ")))
    return under_way


def check(world: World, model: Model, under_way: Operation | None, where: str) -> Model:
    """Hold what is there against what was acknowledged; return the model of what is there."""
    adapters = world.catalog.list_adapters()
    shown = shown_by(adapters)
    possible = [model] if under_way is None else [model, model.after(under_way)]
    found = [each for each in possible if each.shown() == shown]
    assert found, f"{where}: {shown} is none of {[each.shown() for each in possible]}"
    for sha256 in blobs_of(adapters):
        data = world.store.path(sha256).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sha256, f"{where}: {sha256} is damaged"
    if deleting := world.catalog.list_deleting():
        finish_deletion(world.catalog, world.store, deleting)
        assert world.catalog.list_deleting() == [], where
        assert shown_by(world.catalog.list_adapters()) == shown, where
    return found[-1]


def blobs_of(adapters: list[AdapterRecord]) -> set[str]:
    """Return the blobs of all versions that take requests."""
    versions = [v for adapter in adapters for v in adapter.versions if v.state == "ready"]
    return {file.sha256 for version in versions for file in version.files}


def check_no_leak(world: World, aged: Catalog, where: str) -> None:
    """Hold that nothing but what is served stays, once reservations and files are old."""
    report = StoreCheck(world.store, aged, lambda: AGED).run(repair=True)
    # A store that was never written half has nothing but leftovers, and all of them are mended.
    assert {finding.code for finding in report.findings} <= {"blob_unused"}, where
    assert report.is_ok, where
    world.store.sweep_incoming(older_than_s=0)
    wanted = blobs_of(world.catalog.list_adapters())
    assert {blob.sha256 for blob in world.store.list()} == wanted, where
    assert list((world.root / "incoming").iterdir()) == [], where


def warm_up(world: World, model: Model) -> None:
    """Do operations of all kinds, so that a child need not learn the catalog's statements."""
    chance = random.Random(1)
    for _ in range(60):
        operation = model.choose(chance, ALL_KINDS)
        world.do(operation)
        model.apply(operation)


def hits(points: list[str], num_hits: int) -> Iterator[tuple[int, str]]:
    order = [point for point in points for _ in range(num_hits)]
    random.Random(0).shuffle(order)
    yield from enumerate(order)


def main(root: Path, num_hits: int) -> dict[str, int]:
    """Kill at each point so many times; return how often each was hit."""
    world, model = World(root), Model()
    aged = Catalog(sqlite_url(root / "catalog.db"), lambda: AGED)
    warm_up(world, model)
    check_no_leak(world, aged, "before the first kill")
    gc.freeze()
    done = dict.fromkeys([*named_points(), ANY_MOMENT], 0)
    for seed, point in hits(list(done), num_hits):
        world.catalog.close()  # no connection may be open while a child is forked
        aged.close()
        under_way = replay(model, run_child(world, model, point, seed))
        where = f"{point!r}, seed {seed}"
        if seed % 10 == 0:
            World(root).catalog.close()  # opens as the next start does
        model = check(world, model, under_way, where)
        if seed % 2 == 0:
            check_no_leak(world, aged, where)
        done[point] += 1
    return done


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
