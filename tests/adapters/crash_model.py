"""What a catalog must show after any sequence of operations, computed without a database."""

import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from quickchange_adapters.records import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterRecord,
    FileRecord,
    version_digest,
)

NAMES = ("ada", "bob", "cyd")
ALIASES = ("default", "canary", "stable")
NUM_CONTENTS = 6

Kind = Literal[
    "upload", "lose_upload", "set_alias", "delete_alias", "delete_version", "delete_adapter"
]
ALL_KINDS: tuple[Kind, ...] = get_args(Kind)
Shown = dict[str, tuple[dict[int, str], dict[str, int]]]
"""Of each name: digest by number of the versions that take requests, and number by alias."""


@dataclass(frozen=True)
class Operation:
    """One thing that a caller asks for. `lose_upload` fails while its files are put."""

    kind: Kind
    name: str
    content: int = 0
    alias: str | None = None
    number: int = 0


@dataclass
class NameState:
    next_version: int = 1
    versions: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)


def contents(number: int) -> dict[str, bytes]:
    """Return the files of a content; their configs are shared by several."""
    return {
        CONFIG_FILE: f"config {number % 2}".encode(),
        WEIGHTS_FILE: f"weights {number} ".encode() * 100,
    }


def file_records(number: int) -> tuple[FileRecord, ...]:
    return tuple(
        FileRecord(file, hashlib.sha256(data).hexdigest(), len(data))
        for file, data in contents(number).items()
    )


class Model:
    """The expected state; `apply` is what an acknowledged operation does to it."""

    def __init__(self) -> None:
        self.names = {name: NameState() for name in NAMES}

    def shown(self) -> Shown:
        live = {name: state for name, state in self.names.items() if state.versions}
        return {name: (dict(s.versions), dict(s.aliases)) for name, s in live.items()}

    def after(self, operation: Operation) -> "Model":
        model = copy.deepcopy(self)
        model.apply(operation)
        return model

    def apply(self, operation: Operation) -> None:
        state = self.names[operation.name]
        if operation.kind == "upload":
            self._upload(state, operation)
        elif operation.kind == "set_alias":
            assert operation.alias is not None
            state.aliases[operation.alias] = operation.number
        elif operation.kind == "delete_alias":
            assert operation.alias is not None
            del state.aliases[operation.alias]
        elif operation.kind == "delete_version":
            del state.versions[operation.number]
        elif operation.kind == "delete_adapter":
            state.versions.clear()
            state.aliases.clear()

    def _upload(self, state: NameState, operation: Operation) -> None:
        digest = version_digest(file_records(operation.content))
        number = next((n for n, d in state.versions.items() if d == digest), None)
        if number is None:
            number = state.next_version
            state.next_version += 1
            if not state.versions:
                state.aliases["default"] = number
            state.versions[number] = digest
        if operation.alias is not None:
            state.aliases[operation.alias] = number

    def choose(self, chance: random.Random, kinds: Sequence[Kind]) -> Operation:
        """Return an operation that can be done now: of these kinds, or an upload."""
        for _ in range(10):
            name = chance.choice(NAMES)
            operation = _filled(chance.choice(kinds), name, self.names[name], chance)
            if operation is not None:
                return operation
        return _upload("upload", chance.choice(NAMES), chance, ALIASES)


def _filled(kind: Kind, name: str, state: NameState, chance: random.Random) -> Operation | None:
    """Return an operation of a kind on a name, or None when it cannot be done."""
    if kind in ("upload", "lose_upload"):
        return _upload(kind, name, chance, (None, None, *ALIASES))
    if kind == "delete_version":
        free = sorted(state.versions.keys() - state.aliases.values())
        return Operation(kind, name, number=chance.choice(free)) if free else None
    if kind == "delete_alias":
        found = sorted(state.aliases)
        return Operation(kind, name, alias=chance.choice(found)) if found else None
    if not state.versions:
        return None
    if kind == "set_alias":
        number = chance.choice(sorted(state.versions))
        return Operation(kind, name, alias=chance.choice(ALIASES), number=number)
    return Operation(kind, name)


def _upload(
    kind: Kind, name: str, chance: random.Random, aliases: Sequence[str | None]
) -> Operation:
    return Operation(kind, name, chance.randrange(NUM_CONTENTS), chance.choice(aliases))


def shown_by(adapters: list[AdapterRecord]) -> Shown:
    """Return what a catalog shows to requests."""
    shown: Shown = {}
    for adapter in adapters:
        ready = {v.number: v.digest for v in adapter.versions if v.state == "ready"}
        if ready:
            shown[adapter.name] = (ready, dict(adapter.aliases))
    return shown
