"""Adapters as the server shows them: names, versions, aliases, and what was done to them."""

from typing import Any

from pydantic import Field

from quickchange_client.answer import Answer, Part
from quickchange_client.errors import Problem


class ModuleReport(Part):
    """One module that fits: shapes as uploaded, and the norm of its update, scaling * B·A."""

    module: str
    rank: int = 0
    scaling: float = 1.0
    lora_a: list[int] = Field(default_factory=list)
    lora_b: list[int] = Field(default_factory=list)
    update_norm: float | None = None


class ModuleReports(Part):
    """Which of the upload's modules fit the base, and which do not."""

    matched: list[ModuleReport] = Field(default_factory=list)
    missed: list[str] = Field(default_factory=list)
    unexpected: list[str] = Field(default_factory=list)


class Probe(Part):
    """How far an upload moves a fixed prompt: changes of log probability, in nats, and places.

    `num_top_changed` of `num_tokens` places have another likeliest token than the base.
    """

    num_tokens: int = 0
    mean_change: float = 0.0
    max_change: float = 0.0
    num_top_changed: int = 0
    seconds: float = 0.0


class AdapterReport(Answer):
    """What the server found when it checked an upload: `adapter.report`.

    `ok` is False when `problems` would refuse it; `no_effect` says that it changes nothing. `probe`
    is None where it was not measured, for `probe_reason`.
    """

    object: str = "adapter.report"
    ok: bool = True
    problems: list[Problem] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    base: str | None = None
    modules: ModuleReports = Field(default_factory=ModuleReports)
    ranks: list[int] = Field(default_factory=list)
    target_modules: list[str] = Field(default_factory=list)
    finite: bool | None = None
    no_effect: bool | None = None
    probe: Probe | None = None
    probe_reason: str | None = None


class VersionBytes(Part):
    """Bytes of a version: its files, and what it holds in host and device memory."""

    file: int = 0
    host: int = 0
    device: int = 0


class AdapterVersion(Answer):
    """One immutable upload: `adapter.version`. Times are seconds since 1970.

    `requests` and `last_used_at` are the answering server's own, since it started.
    """

    object: str = "adapter.version"
    name: str
    version: int
    digest: str
    state: str = "ready"
    peft_type: str | None = None
    rank: int | None = None
    ranks: list[int] = Field(default_factory=list)
    target_modules: list[str] = Field(default_factory=list)
    task: dict[str, Any] | None = None
    bytes: VersionBytes = Field(default_factory=VersionBytes)
    tier: str | None = None
    pinned: bool = False
    merged: bool = False
    base: str | None = None
    created_at: int | None = None
    last_used_at: int | None = None
    requests: int | None = None
    report: AdapterReport | None = None


class AdapterConfig(Answer):
    """The adapter_config.json of a version, as it was uploaded."""

    @property
    def values(self) -> dict[str, Any]:
        """All of its fields."""
        return dict(self.model_extra or {})


class Adapter(Answer):
    """A name with its versions and aliases: `adapter`. `meta.etag` is for `if_match`."""

    object: str = "adapter"
    name: str
    tenant: str | None = None
    visibility: str | None = None
    aliases: dict[str, int] = Field(default_factory=dict)
    versions: list[AdapterVersion] = Field(default_factory=list)
    tags: list[str] = Field(default_factory=list)
    created_at: int | None = None


class AdapterPage(Answer):
    """Adapters sorted by name; with `has_more`, ask again with `after=last_id`."""

    data: list[Adapter]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class AdapterDeletion(Answer):
    """What a deletion did. `deleted` is False while requests still run on it."""

    name: str
    version: int | None = None
    deleted: bool
    state: str = ""
    freed_bytes: dict[str, int] = Field(default_factory=dict)


class AdapterAction(Answer):
    """What an action did, and where the version is now."""

    action: str
    name: str
    version: int
    digest: str
    state: str = "ready"
    tier: str
    pinned: bool = False
    merged: bool
    bytes: dict[str, int] = Field(default_factory=dict)
    freed_bytes: dict[str, int] = Field(default_factory=dict)
    seconds: float = 0.0
    replica: str | None = None


class AdapterEvent(Part):
    """One line of an audit log: what was done, when (seconds since 1970), and by which key."""

    id: str
    at: float
    action: str
    actor: str = ""
    version: int | None = None
    digest: str | None = None
    alias: str | None = None


class EventPage(Answer):
    """Events, oldest first; with `has_more`, ask again with `after` as large as `last_id`."""

    data: list[AdapterEvent]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None
