"""From what `--model` says to a folder on this machine. Knows nothing of what is in the folder."""

import re
from pathlib import Path

from quickchange_server.builtin import BUILTIN_PREFIX, builtin_base, ensure_builtin
from quickchange_server.errors import BaseUnavailable

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def resolve_base(model: str, revision: str | None, cache: Path) -> Path:
    """Return the base's folder: as given, built in (fetched if need be), or from the Hub.

    Raises: BaseUnavailable.
    """
    if model.startswith(BUILTIN_PREFIX):
        return ensure_builtin(builtin_base(model), cache)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not HUB_ID.fullmatch(model) or model.startswith((".", "~")):
        raise BaseUnavailable(f"--model {model}: there is no such folder")
    return _fetch_from_hub(model, revision)


def _fetch_from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the Hub's own, its HTTP library's, the disk's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BaseUnavailable(
            f"--model {model}: there is no such folder, and the Hub gave nothing: {reason}"
        ) from error
