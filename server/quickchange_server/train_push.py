"""Uploading what was trained. What is wrong with the wish is said before anything is trained."""

import http.client
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import typer
from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.names import adapter_name_problem, alias_problem

from quickchange_server.train_exit import say

ANSWER_TIMEOUT_S = 5.0


class CannotPush(CannotTrain):
    """What is trained could not be uploaded as it is asked for."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where an adapter is to go. `command`: the client's own, which stands alone."""

    command: str
    url: str
    name: str
    alias: str | None

    def push(self, folder: Path) -> None:
        """Upload, and show the server's report.

        Raises: typer.Exit with the client's exit code.
        """
        words = ["push", str(folder), "--name", self.name, "--url", self.url]
        words += ["--alias", self.alias] if self.alias else []
        done = subprocess.run([self.command, *words])
        if done.returncode != 0:
            say(f"the adapter is in {folder}; to try again: quickchange {' '.join(words)}")
            raise typer.Exit(done.returncode)


def push_target(
    url: str | None, name: str | None, alias: str | None, output: Path
) -> PushTarget | None:
    """Return where to upload to; None if nobody asked. A server that is silent is only warned of.

    Raises: CannotPush.
    """
    if url is None:
        if name or alias:
            raise CannotPush(f"{'--name' if name else '--alias'} goes with --push URL")
        return None
    chosen = name or output.resolve().name
    problem = adapter_name_problem(chosen) or (alias_problem(alias) if alias else None)
    if problem is not None:
        hint = "" if name else "; give --name"
        raise CannotPush(f"{problem.message}: {problem.hint}{hint}")
    target = PushTarget(_client(), url.rstrip("/"), chosen, alias)
    if not _answers(target.url):
        say(f"warning: {target.url} does not answer now; it must when training has ended")
    return target


def _client() -> str:
    beside = Path(sys.executable).with_name("quickchange")
    found = str(beside) if beside.exists() else shutil.which("quickchange")
    if found is None:
        raise CannotPush("uploading needs the client: pip install quickchange-client")
    return found


def _answers(url: str) -> bool:
    """Whether a server is there; whatever it says, it answers.

    Raises: CannotPush for what is no URL.
    """
    if not url.startswith(("http://", "https://")):
        raise CannotPush(f"--push {url!r} must begin with http:// or https://")
    try:
        with urllib.request.urlopen(f"{url}/livez", timeout=ANSWER_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    except ValueError as error:
        raise CannotPush(f"--push {url!r} is no URL: {error}") from error
