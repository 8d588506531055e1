"""What one setting is: a name in three spellings, and how its value is read.

Knows nothing of which settings there are (config.py) nor of the command line (cli.py). Every
reader takes text (a flag, a variable) or what TOML gives, and raises ValueError with the rest of
a sentence that begins with the setting's name.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

ENV_PREFIX = "QUICKCHANGE_"
ADAPTER_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
BYTE_UNITS = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s*]+")
NO_STORES = ("http", "https", "memory", "local", "ftp")
"""What fsspec knows and what keeps no uploads: it cannot be written to, or forgets."""
CATALOG_SCHEMES = ("sqlite:///", "postgresql://", "postgres://", "postgresql+psycopg://")

OptionKind = Literal["text", "switch", "list"]


@dataclass(frozen=True, slots=True)
class StaticAdapter:
    """An adapter named at start: served under `name` from `folder`."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Option:
    """One setting as flag, variable and TOML key.

    Attributes:
        name: the TOML key, and the field of ServerConfig.
        read: makes the value from text or from a TOML value.
        help: one sentence.
        group: heading in `--help`.
        metavar: what stands for the value in `--help`.
        kind: `switch` takes no value on the command line; `list` may be repeated.
        default: what holds when nobody says anything.
    """

    name: str
    read: Callable[[object], Any]
    help: str
    group: str
    metavar: str
    kind: OptionKind
    default: object

    @property
    def help_with_default(self) -> str:
        """The sentence, with the default unless it says that itself."""
        if self.kind != "text" or self.default is None:
            return self.help
        return f"{self.help} Default: {self.default}."

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The spelling in the environment."""
        return ENV_PREFIX + self.name.upper()


def option(
    default: Any,
    read: Callable[[object], Any],
    help: str,
    group: str,
    *,
    is_secret: bool = False,
    **look: str,
) -> Any:
    """Declare a dataclass field that is a setting. `look`: `metavar` and `kind`.

    `is_secret`: its value is left out when the settings are shown.
    """
    metadata = {"read": read, "help": help, "group": group, **look}
    return dataclasses.field(default=default, repr=not is_secret, metadata=metadata)


def options_of(config_class: type[Any]) -> dict[str, Option]:
    """Return the settings that a dataclass declares, by name."""
    return {
        field.name: Option(
            name=field.name,
            read=field.metadata["read"],
            help=field.metadata["help"],
            group=field.metadata["group"],
            metavar=field.metadata.get("metavar", "TEXT"),
            kind=field.metadata.get("kind", "text"),
            default=field.default,
        )
        for field in dataclasses.fields(config_class)
    }


def read_text(value: object) -> str:
    """Read text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"is {value!r}, but must be text")
    return value.strip()


def read_choice(*choices: str) -> Callable[[object], str]:
    """Return a reader of one of a few words."""

    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(f"is {value!r}, but must be one of {', '.join(choices)}")
        return str(value)

    return read


def read_pattern(pattern: str, wanted: str) -> Callable[[object], str]:
    """Return a reader of text that matches a pattern as a whole."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"is {value!r}, but must be {wanted}")
        return value

    return read


def read_count(minimum: int, maximum: int | None = None) -> Callable[[object], int]:
    """Return a reader of a whole number within limits."""
    limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"

    def read(value: object) -> int:
        is_text = isinstance(value, str) and re.fullmatch(r"\d{1,18}", value.strip())
        number = int(value) if is_text and isinstance(value, str) else value
        if type(number) is not int or number < minimum or (maximum and number > maximum):
            raise ValueError(f"is {value!r}, but must be a whole number, {limits}")
        return number

    return read


def read_auto_or(read: Callable[[object], int]) -> Callable[[object], int | None]:
    """Return a reader that also takes `auto`, which gives None."""
    return lambda value: None if value == "auto" else read(value)


def read_seconds(value: object) -> float:
    """Read a number of seconds, zero or more."""
    is_text = isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d+)?", value.strip())
    number = float(value) if is_text and isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0:
        raise ValueError(f"is {value!r}, but must be a number of seconds")
    return float(number)


def read_switch(value: object) -> bool:
    """Read true or false."""
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.strip().lower() not in words:
        raise ValueError(f"is {value!r}, but must be true or false")
    return words[value.strip().lower()]


def read_always_on(value: object) -> bool:
    """Read a switch that exists only so that callers of another server may set it."""
    if not read_switch(value):
        raise ValueError("is off, but adapters cannot be switched off; leave it out")
    return True


def read_bytes(value: object) -> int:
    """Read a number of bytes: `2GiB`, `512MiB`, `1.5GB`, `2Gi` or a plain number."""
    if type(value) is int and value >= 0:
        return value
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([a-zA-Z]*)", str(value).strip())
    if not isinstance(value, str) or not match or match[2].lower() not in BYTE_UNITS:
        raise ValueError(f"is {value!r}, but must be bytes such as 2GiB or 512MiB, or auto")
    return int(Decimal(match[1]) * BYTE_UNITS[match[2].lower()])


def read_store(value: object) -> Path | str:
    """Read a folder, also as a file:// URL, or the URL of an object store."""
    text = read_text(value).removeprefix("file://")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text).expanduser()
    if "@" in rest:  # not repeated: what stands before it may be a password
        raise ValueError("has credentials in its URL; give them in the environment instead")
    if scheme in NO_STORES or not rest.strip("/"):
        raise ValueError(f"is {value!r}, but must be a folder or a URL such as s3://BUCKET/PREFIX")
    return text.rstrip("/")


def read_catalog(value: object) -> str:
    """Read the URL of a database. No error repeats it: it may hold a password."""
    if not isinstance(value, str) or not value.strip().startswith(CATALOG_SCHEMES):
        raise ValueError("must be sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    return value.strip()


def read_origins(value: object) -> tuple[str, ...]:
    """Read origins as browsers send them. A star is none: it would let every page in."""
    origins = tuple(_origin(text) for text in read_list(value))
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"has {origin!r}, but must name origins such as https://app.example:8443, "
                "without a path or a star"
            )
    return origins


def _origin(text: str) -> str:
    """Spell an origin as browsers do: in small letters, without the scheme's own port."""
    origin = text.strip().lower().removesuffix("/")
    port = ":443" if origin.startswith("https://") else ":80"
    return origin.removesuffix(port)


def read_list(value: object) -> tuple[str, ...]:
    """Read texts: a list, or one text with commas between."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, Iterable) or isinstance(parts, dict):
        raise ValueError(f"is {value!r}, but must be a list of texts")
    return tuple(read_text(part) for part in parts)


def read_folders(value: object) -> tuple[Path, ...]:
    """Read folders: a list, or one text with commas between."""
    return tuple(Path(folder).expanduser() for folder in read_list(value))


def read_adapters(value: object) -> tuple[StaticAdapter, ...]:
    """Read adapters: `NAME=FOLDER`, several of them, a TOML table, or vLLM's JSON objects."""
    if isinstance(value, dict):
        return tuple(_adapter(name, folder) for name, folder in value.items())
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, Iterable):
        raise ValueError(f"is {value!r}, but must be NAME=FOLDER, or a table of such")
    return tuple(adapter for part in parts for adapter in _adapters_in(read_text(part)))


def _adapters_in(text: str) -> list[StaticAdapter]:
    if text.startswith("{"):
        return [_adapter_from_json(text)]
    pairs = [pair for pair in re.split(r"[,\s]+(?=[^,\s=/]+=)", text) if pair]
    return [_adapter(*_split_pair(pair)) for pair in pairs]


def _split_pair(pair: str) -> tuple[str, str]:
    name, equals, folder = pair.partition("=")
    if not equals:
        raise ValueError(f"has {pair!r}, but must be NAME=FOLDER")
    return name, folder


def _adapter_from_json(text: str) -> StaticAdapter:
    try:
        fields = json.loads(text)
        return _adapter(fields["name"], fields["path"])
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'has {text!r}, but must be {{"name": …, "path": …}}') from error


def _adapter(name: object, folder: object) -> StaticAdapter:
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise ValueError(
            f"has the name {name!r}, but names are 1 to 63 of a-z 0-9 . _ - "
            "and begin and end with a letter or digit"
        )
    return StaticAdapter(name, Path(read_text(folder)))
