"""What the server says of itself: models, memory, health."""

from pydantic import Field

from quickchange_client.answer import Answer


class Model(Answer):
    """A string that requests may use as `model`: a base, a bare name, or `name@alias`."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str | None = None
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(Answer):
    """All that may be asked for by `model`."""

    object: str = "list"
    data: list[Model] = Field(default_factory=list)


class Memory(Answer):
    """Bytes by part, as further fields: base, merged copies, adapter pool, KV, process, device."""


class Health(Answer):
    """Whether the server takes requests now."""

    status: str = "ok"
