"""How much of the engine a tenant may take: requests in flight, and cold adapters per minute.

Each choice of each prompt is a request. One is in flight from its admission, before its adapter is
loaded, to the end of its answer. Counted by this process. Knows no HTTP.
"""

import math
import time
from collections.abc import Callable

from quickchange_server.errors import InvalidRequest, QueueFull, RateLimited
from quickchange_server.tenant_limits import AtOnce, PerMinute

SHARE_OF_ONE = 0.75
"""Of all places, so that a tenant that waits with everything leaves some to others."""
RETRY_AFTER_S = 1


class RequestQuotas:
    """Refuses requests and loads that would pass a tenant's quota.

    `has_tenants` says whether there is more than one tenant. `on_refusal` is told which quota it
    was: `requests`, `places` or `loads`.
    """

    def __init__(
        self,
        max_requests: int | None = None,
        loads_per_minute: int | None = None,
        on_refusal: Callable[[str], None] = lambda quota: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.has_tenants: Callable[[], bool] = lambda: False
        self._max_requests = max_requests
        self._loads = PerMinute(loads_per_minute, clock)
        self._on_refusal = on_refusal
        self._in_flight = AtOnce()
        self._held: dict[str, tuple[str, int]] = {}

    def hold(self, request_id: str, tenant: str, number: int, num_places: int) -> None:
        """Count an API request's choices until `release`; a repeat counts nothing.

        `num_places` is how many may run and wait, of all tenants.

        Raises: InvalidRequest (never so many at once), RateLimited, QueueFull.
        """
        if request_id in self._held:
            return
        self._check_quota(tenant, number)
        self._check_places(tenant, number, num_places)
        self._held[request_id] = (tenant, number)
        self._in_flight.add(tenant, number)

    def release(self, request_id: str) -> None:
        """Forget a request that ended, or was refused after all."""
        held = self._held.pop(request_id, None)
        if held is not None:
            self._in_flight.remove(*held)

    def count_loads(self, tenant: str, number: int = 1) -> None:
        """Count adapters that a tenant has brought into memory: all of these, or none.

        Raises: RateLimited.
        """
        wait_s = self._loads.take(tenant, number)
        if wait_s is not None:
            self._on_refusal("loads")
            raise RateLimited(
                f"the tenant {tenant!r} may have {self._loads.limit} adapters loaded a minute "
                "(--tenant-loads-per-minute); ask for one that is loaded, or wait",
                retry_after_s=math.ceil(wait_s),
            )

    def _check_quota(self, tenant: str, number: int) -> None:
        limit = self._max_requests
        if limit is None:
            return
        if number > limit:
            raise InvalidRequest(
                f"these are {number} choices; a tenant may have {limit} in flight "
                "(--tenant-max-requests): send fewer in one request",
            )
        in_flight = self._in_flight.of(tenant)
        if in_flight + number > limit:
            self._on_refusal("requests")
            raise RateLimited(
                f"the tenant {tenant!r} has {in_flight} requests in flight and may have {limit} "
                "(--tenant-max-requests): wait for an answer",
                retry_after_s=RETRY_AFTER_S,
            )

    def _check_places(self, tenant: str, number: int, num_places: int) -> None:
        """Keep the line finite also while adapters load, and never all of it one tenant's."""
        total, own = self._in_flight.total, self._in_flight.of(tenant)
        if total + number > num_places:
            raise QueueFull(
                f"{total} requests are running or waiting; the limit is {num_places} "
                "(--max-queue and --max-batch-rows): try again soon"
            )
        share = max(1, int(SHARE_OF_ONE * num_places))
        if own and own + number > share and self.has_tenants():
            self._on_refusal("places")
            raise QueueFull(
                f"the tenant {tenant!r} has {own} requests running or waiting; one tenant may have "
                f"{share} of the {num_places} places (--max-queue and --max-batch-rows): "
                "try again soon"
            )
