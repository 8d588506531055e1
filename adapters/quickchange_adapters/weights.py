"""The tensors of one adapter version, ready to be served. Knows nothing of files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """One version: its digest and a pair per targeted module (module path as in the base).

    Attributes:
        digest: the version's.
        pairs: low-rank updates, also of the head (lora_b [vocabulary, rank]) and the embedding
            (lora_a [rank, vocabulary], lora_b [width, rank]).
        added_biases: [out], added to the module's output (PEFT's `lora_bias`, scaling folded in).
        replaced_biases: [out], stands for the base's own bias (PEFT's `bias`).
    """

    digest: str
    pairs: Mapping[str, LoraPair]
    added_biases: Mapping[str, Tensor] = field(default_factory=dict)
    replaced_biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        biases = (*self.added_biases.values(), *self.replaced_biases.values())
        return sum(p.num_bytes for p in self.pairs.values()) + sum(b.nbytes for b in biases)

    @property
    def max_rank(self) -> int:
        """Largest rank over all modules."""
        return max((pair.rank for pair in self.pairs.values()), default=0)
