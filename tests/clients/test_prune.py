"""`quickchange prune`: only what nothing names or needs, and only when it is told to."""

import json
from pathlib import Path

import pytest
from quickchange_client import Adapter, AdapterEvent, AdapterVersion, ArgumentInvalid, Quickchange
from quickchange_client.cli.duration import duration_s
from quickchange_client.pruning import PruneRule, rollback_targets

from tests.clients.conftest import RunCommand, write_adapter
from tests.clients.fake_server import FakeServer
from tests.conftest import MakeAdapter

DAY_S = 86_400
NOW_S = 100 * DAY_S


def versions(**changes: dict[str, object]) -> Adapter:
    """Return an adapter of five versions, made one a day, with changes by number (`v3=…`)."""
    made = [
        AdapterVersion.model_validate(
            {
                "name": "a",
                "version": number,
                "digest": f"sha256:{number}",
                "created_at": number * DAY_S,
                **changes.get(f"v{number}", {}),
            }
        )
        for number in range(1, 6)
    ]
    return Adapter(name="a", aliases={"default": 5, "canary": 2}, versions=made)


def numbers(rule: PruneRule, adapter: Adapter) -> list[int]:
    return [version.version for version in rule.candidates(adapter, NOW_S)]


def test_the_newest_that_no_alias_names_are_kept() -> None:
    assert numbers(PruneRule(0), versions()) == [1, 3, 4]
    assert numbers(PruneRule(1), versions()) == [1, 3]
    assert numbers(PruneRule(2), versions()) == [1]
    assert numbers(PruneRule(9), versions()) == []


def test_only_what_is_old_enough_goes() -> None:
    assert numbers(PruneRule(0, 97 * DAY_S), versions()) == [1, 3]
    assert numbers(PruneRule(0, 99 * DAY_S), versions()) == [1]
    assert numbers(PruneRule(0, 0), versions(v1={"created_at": None})) == [3, 4]


@pytest.mark.parametrize("change", [{"pinned": True}, {"merged": True}, {"state": "deleting"}])
def test_what_is_held_or_going_is_left_alone(change: dict[str, object]) -> None:
    assert numbers(PruneRule(0), versions(v3=change)) == [1, 4]
    assert numbers(PruneRule(0), versions(v3={"state": "disabled"})) == [1, 3, 4]


def test_what_a_rollback_goes_back_to_is_needed() -> None:
    log = [
        {"action": "publish", "version": 1},
        {"action": "publish", "version": 3},
        {"action": "set_alias", "alias": "default", "version": 3},
        {"action": "set_alias", "alias": "default", "version": 5},
    ]
    events = [AdapterEvent.model_validate({"id": "1", "at": 1, **each}) for each in log]
    assert rollback_targets(versions(), events) == {3}


@pytest.fixture
def five(run_command: RunCommand, fake_server: FakeServer, tmp_path: Path) -> FakeServer:
    """Return a server with an adapter of five versions, of which 3 was live and 5 is."""
    for number in range(1, 6):
        folder = write_adapter(tmp_path / str(number), bytes([number]) * 100)
        run_command("push", str(folder), "--name", "a", "--alias", "default")
    moved = {"action": "set_alias", "alias": "default"}
    fake_server.adapters["a"].events = [{**moved, "version": number} for number in (3, 5)]
    fake_server.requests.clear()
    return fake_server


def test_without_yes_it_only_shows(run_command: RunCommand, five: FakeServer) -> None:
    shown = run_command("prune", "--keep", "1")
    assert shown.exit_code == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()[1:]] == ["a:1", "a:2"]
    assert "2 versions" in shown.stderr
    assert "--yes" in shown.stderr
    as_json = json.loads(run_command("prune", "a", "--keep", "0", "--json").stdout)
    assert (as_json["dry_run"], as_json["freed_bytes"]) == (True, {})
    assert [(each["version"], each["state"]) for each in as_json["versions"]] == [
        *((1, "ready"), (2, "ready"), (4, "ready"))
    ]
    assert five.requests == []


def test_with_yes_it_deletes_them_and_nothing_else(
    run_command: RunCommand, five: FakeServer
) -> None:
    done = run_command("prune", "--keep", "0", "--yes")
    assert (done.exit_code, "deleted 3 versions" in done.stdout) == (0, True)
    assert sorted(five.adapters["a"].versions) == [3, 5]
    again = run_command("prune", "--keep", "0", "--yes")
    assert (again.exit_code, again.stdout, "nothing to delete" in again.stderr) == (0, "", True)


def test_a_version_that_an_alias_came_to_name_stays(
    run_command: RunCommand, five: FakeServer
) -> None:
    five.refuses_to_delete = {1}
    done = run_command("prune", "--keep", "0", "--yes", "--json")
    assert done.exit_code == 1
    states = {each["version"]: each["error"] for each in json.loads(done.stdout)["versions"]}
    assert states[2] is None
    assert "alias points at it" in states[1]
    assert sorted(five.adapters["a"].versions) == [1, 3, 5]


def test_lengths_of_time(run_command: RunCommand) -> None:
    assert [duration_s(text) for text in ("90s", "15m", "12h", "30d", "2w")] == [
        *(90, 900, 43_200, 30 * DAY_S, 14 * DAY_S)
    ]
    for wrong in ("", "3", "d", "-1d", "1.5h", "1 d", "9999999d", "3y"):
        with pytest.raises(ArgumentInvalid):
            duration_s(wrong)
    assert run_command("prune", "--older-than", "soon").exit_code == 2


def test_on_a_real_server_live_and_previous_versions_stay(
    real_server_url: str, run_command: RunCommand, make_adapter: MakeAdapter
) -> None:
    with Quickchange(real_server_url) as client:
        for seed in range(1, 5):
            client.adapters.upload(make_adapter(seed=seed), name="p", alias="default")
        words = ("prune", "p", "--keep", "0", "--yes", "--json", "--url", real_server_url)
        done = json.loads(run_command(*words).stdout)
        assert [(each["version"], each["state"]) for each in done["versions"]] == [
            *((1, "deleted"), (2, "deleted"))
        ]
        assert done["freed_bytes"]["disk"] > 0
        assert client.adapters.rollback("p").aliases == {"default": 3}
        client.adapters.delete("p")
