"""Prints what the server and the client need, and not they themselves.

python tools/requirements.py [EXTRA …] > requirements.txt

So an image can have a layer of libraries that stays when only code changes.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = (ROOT / "pyproject.toml", ROOT / "clients/python/pyproject.toml")


def requirements(extras: list[str]) -> list[str]:
    """Return the requirements of both distributions, with those of the server's extras.

    Raises: KeyError for an extra that is none.
    """
    server, client = (tomllib.loads(file.read_text())["project"] for file in PROJECTS)
    optional = server["optional-dependencies"]
    wanted = [each for extra in extras for each in optional[extra]]
    return [*server["dependencies"], *wanted, *client["dependencies"]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
