"""What an alias has meant, from the audit log alone."""

import pytest
from quickchange_client import Adapter, AdapterEvent, ArgumentInvalid
from quickchange_client.alias_history import meanings, version_before


def events(*lines: str) -> list[AdapterEvent]:
    """Read lines such as `publish 1` or `set_alias 2 default`."""
    found = []
    for place, line in enumerate(lines, start=1):
        action, version, alias = (*line.split(), None, None)[:3]
        found.append(
            AdapterEvent(
                id=str(place),
                at=float(place),
                action=str(action),
                version=None if version is None else int(version),
                alias=alias,
            )
        )
    return found


def adapter(aliases: dict[str, int], **states: str) -> Adapter:
    """Make an adapter whose versions are v1, v2, … in these states."""
    versions = [
        {"name": "a", "version": int(name[1:]), "digest": "d", "state": state}
        for name, state in states.items()
    ]
    return Adapter.model_validate({"name": "a", "aliases": aliases, "versions": versions})


def test_a_log_whose_beginning_is_gone_is_not_guessed_at() -> None:
    rest = events("publish 1", "set_alias 1 canary", "publish 2", "set_alias 2 default")[1:]
    assert meanings(rest, "default") == [2]
    again = [*rest, *events("delete_adapter", "publish 3")]
    assert meanings(again, "default") == [3]


LIFE = events("publish 1", "publish 2", "set_alias 2 default", "set_alias 1 canary", "publish 3")


def test_the_first_version_becomes_default_by_itself() -> None:
    assert meanings(LIFE, "default") == [1, 2]
    assert meanings(LIFE, "canary") == [1]
    assert meanings(LIFE, "stable") == []


def test_a_name_that_was_deleted_begins_anew() -> None:
    log = [*LIFE, *events("delete_version 1", "delete_version 2", "delete_adapter", "publish 4")]
    assert meanings(log, "default") == [4]


def test_the_version_before_is_the_last_other_one_that_can_be_served() -> None:
    log = [*LIFE, *events("set_alias 3 default")]
    there = {"v1": "ready", "v2": "ready", "v3": "ready"}
    assert version_before(adapter({"default": 3}, **there), log, "default") == 2
    without = {**there, "v2": "disabled"}
    assert version_before(adapter({"default": 3}, **without), log, "default") == 1
    assert version_before(adapter({"default": 3}, v1="ready", v3="ready"), log, "default") == 1
    back = [*log, *events("set_alias 2 default")]
    assert version_before(adapter({"default": 2}, **there), back, "default") == 3


def test_an_alias_that_was_removed_can_come_back() -> None:
    log = [*LIFE, *events("delete_alias")]
    there = adapter({"default": 2}, v1="ready", v2="ready")
    assert version_before(there, log, "canary") == 1


def test_nothing_to_go_back_to_says_what_to_do() -> None:
    with pytest.raises(ArgumentInvalid, match="quickchange alias a default VERSION"):
        version_before(adapter({"default": 1}, v1="ready"), events("publish 1"), "default")
