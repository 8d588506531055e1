"""Adapters, alone or mixed, that would never fit here: nobody is to wait for their room."""

from collections.abc import Collection

from quickchange_adapters.packed_size import PackedSize
from quickchange_adapters.pool import AdapterPool

from quickchange_server.errors import InvalidRequest


def check_fits(size: PackedSize, pool: AdapterPool) -> None:
    """Compare an adapter with the whole pool. Raises: InvalidRequest (rank_too_large)."""
    if not pool.can_ever_hold(size):
        rows = max(size.rows.values(), default=0)
        raise InvalidRequest(
            f"the adapter needs {rows} rank rows and {size.num_vocabulary_bytes} bytes for "
            f"head and embedding; the device pool has {pool.num_rows} and "
            f"{pool.vocabulary_ceiling_bytes}: raise --adapter-device-bytes",
            code="rank_too_large",
        )


def check_together(sizes: Collection[PackedSize], pool: AdapterPool, host_bytes: int) -> None:
    """Compare a mix with pool and host memory. Raises: InvalidRequest (mix_too_large)."""
    needed = sum(size.num_bytes for size in sizes)
    if len(sizes) > 1 and not pool.can_ever_hold(*sizes):
        raise _too_large(
            f"the {len(sizes)} adapters of this mix do not fit together into the device pool of "
            f"{pool.num_rows} rank rows: use fewer, or raise --adapter-device-bytes"
        )
    if len(sizes) > 1 and needed > host_bytes:
        raise _too_large(
            f"the {len(sizes)} adapters of this mix need {needed} bytes of host memory together, "
            f"of {host_bytes}: use fewer, or raise --adapter-host-bytes"
        )


def _too_large(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="mix_too_large", param="adapters")
