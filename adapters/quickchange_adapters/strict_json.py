"""JSON from strangers: no duplicate keys, no NaN, no surprises. Knows no schema."""

import json
import math
from typing import Any

from quickchange_adapters.errors import AdapterError


class JsonRefused(AdapterError):
    """The bytes are not one plain JSON object."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Read one JSON object.

    Raises: JsonRefused, also for what Python would let pass: duplicate keys (two readers of one
    file must not see different values), NaN and infinities, nesting without end, half surrogates.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        # Escapes can smuggle in text that no UTF-8 answer can repeat.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonRefused(f"not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise JsonRefused("a string holds half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise JsonRefused(f"{error.msg} (line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise JsonRefused("nested too deeply") from error
    except ValueError as error:
        raise JsonRefused("a number has too many digits") from error
    if not isinstance(value, dict):
        raise JsonRefused(f"a JSON object is wanted, not {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise JsonRefused(f"the key {key[:80]!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> float:
    raise JsonRefused(f"{text} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonRefused(f"the number {text[:20]} is too large")
    return value
