"""Frames between two processes over a socket: eight bytes of length, then so many bytes.

Knows nothing of what the bytes mean. Every wait has a deadline.
"""

import socket
import time

LENGTH_BYTES = 8
BLOCK_BYTES = 1 << 16


class JobChannel:
    """One end of a connected pair of sockets."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, data: bytes, deadline_s: float | None = None) -> None:
        """Send one frame; `deadline_s` is a time of the monotonic clock.

        Raises: TimeoutError; OSError when the other end is gone.
        """
        self._wait_until(deadline_s)
        self._socket.sendall(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    def receive(self, max_bytes: int, deadline_s: float | None = None) -> bytes:
        """Return the next frame.

        Raises: TimeoutError; EOFError or OSError when the other end is gone; ValueError when it
        announces more than `max_bytes`.
        """
        length = int.from_bytes(self._read(LENGTH_BYTES, deadline_s), "big")
        if length > max_bytes:
            raise ValueError(f"a frame of {length} bytes; at most {max_bytes} are read")
        return self._read(length, deadline_s)

    def close(self) -> None:
        """Close this end; the other one reads the end of the stream."""
        self._socket.close()

    def _read(self, num_bytes: int, deadline_s: float | None) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            self._wait_until(deadline_s)
            block = self._socket.recv(min(num_bytes - len(data), BLOCK_BYTES))
            if not block:
                raise EOFError("the other end is closed")
            data += block
        return bytes(data)

    def _wait_until(self, deadline_s: float | None) -> None:
        if deadline_s is None:
            self._socket.settimeout(None)
            return
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining_s)
