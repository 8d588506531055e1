"""How much a tenant may upload: what it may have in the store, and how often it may try.

What is in the store is looked at twice: here, before a body is read, by what it announces; and in
the publishing transaction, exactly. Tries are counted here, by this process. Knows no HTTP.
"""

import math
import time
from collections.abc import Callable, Collection

from quickchange_adapters.records import Quota, VersionRecord

from quickchange_server.answers import as_answers
from quickchange_server.errors import RateLimited

FORM_BYTES = 64 << 10
"""What a form may hold beside its files: boundaries, headers, fields."""


class UploadQuotas:
    """Refuses uploads that would pass a tenant's quota or rate. `clock` gives seconds.

    A tenant has a minute's tries at once, and gets one back every 60 / `uploads_per_minute` s.
    """

    def __init__(
        self,
        quota: Quota | None = None,
        uploads_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quota = quota
        self._per_minute = uploads_per_minute
        self._clock = clock
        self._full_at_s: dict[str, float] = {}

    def count_try(self, tenant: str) -> None:
        """Count one upload, whatever becomes of it; a refused one is not counted.

        Raises: RateLimited.
        """
        if self._per_minute is None:
            return
        now, one_s = self._clock(), 60.0 / self._per_minute
        full_at_s = max(self._full_at_s.get(tenant, now), now) + one_s
        wait_s = full_at_s - now - 60.0
        if wait_s > 1e-6:
            raise RateLimited(
                f"the tenant {tenant!r} may upload {self._per_minute} times a minute "
                "(--tenant-uploads-per-minute)",
                retry_after_s=math.ceil(wait_s),
            )
        self._full_at_s[tenant] = full_at_s

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
