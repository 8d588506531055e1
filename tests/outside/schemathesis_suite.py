"""`schemathesis` over /openapi.json: no 5xx, and nothing answered that is not documented.

It sends what the description allows and what it forbids to every route of the server with a key,
which it may change as it likes.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
NUM_EXAMPLES = os.environ.get("OUTSIDE_EXAMPLES", "15")
THERE = """\
[parameters]
"path.name" = "ada"
"path.version" = 1
"path.alias" = "default"
"path.file" = "adapter_config.json"
"""
"""Makes it ask for an adapter that is there, which it would never guess."""


def run(site: Any, folder: Path, config: str, *filters: str) -> None:
    """Run it and show what it found."""
    (folder / "schemathesis.toml").write_text(config, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("schemathesis")), "run"]
    command += [f"{site.keyed_url}/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--header", f"Authorization: Bearer {site.key}", *filters]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", NUM_EXAMPLES]
    command += ["--seed", "1", "--request-timeout", "60", "--continue-on-failure"]
    command += ["--suppress-health-check", "all", "--warnings", "off"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3000)
    print(done.stdout[-20_000:])
    assert done.returncode == 0, done.stderr[-2_000:]


def test_routes_of_an_adapter_that_is_there_answer_as_documented(site: Any, tmp_path: Path) -> None:
    inside = ["--include-path-regex", r"^/v1/adapters/\{name\}", "--exclude-method", "DELETE"]
    run(site, tmp_path, THERE, *inside)


def test_every_route_answers_as_it_is_documented(site: Any, tmp_path: Path) -> None:
    run(site, tmp_path, "")
