"""What the server says of itself: models, memory, health."""

from pydantic import Field

from quickchange_client.answer import Answer, Part


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


class AdapterMemory(Part):
    """What one version holds in memory, and how many requests run on it."""

    digest: str
    host: int = 0
    device: int = 0
    merged: int = 0
    num_running: int = 0


class Memory(Answer):
    """Bytes by part (base, merged, adapter pool, host cache, KV, process) and by version.

    `process`: the parts of the process's resident size, and their `total`.
    """

    object: str = "memory"
    bytes: dict[str, int] = Field(default_factory=dict)
    process: dict[str, int] = Field(default_factory=dict)
    adapters: list[AdapterMemory] = Field(default_factory=list)


class Health(Answer):
    """Whether the server takes requests now."""

    status: str = "ok"
