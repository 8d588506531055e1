"""Real servers that are killed at named points, each forked from a parent that imported all of it.

    python -m tests.server.crash_server

Reads a line of JSON for each server: `arguments` of `serve`, the file of its `log`, and the `point`
at which it kills itself with SIGKILL once `num_published` uploads were committed (null: never).
Writes the server's process id, and when it has ended its wait status.
"""

import json
import os
import signal
import sys
from typing import NoReturn

from quickchange_adapters import fault_points
from quickchange_server.thread_affinity import prepare_threads

prepare_threads()

import quickchange_server.serving  # noqa: E402, F401  what takes seconds, once
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from quickchange_server.cli import app  # noqa: E402


class Killer:
    """Kills its process at a point, after so many commits of uploads."""

    def __init__(self, point: str | None, num_published: int) -> None:
        self._point = point
        self._num_left = num_published

    def __call__(self, reached: str) -> None:
        """Look at a point that was reached."""
        if reached == self._point and self._num_left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if reached == "after publish.commit":
            self._num_left -= 1


def serve(order: dict[str, object]) -> NoReturn:
    """Become a server."""
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    point, num_published = order["point"], order["num_published"]
    assert point is None or isinstance(point, str)
    assert isinstance(num_published, int)
    fault_points.observe(Killer(point, num_published))
    words = order["arguments"]
    assert isinstance(words, list)
    app(["serve", *words])
    raise AssertionError("the command returns by an exit")


def main() -> None:
    """Start one server after the other."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            serve(json.loads(line))
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
