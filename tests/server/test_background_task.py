"""What runs in the background ends when it is stopped, and never unheard."""

import asyncio
import logging

import pytest
from quickchange_server.background_task import BackgroundTask


async def test_it_ends_when_it_is_stopped_and_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = []

    async def work() -> None:
        steps.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("ended")

    task = BackgroundTask(work)
    await task.stop()
    task.start()
    await asyncio.sleep(0)
    await task.stop()
    await task.stop()
    assert steps == ["begun", "ended"]
    assert not caplog.records


async def test_an_end_by_itself_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise RuntimeError("a mistake of ours")

    task = BackgroundTask(work)
    with caplog.at_level(logging.ERROR):
        task.start()
        await asyncio.sleep(0.01)
    await task.stop()
    assert "has ended by itself" in caplog.text
    assert "a mistake of ours" in caplog.text
