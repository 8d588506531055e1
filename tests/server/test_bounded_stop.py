"""A stop ends in time, whatever a store or catalog holds up."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

from quickchange_adapters.store import LocalStore, StagedFile

from tests.server.service_world import World

HELD = """
import concurrent.futures, threading
from quickchange_server.serving import bound_exit
held = concurrent.futures.ThreadPoolExecutor(1).submit(threading.Event().wait)
bound_exit(0.2)
print("over")
"""


class DeafStore(LocalStore):
    """A store that does not take what it is given."""

    answer = threading.Event()
    is_asked = threading.Event()

    def put(self, staged: StagedFile) -> None:
        self.is_asked.set()
        self.answer.wait()
        super().put(staged)


async def test_a_store_that_takes_nothing_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    world = World(tmp_path, open_store=DeafStore)
    world.service._uploader.finish_s = 0.1
    await world.start()
    upload = asyncio.create_task(world.upload("held"))
    await asyncio.to_thread(DeafStore.is_asked.wait)
    try:
        await asyncio.wait_for(world.service.stop(), 30)
        (outcome,) = await asyncio.gather(upload, return_exceptions=True)
        assert isinstance(outcome, BaseException)
    finally:
        DeafStore.answer.set()


def test_a_process_ends_although_a_thread_waits_for_ever() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELD], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert done.stdout == "over\n"
    assert "did not answer" in done.stderr
