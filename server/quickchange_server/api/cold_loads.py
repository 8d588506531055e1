"""Loads that callers cause count for their tenant; what is loaded, or on its way, costs nothing."""

from quickchange_server.api.services import AppServices


def count_if_cold(digest: str, services: AppServices, tenant: str) -> None:
    """Count a load if a version is neither in memory nor being loaded.

    Raises: RateLimited.
    """
    if not services.engine.is_loaded(digest) and digest not in services.adapters.loading():
        services.requests.count_load(tenant)
