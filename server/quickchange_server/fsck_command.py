"""The command `fsck`: checks a store and its catalog, whether or not a server runs on them.

What it needs is imported when it runs, so that other commands begin as fast as before.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer
from quickchange_adapters.errors import StoreUnavailable
from quickchange_adapters.findings import CheckReport, Finding

from quickchange_server.config import OPTIONS, ServerConfig, load_config
from quickchange_server.errors import QuickchangeError

SOUND, PROBLEMS, NOT_CHECKED = 0, 1, 2


def fsck(
    store: Annotated[
        str | None, typer.Option(metavar=OPTIONS["store"].metavar, help=OPTIONS["store"].help)
    ] = None,
    catalog: Annotated[
        str | None, typer.Option(metavar=OPTIONS["catalog"].metavar, help=OPTIONS["catalog"].help)
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML file with any of the settings.")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Set wrong counts right, remove what no version needs, put damaged files aside.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check that every stored adapter has its bytes, and that names and bytes agree.

    Reads every file of every version and compares it with its sha256. Changes
    nothing unless --repair is given; a server may run meanwhile. What is younger
    than an hour may belong to an upload under way, and is left alone.

    Exit codes: 0 nothing is wrong, or all of it was repaired; 1 something is
    wrong; 2 there is nothing to check under these names, or it does not answer.

    For example:

    quickchange fsck

    quickchange fsck --store /srv/adapters --repair

    quickchange fsck --json | jq .problems
    """
    try:
        settings = load_config({"store": store, "catalog": catalog, "config": config})
        report = _check(settings, repair)
    except (QuickchangeError, StoreUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(NOT_CHECKED) from error
    print(json.dumps(report.to_json(), indent=2) if as_json else _text(report))
    raise typer.Exit(SOUND if report.is_ok else PROBLEMS)


def _check(settings: ServerConfig, repair: bool) -> CheckReport:
    from quickchange_adapters.store_check import StoreCheck

    from quickchange_server.storage import open_existing_storage

    check = StoreCheck(*open_existing_storage(settings))
    num_bytes = 0
    with suppress(StoreUnavailable):  # a damaged catalog is for `run` to tell
        num_bytes = check.num_bytes()
    with _progress(num_bytes) as advance:
        return check.run(repair=repair, on_progress=advance)


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Give what draws a bar on stderr, when somebody looks at it."""
    if not sys.stderr.isatty():
        yield lambda read: None
        return
    with typer.progressbar(length=num_bytes, label="Reading", file=sys.stderr) as bar:
        yield bar.update


def _text(report: CheckReport) -> str:
    lines = [line for finding in report.findings for line in _lines(finding)]
    left = sum(not finding.is_repaired for finding in report.findings)
    problems = f"{left} problem{'' if left == 1 else 's'}" if left else "no problems"
    looked = f"{report.num_versions} versions, {report.num_blobs} files, {report.num_bytes} bytes"
    repaired = len(report.findings) - left
    also = f", {repaired} repaired" if repaired else ""
    return "\n".join([*lines, f"{looked}: {problems}{also}"])


def _lines(finding: Finding) -> Iterator[str]:
    state = "repaired" if finding.is_repaired else "problem"
    yield f"{state}: {finding.code}: {finding.where}: {finding.message}"
    if finding.used_by:
        yield f"  needed by: {', '.join(finding.used_by)}"
    if finding.hint:
        yield f"  {finding.hint}"
