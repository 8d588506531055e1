"""Model strings of the contract: NAME, NAME@ALIAS, NAME:3, NAME@sha256:<12+ hex>."""

from dataclasses import dataclass

from quickchange_client.adapter import Adapter, AdapterVersion
from quickchange_client.errors import ArgumentInvalid

DIGEST_MARK = "sha256:"
MIN_DIGEST_HEX = 12


@dataclass(frozen=True, slots=True)
class ModelReference:
    """An adapter's name, and at most one of: a version's number, an alias, a digest's beginning."""

    name: str
    version: int | None = None
    alias: str | None = None
    digest_prefix: str | None = None

    @classmethod
    def parse(cls, text: str) -> "ModelReference":
        """Read a model string. Raises: ArgumentInvalid."""
        name, at, selector = text.partition("@")
        if at and name and selector.startswith(DIGEST_MARK):
            return cls(name, digest_prefix=_digest(text, selector.removeprefix(DIGEST_MARK)))
        if at and name and selector:
            return cls(name, alias=selector)
        name, colon, number = text.partition(":")
        if not at and name and colon and number.isascii() and number.isdigit():
            return cls(name, version=int(number))
        if at or colon or not name:
            raise _invalid(text)
        return cls(name)

    @property
    def is_bare(self) -> bool:
        """Whether this names no particular version."""
        return (self.version, self.alias, self.digest_prefix) == (None, None, None)

    def find_in(self, adapter: Adapter) -> AdapterVersion:
        """Return the version meant; a bare name means alias `default`.

        Raises: ArgumentInvalid when the adapter has no such version.
        """
        number = self.version if self.alias is None else adapter.aliases.get(self.alias)
        if self.is_bare:
            number = adapter.aliases.get("default")
        for version in adapter.versions:
            has_digest = self.digest_prefix and version.digest.removeprefix(DIGEST_MARK).startswith(
                self.digest_prefix
            )
            if has_digest or version.version == number:
                return version
        raise ArgumentInvalid(f"{self} is not there; `quickchange show {self.name}` lists what is")

    def __str__(self) -> str:
        """Return the model string."""
        if self.digest_prefix is not None:
            return f"{self.name}@{DIGEST_MARK}{self.digest_prefix}"
        if self.alias is not None:
            return f"{self.name}@{self.alias}"
        return self.name if self.version is None else f"{self.name}:{self.version}"


def _digest(text: str, digits: str) -> str:
    if len(digits) < MIN_DIGEST_HEX or set(digits) - set("0123456789abcdef"):
        raise _invalid(text)
    return digits


def _invalid(text: str) -> ArgumentInvalid:
    return ArgumentInvalid(
        f"{text!r} is no adapter; write NAME, NAME:3, NAME@ALIAS or NAME@sha256:<12+ hex digits>"
    )
