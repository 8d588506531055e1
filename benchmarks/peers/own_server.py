"""Quickchange itself, as `quickchange serve` runs it with its defaults."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from benchmarks.peers.system import ServerSystem
from benchmarks.server_process import Target, serving
from benchmarks.workload import adapter_name


class OwnServer(ServerSystem):
    """The server of this source tree; its adapters are uploaded over REST."""

    name = "quickchange"

    def prepare(self) -> None:
        """Do nothing: it is what runs this."""

    def describe(self) -> str:
        """Return the version."""
        return f"quickchange-server {version('quickchange-server')}, default options"

    @contextmanager
    def serving(self, num_adapters: int) -> Iterator[Target]:
        """Run the server and upload the adapters."""
        with serving(["--model", str(self.job.base), "--device", "cpu"]) as target:
            for index in range(num_adapters):
                target.upload(adapter_name(index), self.job.adapters[index])
            yield target
