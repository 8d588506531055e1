"""The tensors of one adapter version, ready to be served. Knows nothing of files."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's low-rank update, with the scaling folded into `lora_b`.

    lora_a [rank, in], lora_b [out, rank]: PEFT's orientation.
    """

    lora_a: Tensor
    lora_b: Tensor

    @property
    def rank(self) -> int:
        """Rank of this pair."""
        return self.lora_a.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both tensors."""
        return self.lora_a.nbytes + self.lora_b.nbytes


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One version: its digest and a pair per targeted module (module path as in the base)."""

    digest: str
    pairs: Mapping[str, LoraPair]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(pair.num_bytes for pair in self.pairs.values())

    @property
    def max_rank(self) -> int:
        """Largest rank over all modules."""
        return max((pair.rank for pair in self.pairs.values()), default=0)
