"""The task that a version carries, read from its record in memory. Opens no file."""

from typing import Any

from quickchange_adapters.records import VersionRecord
from quickchange_adapters.strict_json import JsonRefused, parse_object
from quickchange_adapters.task import Task, stored_task

from quickchange_server.errors import Conflict


def read_version_task(version: VersionRecord) -> Task | None:
    """Return what a version's task.json says; None when it has none.

    Without its task a version would give other answers than were trained, so it is refused then.

    Raises: Conflict when the task is lost or changed since the digest was taken, or is one that
    another version of this program accepted and this one would not.
    """
    if not version.has_its_task:
        reason = "it is not the one that was uploaded; delete the version and upload it again"
        raise _refused(version, reason)
    if version.task_text is None:
        return None
    reading = stored_task(version.task_text)
    if reading.task is None:
        problem = reading.problems[0].message
        raise _refused(version, f"{problem}; use the server version that took it")
    return reading.task


def task_json(version: VersionRecord) -> dict[str, Any] | None:
    """Return a version's task.json as it stands there, also one that is not served."""
    try:
        return None if version.task_text is None else parse_object(version.task_text.encode())
    except JsonRefused:
        return None


def _refused(version: VersionRecord, reason: str) -> Conflict:
    label = f"{version.name}:{version.number}"
    return Conflict(f"the task.json of {label} cannot be served: {reason}")
