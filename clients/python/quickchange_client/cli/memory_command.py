"""The command `memory`: where the server's bytes are."""

from quickchange_client.cli.adapter_tables import short_digest
from quickchange_client.cli.output import format_bytes, print_json, print_table
from quickchange_client.cli.session import JsonOption, UrlOption, session
from quickchange_client.server_state import AdapterMemory, Memory


def memory(url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Show the server's memory by part, and by adapter version.

    Examples:
        quickchange memory

        quickchange memory --json
    """
    with session(url, as_json) as client:
        state = client.memory()
    print_json(state) if as_json else _print(state)


def _print(state: Memory) -> None:
    parts = [(name, n, format_bytes(n)) for name, n in state.bytes.items()]
    print_table(("PART", ">BYTES", ">"), parts)
    if state.process:
        print()
        process = [(name, n, format_bytes(n)) for name, n in state.process.items()]
        print_table(("OF THE PROCESS", ">BYTES", ">"), process)
    if state.adapters:
        print()
        headings = ("VERSION", ">HOST", ">DEVICE", ">MERGED", ">RUNNING")
        print_table(headings, [_adapter_row(adapter) for adapter in state.adapters])


def _adapter_row(adapter: AdapterMemory) -> tuple[object, ...]:
    held = (format_bytes(n) for n in (adapter.host, adapter.device, adapter.merged))
    return (short_digest(adapter.digest), *held, adapter.num_running)
