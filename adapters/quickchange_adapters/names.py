"""Names of adapters, aliases and versions, and the model strings made of them.

A model string is `NAME`, `NAME@ALIAS`, `NAME:3` or `NAME@sha256:<12+ hex>`. Knows no catalog.
"""

import re
from dataclasses import dataclass

from quickchange_adapters.errors import Problem

DEFAULT_ALIAS = "default"
DEFAULT_TENANT = "default"
MIN_DIGEST_HEX = 12

_ADAPTER_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_ALIAS = re.compile(r"[a-z][a-z0-9-]{0,31}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A parsed model string: a name, and which of its versions.

    Exactly one of `alias`, `version` and `digest_prefix` is set; a bare name has alias `default`.
    """

    name: str
    alias: str | None = None
    version: int | None = None
    digest_prefix: str | None = None


def is_adapter_name(text: str) -> bool:
    """Whether an adapter may be called so."""
    return _ADAPTER_NAME.fullmatch(text) is not None


def is_alias(text: str) -> bool:
    """Whether an alias may be called so."""
    return text != "sha256" and _ALIAS.fullmatch(text) is not None


def adapter_name_problem(text: str) -> Problem | None:
    """Return what is wrong with an adapter's name, or None."""
    if is_adapter_name(text):
        return None
    return Problem(
        "invalid_name",
        "name",
        f"the adapter name {text[:80]!r} is not allowed",
        "use 1 to 63 of a-z 0-9 . _ - that begin and end with a letter or digit",
    )


def alias_problem(text: str) -> Problem | None:
    """Return what is wrong with an alias, or None."""
    if is_alias(text):
        return None
    return Problem(
        "invalid_name",
        "alias",
        f"the alias {text[:80]!r} is not allowed",
        "use 1 to 32 of a-z 0-9 - that begin with a letter, and not sha256",
    )


def parse_model(text: str) -> ModelRef | None:
    """Read a model string; None when it cannot name an adapter."""
    name, at, selector = text.partition("@")
    if at:
        return _parse_selector(name, selector) if is_adapter_name(name) else None
    name, colon, number = text.partition(":")
    if not is_adapter_name(name):
        return None
    if not colon:
        return ModelRef(name, alias=DEFAULT_ALIAS)
    return ModelRef(name, version=int(number)) if _VERSION.fullmatch(number) else None


def _parse_selector(name: str, selector: str) -> ModelRef | None:
    kind, colon, digest = selector.partition(":")
    if colon:
        is_digest = kind == "sha256" and _DIGEST.fullmatch(digest)
        return ModelRef(name, digest_prefix=digest) if is_digest else None
    return ModelRef(name, alias=selector) if is_alias(selector) else None
