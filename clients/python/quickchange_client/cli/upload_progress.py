"""A progress bar for uploads, beside the output, when someone is looking."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from quickchange_client.multipart import Progress as ProgressCallback


@contextmanager
def upload_progress(*, is_shown: bool) -> Iterator[ProgressCallback | None]:
    """Give a callback that draws on stderr; None when that is no terminal."""
    console = Console(stderr=True)
    if not is_shown or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("uploading", total=None)

        def advance(sent_bytes: int, total_bytes: int) -> None:
            is_sent = sent_bytes == total_bytes
            description = "checking" if is_sent else "uploading"
            bar.update(task, completed=sent_bytes, total=total_bytes, description=description)

        yield advance
