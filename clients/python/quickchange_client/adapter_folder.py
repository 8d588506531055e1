"""An adapter's folder as PEFT writes it, looked at before anything is sent. Opens no tensors."""

from dataclasses import dataclass
from pathlib import Path

from quickchange_client.errors import FolderInvalid

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TASK_FILE = "task.json"
PICKLE_FILE = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """The files that make a version; `task` is None when the folder has no task.json."""

    config: Path
    weights: Path
    task: Path | None = None

    @classmethod
    def find(cls, folder: str | Path) -> "AdapterFolder":
        """Find the files of an adapter.

        Raises: FolderInvalid, saying which file is missing and what to do.
        """
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise FolderInvalid(f"{str(root)!r} is not a folder; give the one PEFT wrote")
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (root / name).is_file():
                raise FolderInvalid(_missing(root, name))
        task = root / TASK_FILE
        return cls(root / CONFIG_FILE, root / WEIGHTS_FILE, task if task.is_file() else None)


def _missing(root: Path, name: str) -> str:
    problem = f"{str(root)!r} has no {name}"
    if name == WEIGHTS_FILE and (root / PICKLE_FILE).is_file():
        return (
            f"{problem}, only {PICKLE_FILE}, and pickled weights are never uploaded; "
            "save it again with a PEFT that writes safetensors (0.6 or newer)"
        )
    nested = sorted(path.parent.name for path in root.glob(f"*/{WEIGHTS_FILE}"))
    if nested:
        return f"{problem}; did you mean its subfolder {nested[-1]!r}?"
    return f"{problem}; give the folder that save_pretrained() of a PEFT model wrote"
