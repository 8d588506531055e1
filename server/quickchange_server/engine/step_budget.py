"""How many tokens a step may have: all that was allowed, or less after memory ran out."""

import torch

RECOVERY_STEPS = 64


class StepBudget:
    """Halves when a step ran out of memory, and grows back while steps succeed."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = max_tokens
        self._num_good_steps = 0

    def shrink(self, failed_tokens: int) -> bool:
        """Allow half of what just failed; False when that was a single token already."""
        self._num_good_steps = 0
        if failed_tokens <= 1:
            return False
        self.num_tokens = max(1, min(self.num_tokens, failed_tokens // 2))
        return True

    def note_success(self) -> None:
        """Count a good step; after enough of them twice as many tokens are tried."""
        if self.num_tokens == self.max_tokens:
            return
        self._num_good_steps += 1
        if self._num_good_steps >= RECOVERY_STEPS:
            self._num_good_steps = 0
            self.num_tokens = min(2 * self.num_tokens, self.max_tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
