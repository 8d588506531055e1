"""Tokens on their way from the device to the host, while the device goes on with the next step."""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_PLACES = 2
"""The tokens of one step are read while those of the next one are on their way."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One step's tokens; they stay where they are until the next but one is fetched."""

    place: Tensor
    is_there: torch.cuda.Event | None

    def wait(self) -> list[int]:
        """Return the tokens, as soon as they are there. Raises: what went wrong on the device."""
        if self.is_there is not None:
            self.is_there.synchronize()
        tokens: list[int] = self.place.tolist()
        return tokens


class TokenFetcher:
    """Places on the host, used in turn. On a CPU a fetch is a copy that is done at once."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._places = torch.zeros((NUM_PLACES, max_rows), dtype=torch.long, pin_memory=is_cuda)
        self._events = [
            torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
            for _ in range(NUM_PLACES)
        ]
        self._turn = 0

    def fetch(self, tokens: Tensor) -> Fetch:
        """Queue the transfer of tokens [rows], behind what makes them; nothing waits for it."""
        self._turn = (self._turn + 1) % NUM_PLACES
        place, event = self._places[self._turn, : tokens.shape[0]], self._events[self._turn]
        place.copy_(tokens, non_blocking=True)
        if event is not None:
            event.record()
        return Fetch(place, event)
