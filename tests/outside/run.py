"""Run other people's clients, unmodified, against a real server: `make test-outside`.

Each suite gets an environment of its own and servers of its own. What cannot be installed is
skipped, with pip's reason; what is skipped is counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.outside.environments import (
    FOLDER,
    ROOT,
    SUITES,
    CannotInstall,
    Suite,
    make_environment,
)
from tests.outside.served_site import served_site

SUITE_S = 3600


@dataclass(frozen=True)
class Outcome:
    """How a suite went. `reason`: why it was skipped as a whole."""

    suite: Suite
    version: str = ""
    num_passed: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    reason: str = ""

    def row(self) -> str:
        """Return a line of the table."""
        client = f"`{self.suite.client}` {self.version}".strip()
        if self.reason:
            return f"| {client} | skipped: {self.reason} | | | |"
        counts = f"{self.num_passed} | {self.num_failed} | {self.num_skipped}"
        return f"| {client} | {counts} | {self.seconds:.0f} s |"


def run_suite(suite: Suite) -> Outcome:
    """Install, serve, run."""
    print(f"\n== {suite.name}: installing {', '.join(suite.packages)}", flush=True)
    try:
        version = make_environment(suite)
    except CannotInstall as error:
        print(f"== {suite.name}: SKIPPED, it cannot be installed: {error}", flush=True)
        return Outcome(suite, reason=f"cannot be installed: {error}")
    print(f"== {suite.name}: {suite.client} {version}", flush=True)
    started_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder, served_site(Path(folder)) as site:
            counts = _run_tests(suite, site, Path(folder) / "junit.xml")
    except (TimeoutError, subprocess.TimeoutExpired, AssertionError, httpx.HTTPError) as error:
        print(f"== {suite.name}: FAILED: {error!r}", flush=True)
        counts = (0, 1, 0)
    return Outcome(suite, version, *counts, time.monotonic() - started_s)


def _run_tests(suite: Suite, site: Path, report: Path) -> tuple[int, int, int]:
    """Run a suite's tests in its environment; return how many passed, failed, were skipped."""
    here = suite.file.parent
    command = [str(suite.python), "-m", "pytest", "-c", str(here / "pytest.ini")]
    command += ["--rootdir", str(here), f"--junitxml={report}", "-s", str(suite.file)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {**offline, "OUTSIDE_SITE": str(site), "HF_HOME": str(site.parent / "hf")}
    done = subprocess.run(command, env=env, cwd=site.parent, timeout=SUITE_S)
    if not report.exists():
        return 0, max(done.returncode, 1), 0
    total = ElementTree.parse(report).getroot().find("testsuite")
    assert total is not None
    tests, failures, errors, skipped = (
        int(total.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    return tests - failures - errors - skipped, failures + errors, skipped


def main() -> int:
    """Run the suites that are named, or all; return 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [each.name for each in SUITES]
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(names)}")
    wanted = parser.parse_args().suites or names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"there is no suite {unknown[0]!r}; use {', '.join(names)}")
    os.chdir(ROOT)
    FOLDER.mkdir(exist_ok=True)
    outcomes = [run_suite(each) for each in SUITES if each.name in wanted]
    table = ["| client | passed | failed | skipped | time |", "|---|---|---|---|---|"]
    print("\n".join(["", *table, *(each.row() for each in outcomes)]))
    num_skipped = sum(bool(each.reason) for each in outcomes)
    num_failed = sum(bool(each.num_failed) for each in outcomes)
    print(f"\n{len(outcomes)} suites: {num_failed} failed, {num_skipped} skipped")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
