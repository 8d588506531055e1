"""What a check found, and how checks are run: each by itself, kept as soon as it is there."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu_session import Row, Section, Session

HEADER = ("check", "found", "verdict")
Outcome = tuple[str, bool]
"""What is to be read, and whether it is as it should be."""
Check = Callable[[], Outcome]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, whether it is good."""

    name: str
    figure: str
    is_good: bool
    seconds: float = 0.0

    def row(self) -> Row:
        """Return the line of the table."""
        verdict = "good" if self.is_good else "BAD"
        values = {"check": self.name, "found": self.figure, "is": verdict, "took_s": self.seconds}
        return Row((self.name, self.figure, verdict), values)


class Checks:
    """Runs checks in a session. A bad one is counted among its failures, and the rest goes on."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, section: str, needs_s: float, checks: Mapping[str, Check]) -> None:
        """Run named checks as one section, unless too little time is left."""

        def rows() -> Iterator[Callable[[], Row]]:
            for name, check in checks.items():
                yield partial(self._row, section, name, check)

        self._session.run(Section(section, HEADER, needs_s, rows))

    def _row(self, section: str, name: str, check: Check) -> Row:
        finding = found_by(name, check)
        if not finding.is_good:
            self._session.failures.append(f"{section}: {name}")
        return finding.row()


def found_by(name: str, check: Check) -> Finding:
    """Run a check; one that fails is bad, and says where on the terminal."""
    started_s = time.monotonic()
    try:
        figure, is_good = check()
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        figure, is_good = f"{type(error).__name__}: {error}"[:300], False
    return Finding(name, figure, is_good, round(time.monotonic() - started_s, 3))
