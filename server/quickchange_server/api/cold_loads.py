"""Loads that callers cause count for their tenant; what is loaded, or on its way, costs nothing."""

from collections.abc import Iterable

from quickchange_server.api.services import AppServices


def count_if_cold(digests: Iterable[str], services: AppServices, tenant: str) -> None:
    """Count loads of the versions that are neither in memory nor being loaded: all, or none.

    Raises: RateLimited.
    """
    loading = services.adapters.loading()
    num_cold = sum(not services.engine.is_loaded(d) and d not in loading for d in set(digests))
    if num_cold:
        services.requests.count_loads(tenant, num_cold)
