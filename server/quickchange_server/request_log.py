"""The server's log: plain lines for people, or one JSON object a line, and a line for each request.

Prompts and answers are never in it, unless prompts were asked for.
"""

import json
import logging
import sys
import time
from typing import Any, TextIO

from quickchange_server.request_record import GenerationRecord, RequestRecord

ROOMS = ("quickchange_server", "quickchange_adapters")
QUIET_ROUTES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""Asked every few seconds: a line only where the answer is bad."""
log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record; what a request's record holds is at the top level."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, and the fields of a request as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, and the lines of a traceback if there is one."""
        fields = getattr(record, "fields", {})
        pairs = "".join(f" {name}={_shown(value)}" for name, value in fields.items())
        line = f"{_utc(record.created)} {record.levelname.lower()} {record.getMessage()}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up_logging(level: str, format: str, stream: TextIO | None = None) -> logging.Handler:
    """Send the log of this project from `level` on, and others' warnings, to a stream (stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [each for each in root.handlers if getattr(each, "is_quickchange", False)]:
        root.removeHandler(old)
    handler.is_quickchange = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    for room in ROOMS:
        logging.getLogger(room).setLevel(level.upper())
    return handler


def log_request(record: RequestRecord) -> None:
    """Write a request's line: at `info`, or at `warning` where the server failed."""
    if record.route in QUIET_ROUTES and not record.is_failure:
        return
    level = logging.WARNING if record.is_failure else logging.INFO
    log.log(
        level,
        "%s %s %d",
        record.method,
        _path(record),
        record.status,
        extra={"fields": request_fields(record)},
    )


def request_fields(record: RequestRecord) -> dict[str, Any]:
    """Return what is worth telling of a request; what was not reached or not asked is left out."""
    fields: dict[str, Any] = {"request_id": record.id, "duration_s": round(record.duration_s, 4)}
    if record.tenant:
        fields["tenant"] = record.tenant
    if record.error_code:
        fields["error"] = record.error_code
    if record.generation is not None:
        fields |= _generation_fields(record.generation, record.duration_s)
    return fields


def _generation_fields(generation: GenerationRecord, duration_s: float) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": generation.model,
        "adapter_digest": ",".join(digest[:12] for digest in generation.digests) or None,
        "outcome": generation.outcome,
        "finish_reason": ",".join(dict.fromkeys(generation.finish_reasons)) or None,
        "prompt_tokens": generation.num_prompt_tokens,
        "cached_tokens": generation.num_cached_tokens,
        "generated_tokens": generation.num_generated_tokens,
        **stage_seconds(generation, duration_s),
        "prompts": generation.prompts,
    }
    return {name: value for name, value in fields.items() if value is not None}


def stage_seconds(generation: GenerationRecord, duration_s: float) -> dict[str, float]:
    """Return how long a generation waited, was prefilled, and was decoded, as far as it came."""
    stages: dict[str, float] = {}
    if generation.queue_s is not None:
        stages["queue_s"] = round(generation.queue_s, 4)
    if generation.queue_s is not None and generation.ttft_s is not None:
        stages["prefill_s"] = round(generation.ttft_s - generation.queue_s, 4)
        stages["decode_s"] = round(max(duration_s - generation.ttft_s, 0.0), 4)
    return stages


def _path(record: RequestRecord) -> str:
    """Return the path, without what could end the line or fill the disk."""
    return "".join(char if char.isprintable() else "?" for char in record.path[:200])


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    is_plain = text.isprintable() and not set(text) & set(' "=')
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"
