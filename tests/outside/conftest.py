"""What a suite is told of the servers it runs against. Each suite has a Python of its own.

Nothing of Quickchange is imported here or in the suites: they are what other people's programs are.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Site:
    """Two servers on one tiny float32 base: one is open, one is small and has a key.

    `adapters` are the folders of what both serve, by name.
    """

    url: str
    base: str
    base_folder: Path
    adapters: dict[str, Path]
    keyed_url: str
    key: str


@pytest.fixture(scope="session")
def site() -> Site:
    """Read the site from the file that the runner wrote."""
    told = json.loads(Path(os.environ["OUTSIDE_SITE"]).read_text(encoding="utf-8"))
    adapters = {name: Path(folder) for name, folder in told.pop("adapters").items()}
    return Site(**{**told, "base_folder": Path(told["base_folder"])}, adapters=adapters)
