"""Lengths of time as people write them: `90s`, `15m`, `12h`, `30d`, `2w`."""

import re

from quickchange_client.errors import ArgumentInvalid

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_FORM = re.compile(r"(\d{1,6})([smhdw])")


def duration_s(text: str) -> float:
    """Return a length of time in seconds. Raises: ArgumentInvalid."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ArgumentInvalid(f"{text!r} is no length of time; write 90s, 15m, 12h, 30d or 2w")
    return float(int(found[1]) * SECONDS[found[2]])
