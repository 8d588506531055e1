"""An adapter service that holds what a test put into it; no store, no catalog, no checks."""

from collections.abc import AsyncIterable, Callable, Collection, Mapping, Sequence
from pathlib import Path

from quickchange_adapters.errors import Problem
from quickchange_adapters.store import StagedFile
from quickchange_adapters.task import Task
from quickchange_adapters.version_states import Wish
from quickchange_server.adapter_names import AdapterNames
from quickchange_server.adapter_service import AdapterService, FileName, UploadForm
from quickchange_server.adapter_upload import form_problems, refusal
from quickchange_server.adapter_views import (
    ModelView,
    ResolvedModel,
    UploadResult,
    VersionView,
)
from quickchange_server.catalog_poll import OnChange
from quickchange_server.errors import NotFound
from quickchange_server.load_observer import LoadObserver


def version_view(name: str, version: int = 1) -> VersionView:
    """Return a version of rank 8."""
    return VersionView(
        name=name,
        version=version,
        digest="d1" * 32,
        state="ready",
        peft_type="LORA",
        rank=8,
        ranks=(8,),
        target_modules=("q_proj",),
        task=None,
        file_bytes=10,
        host_bytes=0,
        device_bytes=0,
        tier="disk",
        pinned=False,
        merged=False,
        base="tiny",
        created_at=1,
        last_used_at=None,
        num_requests=0,
        report={},
    )


class ScriptedAdapters(AdapterService):
    """Adapters by name; uploads are remembered with their bytes, or refused with `problems`."""

    def __init__(self, digests: dict[str, str] | None = None, base: str = "tiny") -> None:
        """Serve `digests`: model string -> digest; `tasks`: adapter's name -> task."""
        self.base_names = (base,)
        self.names = AdapterNames()
        self.loading = list[str]
        self.part = lambda owner: None
        self.digests = digests or {}
        self.tasks: dict[str, Task] = {}
        self.problems: list[Problem] = []
        self.acquired: list[str] = []
        self.uploads: list[UploadForm] = []
        self.received: dict[str, bytes] = {}
        self.num_discarded = 0

    async def start(self) -> None:
        """Do nothing."""

    def on_catalog_change(self, renew: OnChange) -> None:
        """Do nothing: there is no catalog."""

    def on_adapter_gone(self, forget: Callable[[str], None]) -> None:
        """Do nothing: what is here stays."""

    def tell(self, observer: LoadObserver) -> None:
        """Do nothing: nothing is loaded."""

    def num_unmet(self) -> Mapping[Wish, int]:
        """Nothing is wished."""
        return {"pin": 0, "merge": 0}

    async def stop(self) -> None:
        """Do nothing."""

    async def stage(self, file: FileName, chunks: AsyncIterable[bytes]) -> StagedFile:
        """Remember the bytes."""
        data = b"".join([chunk async for chunk in chunks])
        self.received[file] = data
        return StagedFile(Path(file), "ab" * 32, len(data))

    async def discard(self, staged: Sequence[StagedFile | None]) -> None:
        """Count."""
        self.num_discarded += len(staged)

    async def upload(self, form: UploadForm) -> UploadResult:
        """Refuse with the form's problems and `problems`, or accept."""
        problems = [*form_problems(form, self.base_names), *self.problems]
        if problems:
            raise refusal(problems)
        self.uploads.append(form)
        is_new = form.name not in self.digests
        self.digests[form.name] = "d1" * 32
        return UploadResult(is_new, version_view(form.name))

    def resolve(self, model: str, *, tenant: str = "default") -> ResolvedModel:
        """Look a model string up."""
        if model in self.base_names:
            return ResolvedModel("base", model, "ba5e" * 16)
        if model not in self.digests:
            raise NotFound(f"there is no model {model!r}", code="model_not_found", param="model")
        name = model.partition("@")[0].partition(":")[0]
        task = self.tasks.get(name)
        return ResolvedModel("adapter", name, self.digests[model], version=1, task=task)

    async def acquire(self, resolved: ResolvedModel, *, is_repeat: bool = False) -> None:
        """Remember what was asked for."""
        self.acquired.append(resolved.digest)

    async def acquire_mix(
        self, owner: str, parts: Sequence[ResolvedModel], *, is_repeat: bool = False
    ) -> None:
        """Remember what was asked for."""
        self.acquired += [part.digest for part in parts]

    def digests_of(self, tenant: str) -> None:
        """Hide nothing."""

    def models(
        self, *, tenant: str = "default", names: Collection[str] | None = None
    ) -> Sequence[ModelView]:
        """Return the base and all adapters."""
        return [self.model(name) for name in (*self.base_names, *self.digests)]

    def model(self, model_id: str, *, tenant: str = "default") -> ModelView:
        """Return one model."""
        resolved = self.resolve(model_id)
        parent = None if resolved.kind == "base" else self.base_names[0]
        return ModelView(model_id, 1, model_id, parent, 512)
