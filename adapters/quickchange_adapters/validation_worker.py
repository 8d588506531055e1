"""The process that checks uploads: takes jobs from a socket, does them, answers in JSON.

`ValidationProcess` starts it. It never loads torch, holds nothing of the server's, and ends with
its socket: when the server ends, however it ends, also in the middle of a job.
"""

import contextlib
import json
import math
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from quickchange_adapters.job_channel import JobChannel
from quickchange_adapters.limits import CheckLimits

# What a job needs is loaded before the first one comes, and before memory is limited.
from quickchange_adapters.validate import ValidationJob as ValidationJob

NICENESS = 10
MAX_FILES = 64
MAX_JOB_BYTES = 1 << 26
READY = b"ready"


def main() -> None:
    """Do jobs until the socket on standard input ends; the argument is CheckLimits as JSON."""
    limits = CheckLimits(**json.loads(sys.argv[1]))
    channel = JobChannel(socket.socket(fileno=0))
    jobs: SimpleQueue[bytes] = SimpleQueue()
    be_modest()
    threading.Thread(target=_read_jobs, args=(channel, jobs), daemon=True).start()
    warm_up()
    limit_memory(limits.max_memory_bytes)
    channel.send(READY)
    while True:
        channel.send(_answer(jobs.get(), limits))


def be_modest() -> None:
    """Take what others leave: cores after the engine, files only to read, memory given up first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a drain finishes the uploads that it finds
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_FILES),
    ):
        resource.setrlimit(limit, (value, value))


def warm_up() -> None:
    """Have the matrix library take its buffers, which are no job's."""
    values = np.ones((256, 512))
    _ = values @ values.T, values @ np.ones((512, 256))


def limit_memory(max_bytes: int) -> None:
    """Let this process take so many bytes more than it has now, and none beyond."""
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    ceiling = num_pages * resource.getpagesize() + max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))


def limit_cpu(max_s: int) -> None:
    """Let this process compute so many seconds more; then SIGXCPU ends it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + max_s, hard))


def _read_jobs(channel: JobChannel, jobs: "SimpleQueue[bytes]") -> None:
    """Queue what comes; with the end of the stream the process ends, whatever it is doing."""
    try:
        while True:
            jobs.put(channel.receive(MAX_JOB_BYTES))
    except BaseException:
        os._exit(0)


def _answer(data: bytes, limits: CheckLimits) -> bytes:
    limit_cpu(limits.max_cpu_s)
    try:
        answer: dict[str, Any] = {"report": asdict(pickle.loads(data).run())}
    except MemoryError:
        answer = {"exhausted": "memory"}
    except OSError as error:
        answer = {"unreadable": error.strerror or type(error).__name__}
    except Exception:
        answer = {"mistake": traceback.format_exc()}
    return json.dumps(answer).encode()


if __name__ == "__main__":
    main()
