"""Versions on their way out: refused to new requests at once, freed when their last one ended."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from quickchange_server.engine.interface import ResidentAdapter
from quickchange_server.engine.residency import AdapterResidency

Freed = ResidentAdapter | None
Call = Callable[[Callable[[], None]], "Future[None]"]


class Departures:
    """Unloads that were asked for. `call` runs a function on the engine thread, between steps."""

    def __init__(self, residency: AdapterResidency, call: Call) -> None:
        self._residency = residency
        self._call = call
        self._draining: dict[str, list[Future[Freed]]] = {}
        self._being_freed: list[list[Future[Freed]]] = []

    def begin(self, digest: str) -> "Future[Freed]":
        """Refuse new requests for a version; resolves with what was freed when it is given back.

        Runs from any thread; the refusal holds when this returns.
        """
        self._residency.start_leaving(digest)
        done: Future[Freed] = Future()
        done.set_running_or_notify_cancel()  # from here on nobody can cancel it

        def start() -> None:
            self._draining.setdefault(digest, []).append(done)
            self.finish()

        started = self._call(start)
        if started.done() and started.exception() is not None:
            done.set_exception(started.exception())
        return done

    def finish(self) -> None:
        """Free what nobody uses any more; on the engine thread, after each step."""
        for digest in [d for d in self._draining if self._residency.can_leave(d)]:
            waiting = self._draining.pop(digest)
            self._being_freed.append(waiting)
            self._residency.finish_leaving(digest, partial(self._end, waiting))

    def stop(self, error: Exception) -> None:
        """Let nobody go on waiting."""
        for waiting in (*self._draining.values(), *self._being_freed):
            for done in waiting:
                done.set_exception(error)

    def _end(self, waiting: "list[Future[Freed]]", freed: Freed) -> None:
        self._being_freed = [each for each in self._being_freed if each is not waiting]
        for done in waiting:
            done.set_result(freed)
