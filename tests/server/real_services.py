"""The whole server over the tiny base, without a command line: engine, store, catalog, service."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from quickchange_adapters.catalog import Catalog
from quickchange_adapters.key_catalog import KeyCatalog
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.store import LocalStore
from quickchange_server.adapter_probe import PROBE_PROMPT
from quickchange_server.adapter_service import AdapterService
from quickchange_server.api.app import AppServices
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.key_service import KeyService
from quickchange_server.keyring import Keyring
from quickchange_server.metrics import ServerMetrics
from quickchange_server.tokenizer import Tokenizer

MIB = 1 << 20


def real_services(
    base: Path,
    store: Path,
    limits: AdapterLimits | None = None,
    is_probing: bool = False,
    keyring: Keyring | None = None,
    **changes: Any,
) -> AppServices:
    """Return services around a float32 engine, with changes of its settings.

    `store` is a folder for uploads, which are measured with a prompt if `is_probing`. Without a
    `keyring` nobody is asked for a key.
    """
    metrics = ServerMetrics()
    tokenizer = Tokenizer.load(base)
    settings = EngineSettings(
        served_name="tiny",
        kv_cache_bytes=4 * MIB,
        adapter_device_bytes=4 * MIB,
        adapter_host_bytes=16 * MIB,
        max_queue=8,
        max_batch_rows=8,
    )
    engine = EngineClient(base, replace(settings, **changes), metrics)
    catalog = Catalog(f"sqlite:///{store}/catalog.db")
    service = AdapterService(
        engine,
        LocalStore(store),
        catalog,
        limits or AdapterLimits(),
        engine.dtype,
        probe_ids=tokenizer.encode(PROBE_PROMPT) if is_probing else (),
    )
    keyring = keyring or Keyring()
    keys = KeyService(KeyCatalog(catalog.database), keyring)
    return AppServices(engine, service, tokenizer, metrics, keyring=keyring, keys=keys)
