"""How the commands of training end: by a sentence and a code, or by a signal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import typer
from quickchange_adapters.errors import AdapterError, CannotTrain
from quickchange_adapters.training.stop_signals import Interrupted, StopSignals

from quickchange_server.errors import CannotStart, QuickchangeError


@contextmanager
def exit_on_error() -> Iterator[StopSignals]:
    """Print what a user can cause as one sentence, and exit with 1, or 2 for wrong input.

    Signals exit as shells expect it: with 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    signals = StopSignals()
    try:
        with signals.obeyed():
            yield signals
    except (CannotTrain, CannotStart) as error:
        say(f"error: {error}")
        raise typer.Exit(error.exit_code) from error
    except (AdapterError, QuickchangeError, OSError) as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    except Interrupted as interrupted:
        raise typer.Exit(interrupted.exit_code) from None


def say(sentence: str) -> None:
    """Print a sentence beside the output; a terminal that is gone is no reason to stop."""
    with suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)
