"""What is asked of a server: prompts, the number of clients, and which adapter a request uses.

Every benchmark takes its work from here, so that their tables can be laid side by side.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_SCENARIOS = "base:1,base:16,1:1,1:16,8:16,32:32"
_WORD_TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education foot boy age policy "
    "music market sense nation plan college interest death experience effect use class control "
    "field development role effort rate heart drug show leader light voice wife whole police mind"
)
WORDS = tuple(_WORD_TEXT.split())


@dataclass(frozen=True, slots=True)
class Scenario:
    """So many clients in a closed loop over so many adapters in turn; no adapters is the base.

    `is_merged`: the one adapter was merged into a copy of the weights before.
    """

    num_adapters: int
    num_clients: int
    is_merged: bool = False

    @property
    def label(self) -> str:
        """The scenario as `parse` reads it."""
        mix = "merged" if self.is_merged else str(self.num_adapters or "base")
        return f"{mix}:{self.num_clients}"

    @property
    def title(self) -> str:
        """The scenario in words."""
        plural = "" if self.num_clients == 1 else "s"
        return f"{self._mix_title}, {self.num_clients} client{plural}"

    @property
    def _mix_title(self) -> str:
        if self.is_merged:
            return "1 adapter, merged"
        if not self.num_adapters:
            return "base"
        return f"{self.num_adapters} adapter" + ("" if self.num_adapters == 1 else "s")

    def adapter_of(self, request_index: int) -> int | None:
        """Return which adapter a request uses, round-robin; None is the base."""
        return request_index % self.num_adapters if self.num_adapters else None


def parse_scenario(text: str) -> Scenario:
    """Read `base:16`, `8:16` or `merged:1`: adapters, then clients.

    Raises: ValueError.
    """
    mix, _, clients = text.strip().partition(":")
    named = {"base": 0, "merged": 1}
    if not clients.isdecimal() or int(clients) < 1 or not (mix in named or mix.isdecimal()):
        raise ValueError(f"{text!r} is no scenario: write adapters:clients, as in base:1 or 8:16")
    num_adapters = named[mix] if mix in named else int(mix)
    return Scenario(num_adapters, int(clients), is_merged=mix == "merged")


def parse_scenarios(text: str) -> tuple[Scenario, ...]:
    """Read a comma-separated list of scenarios.

    Raises: ValueError.
    """
    return tuple(parse_scenario(part) for part in text.split(","))


def max_adapters(scenarios: Sequence[Scenario]) -> int:
    """Return how many adapters must be there for all scenarios."""
    return max((scenario.num_adapters for scenario in scenarios), default=0)


def adapter_name(index: int) -> str:
    """Return the name of a benchmark's adapter."""
    return f"bench-{index:03d}"


class Prompts:
    """Random words, never the same prompt twice, so that no server can reuse its KV cache."""

    def __init__(self, num_words: int, seed: int) -> None:
        self.num_words = num_words
        self._random = random.Random(seed)

    def take(self) -> str:
        """Return the next prompt."""
        return " ".join(self._random.choices(WORDS, k=self.num_words))
