"""Which adapter, or which of its versions, a command is about."""

from dataclasses import dataclass

from quickchange_client.client import Quickchange
from quickchange_client.errors import ArgumentInvalid


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """An adapter's name and a version's number; None when only the name was given."""

    name: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> "AdapterReference":
        """Read NAME or NAME:3. Raises: ArgumentInvalid."""
        name, colon, number = text.partition(":")
        is_number = number.isascii() and number.isdigit()
        if not name or (colon and not is_number):
            raise ArgumentInvalid(
                f"{text!r} is no adapter; write NAME, NAME:3, NAME@ALIAS or NAME@sha256:DIGEST"
            )
        return cls(name, int(number) if colon else None)

    @classmethod
    def resolve(cls, client: Quickchange, text: str) -> "AdapterReference":
        """Read any of the contract's forms; the server says what an alias or digest means now.

        Raises: ArgumentInvalid, NotFound.
        """
        if "@" not in text:
            return cls.parse(text)
        return cls.parse(client.models.get(text).root or text)
