"""The command `memory`: where the server's bytes are."""

from collections.abc import Iterator, Mapping
from typing import Any

from quickchange_client.cli.output import format_bytes, print_json, print_table
from quickchange_client.cli.session import JsonOption, UrlOption, session


def memory(url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Show the server's memory by part: base, merged copies, adapters, KV, process.

    Examples:
        quickchange memory

        quickchange memory --json
    """
    with session(url, as_json) as client:
        state = client.memory()
    if as_json:
        print_json(state)
        return
    parts = list(_parts(state.model_dump()))
    print_table(("PART", ">BYTES", ">"), [(name, n, format_bytes(n)) for name, n in parts])


def _parts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield each number under its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _parts(value, f"{prefix}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield prefix + name, value
