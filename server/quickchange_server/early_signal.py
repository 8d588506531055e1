"""SIGTERM before a server is ready: there is nothing to drain, so it ends at once.

Without a handler the first process of a container would not even notice the signal.
"""

import os
import signal
import sys


def end_at_sigterm() -> None:
    """End this process with code 0 at a SIGTERM, until somebody else takes the signal."""
    signal.signal(signal.SIGTERM, _end)


def _end(_number: int, _frame: object) -> None:
    sys.stderr.write("stopped before it was ready\n")
    sys.stderr.flush()
    os._exit(0)  # what was begun is as safe as at a kill; loading may hold threads for long
