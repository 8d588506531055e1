"""The command `prune`: delete old versions that no alias names."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from quickchange_client.adapter import Adapter, AdapterDeletion, AdapterVersion
from quickchange_client.cli.adapter_tables import short_digest
from quickchange_client.cli.byte_progress import count_progress
from quickchange_client.cli.duration import duration_s
from quickchange_client.cli.output import (
    format_bytes,
    format_time,
    print_json_value,
    print_table,
)
from quickchange_client.cli.session import JsonOption, UrlOption, say, session
from quickchange_client.client import Quickchange
from quickchange_client.errors import ApiError
from quickchange_client.pruning import PruneRule, rollback_targets

WAIT_S = 5.0
"""For requests that run on an old version; it goes when they have finished in any case."""

NamesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="NAME", help="Only these adapters. Default: all.")
]
KeepOption = Annotated[
    int,
    typer.Option(
        "--keep", metavar="N", min=0, help="Keep the newest N of each name that no alias names."
    ),
]
OlderOption = Annotated[
    str | None,
    typer.Option("--older-than", metavar="AGE", help="Only older ones: 90s, 15m, 12h, 30d, 2w."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Delete them; without it, only show.")]


@dataclass(frozen=True, slots=True)
class Pruned:
    """A version that may go, and what its deletion did: nothing yet, an answer, or an error."""

    version: AdapterVersion
    deletion: AdapterDeletion | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a line of the answer for machines."""
        return {
            "name": self.version.name,
            "version": self.version.version,
            "digest": self.version.digest,
            "bytes": self.version.bytes.file,
            "created_at": self.version.created_at,
            "last_used_at": self.version.last_used_at,
            "state": self.deletion.state if self.deletion else self.version.state,
            "error": self.error,
        }


def prune(
    names: NamesArgument = None,
    keep: KeepOption = 2,
    older_than: OlderOption = None,
    yes: YesOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete old versions that no alias names; without --yes, only show them.

    Kept in any case: what an alias names, what is pinned or merged, and what
    rollback would go back to as far as the catalog's log reaches back. Running
    requests finish. Exit code 1 when something that was to go could not be
    deleted. Prune leaves that log alone: the server shortens it (serve --event-days).

    Examples:
        quickchange prune

        quickchange prune sentiment --keep 0 --yes

        quickchange prune --older-than 30d --keep 5 --yes --json
    """
    with session(url, as_json) as client:
        rule = PruneRule(keep, None if older_than is None else duration_s(older_than))
        found = [
            version
            for adapter in _adapters(client, names or [])
            for version in _prunable(client, adapter, rule)
        ]
        done = _delete_all(client, found, is_shown=not as_json) if yes else list(map(Pruned, found))
    print_json_value(_json(done, is_dry_run=not yes)) if as_json else _print(done, yes)
    if any(each.error for each in done):
        raise typer.Exit(1)


def _adapters(client: Quickchange, names: Sequence[str]) -> list[Adapter]:
    if names:
        return [client.adapters.get(name) for name in dict.fromkeys(names)]
    return list(client.adapters.iterate())


def _prunable(client: Quickchange, adapter: Adapter, rule: PruneRule) -> list[AdapterVersion]:
    candidates = rule.candidates(adapter, time.time())
    if not candidates:
        return []
    needed = rollback_targets(adapter, client.adapters.events(adapter.name))
    return [version for version in candidates if version.version not in needed]


def _delete_all(
    client: Quickchange, versions: Sequence[AdapterVersion], *, is_shown: bool
) -> list[Pruned]:
    done: list[Pruned] = []
    with count_progress("deleting", is_shown=is_shown and bool(versions)) as progress:
        for version in versions:
            done.append(_delete(client, version))
            if progress is not None:
                progress(len(done), len(versions))
    return done


def _delete(client: Quickchange, version: AdapterVersion) -> Pruned:
    """Delete a version; the server refuses if an alias came to name it meanwhile."""
    try:
        deletion = client.adapters.delete(version.name, version.version, timeout_s=WAIT_S)
        return Pruned(version, deletion)
    except ApiError as error:
        return Pruned(version, error=str(error))


def _json(done: Sequence[Pruned], *, is_dry_run: bool) -> dict[str, Any]:
    return {
        "object": "prune",
        "dry_run": is_dry_run,
        "versions": [each.to_json() for each in done],
        "freed_bytes": dict(_freed(done)),
    }


def _freed(done: Sequence[Pruned]) -> Counter[str]:
    freed: Counter[str] = Counter()
    for each in done:
        freed.update(each.deletion.freed_bytes if each.deletion else {})
    return freed


def _print(done: Sequence[Pruned], is_deleted: bool) -> None:
    if not done:
        say("nothing to delete: every version is named, needed, kept or too young")
        return
    headings = ("VERSION", "CREATED", "LAST USED", ">BYTES", "DIGEST", *(["STATE"] * is_deleted))
    print_table(headings, [_row(each, is_deleted) for each in done])
    size = format_bytes(sum(each.version.bytes.file for each in done))
    if not is_deleted:
        say(f"{_versions(len(done))} of {size} would be deleted; delete with --yes")
        return
    num_deleted = sum(each.error is None for each in done)
    freed = [f"{format_bytes(n)} {tier}" for tier, n in _freed(done).items() if n]
    print(f"deleted {_versions(num_deleted)}; freed {', '.join(freed) or 'nothing'}")


def _versions(number: int) -> str:
    return f"{number} version" if number == 1 else f"{number} versions"


def _row(each: Pruned, is_deleted: bool) -> tuple[object, ...]:
    version = each.version
    state = each.deletion.state if each.deletion else f"error: {each.error}"
    return (
        f"{version.name}:{version.version}",
        format_time(version.created_at),
        format_time(version.last_used_at),
        format_bytes(version.bytes.file),
        short_digest(version.digest),
        *([state] * is_deleted),
    )
