"""Which versions may go: old ones that nothing names. Sends nothing, deletes nothing."""

from collections.abc import Iterable
from dataclasses import dataclass

from quickchange_client.adapter import Adapter, AdapterEvent, AdapterVersion
from quickchange_client.alias_history import version_before
from quickchange_client.errors import ArgumentInvalid


@dataclass(frozen=True, slots=True)
class PruneRule:
    """Keep the `num_kept` newest of a name that no alias names, and all that are younger.

    `older_than_s`: least age in seconds of what may go; None: any age.
    """

    num_kept: int = 2
    older_than_s: float | None = None

    def candidates(self, adapter: Adapter, now_s: float) -> list[AdapterVersion]:
        """Return what may go, oldest first, but for what a rollback would need.

        Kept are versions that an alias names, that are pinned or merged, and that are on their way
        out already.
        """
        named = set(adapter.aliases.values())
        free = [
            version
            for version in sorted(adapter.versions, key=lambda each: each.version)
            if version.version not in named
            and not (version.pinned or version.merged)
            and version.state != "deleting"
        ]
        old_enough = free[: max(0, len(free) - self.num_kept)]
        return [version for version in old_enough if self._is_old(version, now_s)]

    def _is_old(self, version: AdapterVersion, now_s: float) -> bool:
        if self.older_than_s is None:
            return True
        return version.created_at is not None and now_s - version.created_at >= self.older_than_s


def rollback_targets(adapter: Adapter, events: Iterable[AdapterEvent]) -> set[int]:
    """Return the versions to which a rollback of each alias would go, as far as the events tell."""
    log = list(events)
    targets = set()
    for alias in adapter.aliases:
        try:
            targets.add(version_before(adapter, log, alias))
        except ArgumentInvalid:  # it meant nothing else
            continue
    return targets
