"""Signals that tests send to their own process reach it."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def hangups_count() -> Iterator[None]:
    """Undo nohup for a test: a run that was started by it is right to stay deaf to SIGHUP."""
    before = signal.getsignal(signal.SIGHUP)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
