"""What this process has in memory, by part, so that the parts add up to its resident size.

| part | where the number is from |
|---|---|
| code | the system: pages of libraries and other files |
| runtime | the system: what was there before the base: Python, its modules, the tokenizer |
| base, merged, adapter_host | the engine's own counts |
| adapter_pool, kv | the system: pages of them that were ever written |
| heap_free | the C library: freed, and kept for the next allocation |
| rest | what is left; below zero where another part counts too much |

Linux only; elsewhere there is the total alone.
"""

import ctypes
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
KEEP_S = 5.0


class ProcessMemory:
    """Parts of this process's memory. Make it once all is imported, before the base is read."""

    def __init__(self) -> None:
        self._runtime_bytes = _status_bytes().get("RssAnon", 0)
        self._free_bytes = _heap_free_bytes()
        self._lock = threading.Lock()
        self._kept: tuple[float, dict[str, int]] = (float("-inf"), {})

    def parts(self, engine_bytes: Callable[[], dict[str, int]]) -> dict[str, int]:
        """Return bytes by part, and their `total`. Takes milliseconds."""
        status = _status_bytes()
        total = status.get("VmRSS") or psutil.Process().memory_info().rss
        if not status:
            return {"total": total}
        parts = {
            "code": status["RssFile"] + status["RssShmem"],
            "runtime": self._runtime_bytes,
            **engine_bytes(),
            "heap_free": max(_heap_free_bytes() - self._free_bytes, 0),
        }
        return {**parts, "rest": total - sum(parts.values()), "total": total}

    def recent(self, engine_bytes: Callable[[], dict[str, int]]) -> dict[str, int]:
        """Return the same, at most five seconds old; for who asks often."""
        with self._lock:
            made_s, parts = self._kept
            if time.monotonic() - made_s > KEEP_S:
                parts = self.parts(engine_bytes)
                self._kept = time.monotonic(), parts
            return parts


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2 (mallinfo(3))."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _heap_free_bytes() -> int:
    """Return what the C library holds free; 0 where it cannot tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    return int(mallinfo().fordblks)


def _status_bytes() -> dict[str, int]:
    """Return the resident sizes of /proc/self/status; nothing where there is none."""
    try:
        text = STATUS.read_text()
    except OSError:
        return {}
    found = re.findall(r"^(VmRSS|RssAnon|RssFile|RssShmem):\s+(\d+) kB", text, re.MULTILINE)
    return {name: int(size) * 1024 for name, size in found}
