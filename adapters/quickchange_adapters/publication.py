"""What spans the store and the catalog: an upload's last steps, and a deletion's.

    upload     reserve -> put each file -> publish        the catalog's commit makes it real
    deletion   (begin) -> purge -> remove the blobs that nothing refers to

Whatever a crash leaves between two steps is invisible, and goes with a later `collect`.
Blocks; call it off the event loop. Knows no engine.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from quickchange_adapters.catalog import Catalog
from quickchange_adapters.errors import StoreUnavailable
from quickchange_adapters.records import NewVersion, Published, VersionRecord
from quickchange_adapters.store import StagedFile, Store

log = logging.getLogger(__name__)


def publish_upload(
    catalog: Catalog, store: Store, new: NewVersion, staged: Iterable[StagedFile]
) -> Published:
    """Keep an upload's files and make them a version; when it returns, it survives `kill -9`.

    A failure leaves no bytes behind, or leaves them to a later `collect` if the place that failed
    cannot be tidied up either.

    Raises: StoreUnavailable, StoreFull.
    """
    keep_files(catalog, store, new, staged)
    return publish_kept(catalog, store, new)


def keep_files(
    catalog: Catalog, store: Store, new: NewVersion, staged: Iterable[StagedFile]
) -> None:
    """Bring an upload's files into the store, spared from `collect`: its first, slow half.

    Raises: StoreUnavailable, StoreFull.
    """
    catalog.reserve(new.upload_id, new.files)
    with _tidied_up(catalog, store, new.upload_id):
        for file in staged:
            store.put(file)


def publish_kept(catalog: Catalog, store: Store, new: NewVersion) -> Published:
    """Make a version of files that were kept: an upload's second half, one transaction.

    Raises: StoreUnavailable, StoreFull.
    """
    with _tidied_up(catalog, store, new.upload_id):
        return catalog.publish(new)


@contextmanager
def _tidied_up(catalog: Catalog, store: Store, upload_id: str) -> Iterator[None]:
    """Leave no bytes behind when the block fails."""
    try:
        yield
    except BaseException:
        _give_up(catalog, store, upload_id)
        raise


def _give_up(catalog: Catalog, store: Store, upload_id: str) -> None:
    try:
        catalog.release(upload_id)
        catalog.collect(store.delete)
    except StoreUnavailable as error:
        log.warning("what a failed upload put is left to a later sweep: %s", error)


def finish_deletion(catalog: Catalog, store: Store, gone: Iterable[VersionRecord]) -> int:
    """Remove versions whose deletion was begun, and return the bytes that the store freed.

    May be repeated.

    Raises: StoreUnavailable.
    """
    for version in gone:
        catalog.purge(version)
    return catalog.collect(store.delete)
