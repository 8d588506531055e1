"""How much a tenant may upload: what it may have in the store, and how often it may try.

What is in the store is looked at twice: here, before a body is read, by what it announces; and in
the publishing transaction, exactly. Tries are counted here, by this process. Knows no HTTP.
"""

import math
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

from quickchange_adapters.records import Quota, VersionRecord

from quickchange_server.answers import as_answers
from quickchange_server.errors import RateLimited
from quickchange_server.tenant_limits import AtOnce, PerMinute

FORM_BYTES = 64 << 10
"""What a form may hold beside its files: boundaries, headers, fields."""
RETRY_AFTER_S = 5


class UploadQuotas:
    """Refuses uploads that would pass a tenant's quota or rate. `clock` gives seconds.

    `on_refusal` is told which quota it was: `uploads` or `upload_rate`; refusals for what is in the
    store are counted with those of uploads.
    """

    def __init__(
        self,
        quota: Quota | None = None,
        uploads_per_minute: int | None = None,
        max_uploads: int | None = None,
        on_refusal: Callable[[str], None] = lambda quota: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quota = quota
        self._tries = PerMinute(uploads_per_minute, clock)
        self._max_uploads = max_uploads
        self._under_way = AtOnce()
        self._on_refusal = on_refusal

    def count_try(self, tenant: str) -> None:
        """Count one upload, whatever becomes of it; a refused one is not counted.

        Raises: RateLimited.
        """
        wait_s = self._tries.take(tenant)
        if wait_s is not None:
            self._on_refusal("upload_rate")
            raise RateLimited(
                f"the tenant {tenant!r} may upload {self._tries.limit} times a minute "
                "(--tenant-uploads-per-minute)",
                retry_after_s=math.ceil(wait_s),
            )

    def one_upload(self, tenant: str) -> AbstractContextManager[None]:
        """Count an upload as under way while the block runs: its files may fill the disk.

        Raises: RateLimited.
        """
        if self._max_uploads is not None and self._under_way.of(tenant) >= self._max_uploads:
            self._on_refusal("uploads")
            raise RateLimited(
                f"the tenant {tenant!r} has {self._under_way.of(tenant)} uploads under way and may "
                f"have {self._max_uploads} (--tenant-max-uploads): wait for one to end",
                retry_after_s=RETRY_AFTER_S,
            )
        return self._under_way.one(tenant)

    def check_announced(
        self, tenant: str, owned: Collection[VersionRecord], body_bytes: int
    ) -> None:
        """Refuse a body that cannot fit beside what the tenant has.

        One whose files may be those of a version that is there passes: it would add nothing.

        Raises: Forbidden (quota_exceeded).
        """
        least_bytes = max(body_bytes - FORM_BYTES, 0)
        if self.quota is None or any(least_bytes <= v.num_bytes <= body_bytes for v in owned):
            return
        held_bytes = sum(version.num_bytes for version in owned)
        with as_answers():
            self.quota.check(tenant, len(owned) + 1, held_bytes + least_bytes)
