"""How many tokens a step may have where nobody said: long prompts hold up everybody else."""

LEAST_ON_CPU = 128
LEAST_ON_GPU = 2048
TOKENS_OF_ROW = 4
"""So that prompts move on beside a full batch of rows with one token each."""


def default_step_tokens(device: str, max_batch_rows: int) -> int:
    """Return the most tokens of a step on a device.

    On a CPU every token costs about the same from some dozens on: larger steps gain almost nothing
    and make every stream wait longer (docs/log.md). A GPU is idle below some thousands.
    """
    least = LEAST_ON_GPU if device.startswith("cuda") else LEAST_ON_CPU
    return max(least, TOKENS_OF_ROW * max_batch_rows)
