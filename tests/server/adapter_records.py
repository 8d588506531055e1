"""Records of adapters, made up."""

from collections.abc import Mapping, Sequence

from quickchange_adapters.records import AdapterRecord, VersionRecord


def version_record(
    name: str, number: int, digest: str, tenant: str = "default", state: str = "ready"
) -> VersionRecord:
    return VersionRecord(
        tenant=tenant,
        name=name,
        number=number,
        digest=digest,
        state=state,  # type: ignore[arg-type]
        base_name="tiny",
        peft_type="LORA",
        ranks=(8,),
        target_modules=("q_proj",),
        files=(),
        created_at=1,
    )


def adapter_record(
    name: str,
    digests: Sequence[str],
    aliases: Mapping[str, int] | None = None,
    tenant: str = "default",
    visibility: str = "private",
) -> AdapterRecord:
    versions = tuple(
        version_record(name, number, digest, tenant) for number, digest in enumerate(digests, 1)
    )
    means = {"default": len(versions)} if aliases is None else aliases
    return AdapterRecord(tenant, name, visibility, (), 1, 1, means, versions)
