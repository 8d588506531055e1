"""Who has how many of torch's threads: the engine's own thread all of them, every other one."""

import torch

_num_threads: int | None = None  # before anybody was kept to one


def claim_threads() -> int:
    """Return how many threads torch would use, and keep the caller to one.

    OpenMP lets idle workers spin only while there are no more workers than cores. A second thread
    with workers of its own would put them all to sleep between products, hundreds of times a step.
    """
    global _num_threads
    if _num_threads is None:
        _num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return _num_threads


def use_one_thread() -> None:
    """Keep the caller to one."""
    torch.set_num_threads(1)
