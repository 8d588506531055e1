"""Traffic with one hot adapter: which adapter each request asks for, by the hot one's share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

HOT = 0
NUM_COLD = 3


@dataclass(frozen=True, slots=True)
class HotMix:
    """So many clients; a share of requests asks for adapter 0, others for the base or 1 to 3."""

    share: float
    num_clients: int

    @property
    def title(self) -> str:
        """The mix in words."""
        plural = "" if self.num_clients == 1 else "s"
        return f"{self.share:.0%} hot, {self.num_clients} client{plural}"

    def draw(self, count: int, seed: int) -> list[int | None]:
        """Return the adapters of the next requests; None is the base. Equal seeds draw alike."""
        rng = random.Random(f"{seed} {self.share}")
        num_hot = round(self.share * count)  # the share is kept, only the order is drawn
        cold: Sequence[int | None] = (None, *range(1, NUM_COLD + 1))
        drawn = [HOT] * num_hot + [cold[index % len(cold)] for index in range(count - num_hot)]
        rng.shuffle(drawn)
        return drawn


def read_mixes(shares: str, clients: str) -> tuple[HotMix, ...]:
    """Read shares from 0 to 1 and numbers of clients, with commas; return all pairs.

    Raises: ValueError.
    """
    mixes = tuple(HotMix(float(s), int(c)) for c in clients.split(",") for s in shares.split(","))
    wrong = [mix for mix in mixes if not (0 <= mix.share <= 1 and mix.num_clients >= 1)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no mix: shares are from 0 to 1, clients at least 1")
    return mixes
