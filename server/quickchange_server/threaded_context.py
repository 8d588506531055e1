"""A context whose beginning blocks, entered from the event loop."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TypeVar

from quickchange_server.answers import as_answers

T = TypeVar("T")


@asynccontextmanager
async def in_thread(threads: Executor, context: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter a context in one of some threads; leaving it, when the block ends, must not block.

    What entering raises comes as the server's errors. A caller that is cancelled meanwhile leaves
    nothing open.
    """
    entering = asyncio.get_running_loop().run_in_executor(threads, context.__enter__)
    try:
        with as_answers():
            value = await asyncio.shield(entering)
    except asyncio.CancelledError:
        entering.add_done_callback(lambda done: _leave_late(context, done))
        raise
    try:
        yield value
    finally:
        context.__exit__(None, None, None)


def _leave_late(context: AbstractContextManager[T], entered: "asyncio.Future[T]") -> None:
    if not entered.cancelled() and entered.exception() is None:
        context.__exit__(None, None, None)
