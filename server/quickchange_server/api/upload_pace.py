"""How slowly a body may come: nobody keeps a half file and a connection here for ever."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from quickchange_server.errors import TooSlow

KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class UploadPace:
    """After `grace_s`, the mean rate so far must be at least `min_bytes_per_s`; `max_s` ends it."""

    grace_s: float = 30.0
    min_bytes_per_s: float = 16.0 * KIB
    max_s: float = 3600.0

    def allowed_s(self, num_bytes: int) -> float:
        """Return how long an upload of which so many bytes came may have taken."""
        return min(self.grace_s + num_bytes / self.min_bytes_per_s, self.max_s)

    async def watch(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass a body on.

        Raises: TooSlow.
        """
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        num_bytes = 0
        while True:
            try:
                async with asyncio.timeout_at(started_s + self.allowed_s(num_bytes)):
                    chunk = await anext(body, None)
            except TimeoutError as error:
                raise self.refusal(num_bytes, loop.time() - started_s) from error
            if chunk is None:
                return
            num_bytes += len(chunk)
            yield chunk

    def refusal(self, num_bytes: int, seconds: float) -> TooSlow:
        """Return what somebody is told of whom so many bytes came in so long."""
        return TooSlow(
            f"only {num_bytes} bytes of the body came in {seconds:.0f} s; after "
            f"{self.grace_s:g} s at least {self.min_bytes_per_s:g} bytes a second are wanted, "
            f"and all of it within {self.max_s:g} s"
        )
