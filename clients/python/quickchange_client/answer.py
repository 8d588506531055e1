"""What all answers have in common: fields that may grow, and what came in the headers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr


@dataclass(frozen=True, slots=True)
class AnswerMeta:
    """What an answer's status and headers say.

    Attributes:
        status: HTTP status.
        request_id: what to look for in the server's log.
        adapter_digest: which version generated this; None for the base.
        etag: the state of an adapter, for `if_match`.
        queue_ms, ttft_ms: wait before the first schedule, and arrival to first token.
        ignored_fields: fields of the request that the server does not know and left out.
    """

    status: int = 200
    request_id: str | None = None
    adapter_digest: str | None = None
    etag: str | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None
    ignored_fields: tuple[str, ...] = ()

    @classmethod
    def read(cls, status: int, headers: Mapping[str, str]) -> "AnswerMeta":
        """Read an answer's status and headers."""
        ignored = headers.get("x-quickchange-ignored-fields", "")
        return cls(
            status=status,
            request_id=headers.get("x-request-id"),
            adapter_digest=headers.get("x-quickchange-adapter-digest"),
            etag=headers.get("etag"),
            queue_ms=_number(headers.get("x-quickchange-queue-ms")),
            ttft_ms=_number(headers.get("x-quickchange-ttft-ms")),
            ignored_fields=tuple(name.strip() for name in ignored.split(",") if name.strip()),
        )


class Part(BaseModel):
    """A part of an answer. Fields of a newer server are kept as they come."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Answer(Part):
    """Root of what the server answers, with what came beside the body."""

    _meta: AnswerMeta = PrivateAttr(default_factory=AnswerMeta)

    @property
    def meta(self) -> AnswerMeta:
        """Status and headers of the answer."""
        return self._meta

    def set_meta(self, meta: AnswerMeta) -> None:
        """Remember the status and headers this came with."""
        self._meta = meta


AnswerT = TypeVar("AnswerT", bound=Answer)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
