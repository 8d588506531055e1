"""Whether values are numbers, without memory beside them."""

import math

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Return whether no value of a floating tensor of any shape is NaN or infinite.

    Asks for the least and the greatest, which a NaN makes NaN: one read, and no tensor as large
    as the values, of which `torch.isfinite` makes several. On a device it waits for the answer.
    """
    if not values.numel():
        return True
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(values)).tolist())
