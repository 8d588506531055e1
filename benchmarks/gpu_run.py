"""How the benchmarks for lent GPUs begin and end: options, a session, what is printed last."""

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.gpu_session import Session
from benchmarks.machine import Machine
from benchmarks.report import Report


def parsed_options(
    description: str | None,
    shapes: Iterable[str],
    kinds: tuple[str, ...],
    budget_s: float,
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> argparse.Namespace:
    """Read the command line: what both have, and what `add_options` adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=sorted(shapes), default="1b", help="of the base")
    parser.add_argument(
        "--only",
        metavar="KINDS",
        type=lambda text: tuple(text.split(",")),
        default=kinds,
        help=f"which kinds of sections, with commas: {', '.join(kinds)} (default: all)",
    )
    parser.add_argument(
        "--budget", type=float, default=budget_s, metavar="SECONDS", help="default: %(default)s"
    )
    out = os.environ.get("OUT")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out) if out else None,
        metavar="FOLDER",
        help="where rows, tables and logs go (default: the folder that OUT names)",
    )
    add_options(parser)
    options = parser.parse_args()
    unknown = set(options.only) - set(kinds)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: choose from {', '.join(kinds)}")
    return options


class GpuRun:
    """One run: its session, and where it runs.

    `grace_s`: behind the budget; then whatever hangs is shown and ended.
    """

    def __init__(self, options: argparse.Namespace, grace_s: float) -> None:
        faulthandler.dump_traceback_later(options.budget + grace_s, exit=True)
        self.session = Session(options.budget, options.out)
        self._machine = Machine.here()
        self._settings = {"base": f"random, shape {options.shape}", "device": options.device}
        print(f"{self._machine.describe()}\n{self._settings}", flush=True)
        self.session.note("machine", self._machine)
        self.session.note("settings", self._settings)

    def end(self, title: str, file_name: str, failed: str) -> None:
        """Write and print all tables, say what was left out or failed, and end the process."""
        session, tables = self.session, "\n\n".join(self.session.tables)
        report = Report(title, self._machine, self._settings, tables, [])
        session.write(file_name, report.markdown())
        print(f"\n{report.markdown()}")
        print(f"left out: {', '.join(session.left_out) or 'nothing'}")
        failures = ", ".join(session.failures) or "nothing"
        print(f"{failed}: {failures}; {session.left_s:.0f} s are left")
        faulthandler.cancel_dump_traceback_later()
        sys.exit(bool(session.failures))
