"""The task that a version carries, read from its record in memory. Opens no file."""

from quickchange_adapters.records import VersionRecord
from quickchange_adapters.task import Task, stored_task

from quickchange_server.errors import Conflict


def read_version_task(version: VersionRecord) -> Task | None:
    """Return what a version's task.json says; None when it has none.

    Raises: Conflict for one that another version of this program accepted and this one would not:
    serving without it would give other answers than were trained.
    """
    if version.task_text is None:
        return None
    reading = stored_task(version.task_text)
    if reading.task is None:
        raise Conflict(
            f"this server cannot read the task.json of {version.name}:{version.number} "
            f"({reading.problems[0].message}): use the version that took it, or upload it again"
        )
    return reading.task
