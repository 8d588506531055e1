"""The text of a scrape, rendered at most four times a second. Knows no metric.

| age of the text | a scrape gets |
|---|---|
| up to 250 ms | it |
| up to 500 ms | it, while a thread renders the next one |
| more | the next one, once it is rendered |

So who scrapes all the time, as gateways do every 50 ms, never waits for a rendering. There are two
formats, whatever versions of them a caller names: their texts are kept.
"""

import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics

RENDER_INTERVAL_S = 0.25
MAX_AGE_S = 0.5

OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_TYPE = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"

Text = tuple[bytes, str]
"""The text, and its content type."""


class MetricsText:
    """A registry's text in the formats that were asked for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._texts: dict[str, tuple[float, bytes]] = {}
        self._lock = threading.Lock()
        self._refreshing: set[str] = set()

    def peek(self, accept: str = "") -> Text | None:
        """Return a text that is not older than half a second, if there is one. Never waits."""
        content_type = _content_type(accept)
        made_s, text = self._texts.get(content_type, (float("-inf"), b""))
        age_s = time.monotonic() - made_s
        if age_s > MAX_AGE_S:
            return None
        if age_s >= RENDER_INTERVAL_S and content_type not in self._refreshing:
            self._refreshing.add(content_type)
            thread = threading.Thread(target=self._refresh, args=(content_type,), daemon=True)
            thread.start()
        return text, content_type

    def render(self, accept: str = "") -> Text:
        """Return a text that is at most 250 ms old; it may have to be rendered first."""
        content_type = _content_type(accept)
        with self._lock:
            made_s, text = self._texts.get(content_type, (float("-inf"), b""))
            if time.monotonic() - made_s >= RENDER_INTERVAL_S:
                text = self._encode(content_type)
        return text, content_type

    def _refresh(self, content_type: str) -> None:
        try:
            with self._lock:
                self._encode(content_type)
        finally:
            self._refreshing.discard(content_type)

    def _encode(self, content_type: str) -> bytes:
        text = _ENCODERS[content_type](self._registry)
        self._texts[content_type] = (time.monotonic(), text)
        return text


def _content_type(accept: str) -> str:
    _, wanted = choose_encoder(accept)
    return OPENMETRICS_TYPE if wanted.startswith(OPENMETRICS) else CONTENT_TYPE_PLAIN_0_0_4


def _openmetrics(registry: CollectorRegistry) -> bytes:
    # Its other way of escaping would turn vLLM's `vllm:` into `vllm_`, which no gateway reads.
    text: bytes = openmetrics.generate_latest(registry, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
    return text


_ENCODERS: dict[str, Callable[[CollectorRegistry], bytes]] = {
    OPENMETRICS_TYPE: _openmetrics,
    CONTENT_TYPE_PLAIN_0_0_4: generate_latest,
}
