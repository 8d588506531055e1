"""Jobs for a worker process that do what no upload should be able to make it do."""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.report import Report

from tests.adapters.adapter_files import small_spec

SPEC = small_spec()


@dataclass(frozen=True)
class Deed:
    """A job that does `what` and reports what it returns as a warning, in JSON."""

    what: Callable[[], Any]

    @property
    def spec(self) -> BaseSpec:
        return SPEC

    def run(self) -> Report:
        plain = json.dumps(self.what())
        return Report((), (plain,), (), (), (), True, True, 0, SPEC.name)


def do_nothing() -> None:
    """Do what most jobs do to a worker."""


def compute_for_ever() -> None:
    while True:
        pass


def sleep_for_ever() -> None:
    time.sleep(3600)


def take_memory() -> int:
    return len(bytearray(1 << 30))


def read_nothing() -> None:
    raise FileNotFoundError(2, "No such file or directory")


def make_a_mistake() -> None:
    raise KeyError("a mistake of ours")


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


def answer(data: bytes) -> None:
    with socket.socket(fileno=os.dup(0)) as end:
        end.sendall(len(data).to_bytes(8, "big") + data)
    time.sleep(3600)


def answer_nonsense() -> None:
    answer(b'{"report": {"problems": 5}}')


def answer_without_end() -> None:
    with socket.socket(fileno=os.dup(0)) as end:
        end.sendall((1 << 62).to_bytes(8, "big"))
    time.sleep(3600)


def write_a_file() -> str:
    try:
        with Path("/tmp/written-by-a-check").open("wb") as file:
            file.write(b"x")
    except OSError as error:
        return type(error).__name__
    return "written"


def describe_itself() -> dict[str, Any]:
    """Say what the worker has of its parent, and what it took upon itself."""
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listed them
    return {
        "heavy": sorted({"torch", "transformers", "peft", "fastapi"} & sys.modules.keys()),
        "main": getattr(sys.modules["__main__"].__spec__, "name", ""),
        "niceness": os.nice(0),
        "oom_score": int(Path("/proc/self/oom_score_adj").read_text()),
        "descriptors": descriptors,
        "variables": sorted(os.environ),
        "session": os.getsid(0) == os.getpid(),
        "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
        "pid": os.getpid(),
    }
