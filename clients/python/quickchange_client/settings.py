"""Where the server is and which key to show it, and the same of the Hub.

The only reader of the environment.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from quickchange_client.errors import ArgumentInvalid

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "QUICKCHANGE_URL"
API_KEY_VARIABLE = "QUICKCHANGE_API_KEY"
DEFAULT_HUB = "https://huggingface.co"
HUB_VARIABLE = "HF_ENDPOINT"
HUB_TOKEN_VARIABLE = "HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's address without a trailing slash or `/v1`, and the key, if there is one."""

    url: str = DEFAULT_URL
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def read(
        cls,
        url: str | None = None,
        api_key: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> "Settings":
        """Take what is given, then the environment, then the default.

        Raises: ArgumentInvalid if the address is not an http(s) one, or the key can be none.
        """
        variables = os.environ if environ is None else environ
        address = url or variables.get(URL_VARIABLE) or DEFAULT_URL
        return cls(
            url=_clean_url(address),
            api_key=_clean_secret(
                api_key or variables.get(API_KEY_VARIABLE), f"the API key ({API_KEY_VARIABLE})"
            ),
        )


@dataclass(frozen=True, slots=True)
class HubSettings:
    """The Hub's address without a trailing slash, and the token to show it, if there is one."""

    url: str = DEFAULT_HUB
    token: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> "HubSettings":
        """Take the environment, then the default.

        Raises: ArgumentInvalid if the address is not an http(s) one.
        """
        variables = os.environ if environ is None else environ
        url = (variables.get(HUB_VARIABLE) or DEFAULT_HUB).strip().rstrip("/")
        if not _is_http(url):
            raise ArgumentInvalid(f"{HUB_VARIABLE} is {url!r}; give an address like {DEFAULT_HUB}")
        return cls(url, _clean_secret(variables.get(HUB_TOKEN_VARIABLE), HUB_TOKEN_VARIABLE))


def _clean_secret(text: str | None, what: str) -> str | None:
    """Return a key as it can stand in a header. Raises: ArgumentInvalid, without repeating it."""
    text = (text or "").strip()
    if not (text.isascii() and text.isprintable()):
        raise ArgumentInvalid(
            f"{what} holds characters that no key has; copy it again, on one line and unquoted"
        )
    return text or None


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def _clean_url(url: str) -> str:
    if not _is_http(url.strip()):
        raise ArgumentInvalid(
            f"the server's address {url!r} is not a URL; give one such as {DEFAULT_URL}, "
            f"with --url or {URL_VARIABLE}"
        )
    return url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
