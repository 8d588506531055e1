"""What `--adapters a=0.7,b=0.3` means: the parts of a mix, and the base that it is asked of."""

import math

from quickchange_client.client import Quickchange
from quickchange_client.errors import ArgumentInvalid
from quickchange_client.generation import MixPart

MAX_PARTS = 4


def parse_mix(text: str) -> list[MixPart]:
    """Read `a=0.7,b@canary=-0.3,c`; a part without a weight has 1. Raises: ArgumentInvalid."""
    parts = [_parse_part(part.strip(), text) for part in text.split(",")]
    if len(parts) > MAX_PARTS:
        raise ArgumentInvalid(f"--adapters {text!r} names {len(parts)} adapters; 1 to 4 are mixed")
    return parts


def _parse_part(part: str, text: str) -> MixPart:
    model, _, weight = part.partition("=")
    try:
        number = float(weight) if "=" in part else 1.0
    except ValueError:
        number = math.nan
    if not model or not math.isfinite(number):
        raise ArgumentInvalid(
            f"--adapters {text!r}: {part!r} is no part of a mix; write NAME=WEIGHT with commas "
            "between, as in a=0.7,b=-0.3"
        )
    return MixPart(model=model, weight=number)


def base_of(client: Quickchange) -> str:
    """Return what requests call the base. Raises: ArgumentInvalid when the server lists none."""
    bases = [model.id for model in client.models.list().data if model.parent is None]
    if not bases:
        raise ArgumentInvalid("the server lists no base to mix adapters on; name it before PROMPT")
    return bases[0]
