"""A connection to PostgreSQL that does not wait for ever, whatever became of the server.

The server's own timeouts end slow statements, and TCP notices a dead peer; a server that is frozen
(a paused machine, a stopped process) keeps its sockets open and does neither.
"""

import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

T = TypeVar("T")


class BoundedConnection(psycopg.Connection[Any]):
    """Breaks when a reply takes longer than `reply_s`; the pool then makes a new one."""

    reply_s = 20.0

    def wait(self, gen: PQGen[T], *args: Any, **options: Any) -> T:
        """Run one exchange with the server.

        Raises: psycopg.OperationalError when the time is up; the connection is closed.
        """
        deadline_s = time.monotonic() + self.reply_s
        try:
            return super().wait(_until(gen, deadline_s), *args, **options)
        except _NoReply:
            self.close()
            raise


class _NoReply(psycopg.OperationalError):
    """The server said nothing for too long."""


def _until(gen: PQGen[T], deadline_s: float) -> PQGen[T]:
    """Pass an exchange through, until the deadline. psycopg looks in several times a second."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline_s:
                raise _NoReply("the server does not reply")
            wanted = gen.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result
