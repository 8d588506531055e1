"""The client is light: no torch, no server, and `quickchange list` starts quickly."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "quickchange_server", "quickchange_adapters")
REPORT = "import json, sys; print(json.dumps(sorted(sys.modules)))"


def modules_after(statements: str) -> set[str]:
    """Return the modules loaded in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statements}\n{REPORT}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statements",
    [
        "import quickchange_client",
        "import quickchange_client.cli",
        "from typer.testing import CliRunner; from quickchange_client.cli import app;"
        "CliRunner().invoke(app, ['list', '--url', 'http://127.0.0.1:9'])",
        "from typer.testing import CliRunner; from quickchange_client.cli import app;"
        "CliRunner().invoke(app, ['--help'])",
    ],
    ids=["package", "command", "list", "help"],
)
def test_nothing_heavy_is_imported(statements: str) -> None:
    modules = modules_after(statements)
    assert "quickchange_client" in modules
    assert modules.isdisjoint(HEAVY)


def test_the_check_would_notice() -> None:
    assert "numpy" in modules_after("import quickchange_client, numpy")
