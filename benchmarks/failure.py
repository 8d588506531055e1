"""How a benchmark says that it cannot go on: one sentence instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class BenchmarkFailure(Exception):
    """What was to be measured did not do what was asked; the message says what happened."""


@contextmanager
def exit_on_failure() -> Iterator[None]:
    """Print a failure, or a broken connection, as one sentence and exit with 1."""
    try:
        yield
    except* (BenchmarkFailure, OSError, EOFError) as failures:
        sys.exit(f"error: {failures.exceptions[0]}")
