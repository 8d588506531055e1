"""Which server a benchmark asks: one that it starts, or one that runs already; and its adapters."""

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.server_process import Target, base_folder, checkpoint_dtype, serving
from benchmarks.workload import adapter_name


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `target_of` reads."""
    parser.add_argument("--url", help="a running server; default: start `quickchange serve`")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument(
        "--upload", action="store_true", help="with --url: upload the adapters; they stay"
    )
    parser.add_argument("--name", help="what the report calls the server")
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the base: folder or id")
    parser.add_argument("--device", default="auto", help="of the server that is started")
    parser.add_argument("--dtype", default="auto", help="of the server that is started")
    parser.add_argument("--server-args", default="", help="more options for `quickchange serve`")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")


@contextmanager
def target_of(options: argparse.Namespace, num_adapters: int) -> Iterator[Target]:
    """Give the running server of --url, or a new one; the adapters are there in both cases."""
    if options.url:
        target = Target(options.url, api_key=options.api_key)
        _upload_adapters(target, options, num_adapters if options.upload else 0)
        yield target
        return
    arguments = ["--model", options.model, "--dtype", options.dtype, "--device", options.device]
    with serving([*arguments, *shlex.split(options.server_args)]) as target:
        _upload_adapters(target, options, num_adapters)
        yield target


@contextmanager
def made_adapters(options: argparse.Namespace, num_adapters: int) -> Iterator[list[Path]]:
    """Write so many adapters for the base; they are gone after the block."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).with_name("make_adapters.py"))
        shape = ["--count", str(num_adapters), "--rank", str(options.rank)]
        base = str(base_folder(options.model))
        subprocess.run(
            [sys.executable, script, base, folder, *shape], check=True, stdout=sys.stderr
        )
        yield [Path(folder) / adapter_name(index) for index in range(num_adapters)]


def server_settings(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Return what a report says of the server."""
    settings: dict[str, object] = {
        "server": options.name or ("quickchange serve" if not options.url else "a running server"),
        "base": target.base_name(),
    }
    if target.process:
        settings["dtype, device"] = f"{_dtype(options)}, {options.device}"
        settings["server's resident set at the end"] = f"{target.resident_mib():.0f} MiB"
        settings["server's options"] = options.server_args or "defaults"
    return settings


def _upload_adapters(target: Target, options: argparse.Namespace, num_adapters: int) -> None:
    if num_adapters:
        with made_adapters(options, num_adapters) as folders:
            for folder in folders:
                target.upload(folder.name, folder)


def _dtype(options: argparse.Namespace) -> str:
    """Return the dtype, with what `auto` means for this base."""
    if options.dtype != "auto":
        return str(options.dtype)
    return f"auto ({checkpoint_dtype(base_folder(options.model))} in the checkpoint)"
