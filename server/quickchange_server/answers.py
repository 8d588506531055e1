"""What the adapters' own errors are to a caller of the server."""

from collections.abc import Iterator
from contextlib import contextmanager

from quickchange_adapters.errors import (
    AdapterError,
    AdminKeyNeeded,
    AliasInUse,
    BlobMissing,
    CannotCheck,
    LastAdminKey,
    MergeBudgetExceeded,
    NotInCatalog,
    PinBudgetExceeded,
    PublicNameTaken,
    QuotaExceeded,
    RevisionChanged,
    StoreFull,
    StoreUnavailable,
    VersionDisabled,
)

from quickchange_server.errors import (
    Conflict,
    Forbidden,
    NotFound,
    PreconditionFailed,
    QuickchangeError,
    StorageFull,
    Unavailable,
)


@contextmanager
def as_answers() -> Iterator[None]:
    """Raise what a block raises from the adapters' tree as its counterpart of the server's."""
    try:
        yield
    except AdapterError as error:
        answer = _answer(error)
        if answer is None:
            raise
        raise answer from error


def _answer(error: AdapterError) -> QuickchangeError | None:
    message = str(error)
    if isinstance(error, StoreFull):
        return StorageFull(f"{message}; nothing was kept: make room, then send it again")
    if isinstance(error, StoreUnavailable | BlobMissing):
        return Unavailable(message, code="store_unavailable")
    if isinstance(error, CannotCheck):
        return Unavailable(message)
    if isinstance(error, NotInCatalog):
        return NotFound(message, code=f"{error.what}_not_found")
    if isinstance(error, AliasInUse):
        return Conflict(message, code="alias_in_use")
    if isinstance(error, AdminKeyNeeded | LastAdminKey):
        return Conflict(message, code="admin_key_needed")
    if isinstance(error, QuotaExceeded):
        return Forbidden(message, code="quota_exceeded")
    if isinstance(error, PublicNameTaken):
        return Conflict(message, param="name")
    if isinstance(error, RevisionChanged):
        return PreconditionFailed(message)
    if isinstance(error, MergeBudgetExceeded):
        return Conflict(message, code="merge_budget")
    if isinstance(error, PinBudgetExceeded):
        return Conflict(message, code="pin_budget")
    if isinstance(error, VersionDisabled):
        return Conflict(message)
    return None
