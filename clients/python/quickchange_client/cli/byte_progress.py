"""A progress bar for long work, beside the output, when someone is looking."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)

from quickchange_client.multipart import Progress as ProgressCallback


@contextmanager
def byte_progress(
    doing: str, at_the_end: str | None = None, *, is_shown: bool
) -> Iterator[ProgressCallback | None]:
    """Give a callback that draws on stderr; None when that is no terminal.

    `doing` is shown beside the bar, and `at_the_end` when all bytes are through.
    """
    console = Console(stderr=True)
    if not is_shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(doing, total=None)

        def advance(done_bytes: int, total_bytes: int) -> None:
            is_done = done_bytes == total_bytes
            description = (at_the_end or doing) if is_done else doing
            bar.update(task, completed=done_bytes, total=total_bytes, description=description)

        yield advance


@contextmanager
def count_progress(doing: str, *, is_shown: bool) -> Iterator[ProgressCallback | None]:
    """Give a callback for `(done, total)` things; None when stderr is no terminal."""
    console = Console(stderr=True)
    if not is_shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
