"""The settings of one server: one frozen object, and the only reader of where they come from.

Every setting has one name in three spellings with one meaning: the flag `--max-queue`, the
variable `QUICKCHANGE_MAX_QUEUE`, and the key `max_queue` in the file given by `--config`. A flag
wins over a variable, a variable over the file, the file over the default. Which settings there are
stands in server_config.py. Knows nothing of what they do.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from quickchange_server import option as o
from quickchange_server.errors import ConfigInvalid
from quickchange_server.option import Option
from quickchange_server.server_config import ServerConfig

__all__ = [
    "CLIENT_VARIABLES",
    "CONFIG_VARIABLE",
    "OPTIONS",
    "ServerConfig",
    "load_config",
    "unknown_variables",
]

OPTIONS: dict[str, Option] = o.options_of(ServerConfig)
CLIENT_VARIABLES = ("QUICKCHANGE_URL", "QUICKCHANGE_API_KEY")
CONFIG_VARIABLE = "QUICKCHANGE_CONFIG"


def load_config(
    flags: Mapping[str, object], environ: Mapping[str, str] = os.environ
) -> ServerConfig:
    """Read the settings. `flags` has option names and, as `config`, the file; None is not given.

    Raises: ConfigInvalid.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    file = given.pop("config", None) or environ.get(CONFIG_VARIABLE)
    values = _values_from_file(Path(str(file))) if file else {}
    values |= _values_from_environ(environ)
    values |= {name: _read(name, value, _flag(name)) for name, value in given.items()}
    config = ServerConfig(**values)
    _check(config)
    return config


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return a sentence for each `QUICKCHANGE_*` variable that means nothing to this server."""
    known = {each.variable for each in OPTIONS.values()} | {CONFIG_VARIABLE, *CLIENT_VARIABLES}
    return [
        f"the variable {name} is not known{_nearest(name, known)}"
        for name, value in environ.items()
        if name.startswith(o.ENV_PREFIX) and name not in known and not _is_service_link(name, value)
    ]


def _values_from_file(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"--config {file}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"--config {file}: is not TOML: {error}") from error
    unknown = [key for key in table if key not in OPTIONS]
    if unknown:
        found = "; ".join(f"{key!r}{_nearest(key, OPTIONS)}" for key in unknown)
        raise ConfigInvalid(f"--config {file}: unknown key {found}")
    return {key: _read(key, value, f"{key} in {file}") for key, value in table.items()}


def _values_from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """Read the variables; an empty one counts as not set."""
    values = {}
    for name in OPTIONS:
        variable = o.ENV_PREFIX + name.upper()
        text = environ.get(variable, "").strip()
        if text and not _is_service_link(variable, text):
            values[name] = _read(name, text, variable)
    return values


def _read(name: str, value: object, spelling: str) -> Any:
    try:
        return OPTIONS[name].read(value)
    except ValueError as error:
        raise ConfigInvalid(f"{spelling} {error}", param=name) from error


def _check(config: ServerConfig) -> None:
    """Refuse settings that contradict each other."""
    names = [adapter.name for adapter in config.static_adapters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        _refuse(f"--adapter names {twice[0]!r} twice; give each adapter its own name")
    if config.base_name in names:
        _refuse(f"--adapter {config.base_name!r} is the base's name; choose another")
    if config.admin_port is not None and config.admin_port == config.port != 0:
        _refuse(f"--admin-port {config.admin_port} is also --port; give them ports of their own")


def _refuse(sentence: str) -> NoReturn:
    raise ConfigInvalid(sentence)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(name: str, known: Mapping[str, object] | set[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" (nearest: {nearest[0]})" if nearest else ""


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes put the variable there for a Service whose name begins like ours."""
    if re.search(r"_SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?$", name):
        return True
    if re.search(r"_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$", name):
        return True
    return name.endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", value) is not None
