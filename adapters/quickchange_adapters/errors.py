"""What can be wrong with an adapter, as data that travels to whoever sent it.

AdapterError
├── AdapterRefused      the bytes are not an adapter that this base can serve (many problems)
├── JsonRefused, PatternRefused, HeaderRefused
│                       one part cannot be read; becomes a Problem (in the part's own module)
├── CannotCheck         there is no process that could check an upload
├── CannotTrain         a training run cannot begin, or not go on
│   ├── RecipeInvalid   the recipe (or sweep) is wrong: unknown keys, values out of range
│   └── DataInvalid     rows that cannot be trained on, each with file, line and field
├── StoreUnavailable    the place where bytes or rows live did not answer
│   ├── StoreFull       it has no room for more
│   ├── StoreRefused    it does not exist, or is not ours: no waiting helps
│   └── BlobDamaged     bytes came that are not those of their name
├── BlobMissing         the store has no such bytes
├── BlobTooLarge        more bytes arrived than allowed
├── CatalogError        the catalog says no
│   ├── NotInCatalog    no such adapter, version or alias
│   ├── AliasInUse      a version cannot go while an alias points at it
│   ├── VersionDisabled a version that is out of service cannot do that
│   ├── RevisionChanged somebody else changed the adapter meanwhile
│   ├── QuotaExceeded   the tenant would have more than it may
│   ├── PublicNameTaken another tenant has a public adapter of that name
│   ├── AdminKeyNeeded  the first key must be one that can make others
│   └── LastAdminKey    without it nobody could make or revoke a key
├── NotFinite           a merged matrix is beyond the serving dtype
├── MergeBudgetExceeded a merged copy would pass the ceiling
└── PinBudgetExceeded   pinned versions would fill host memory
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why an upload is refused.

    Attributes:
        code: refusal code of the public contract, e.g. `shape_mismatch`.
        where: config key, tensor or module it is about; empty if the whole file.
        message: what is wrong, with the values.
        hint: what to do about it; may be empty.
    """

    code: str
    where: str
    message: str
    hint: str = ""


class AdapterError(Exception):
    """Root of the adapters' tree."""


class AdapterRefused(AdapterError):
    """The upload cannot be served; `problems` lists every reason found."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{p.code}: {p.message}" for p in problems))
        self.problems = problems


class CannotCheck(AdapterError):
    """No process could be started that would check an upload."""


class CannotTrain(AdapterError):
    """A training run cannot begin, or cannot go on."""

    exit_code = 1


class RecipeInvalid(CannotTrain):
    """A recipe cannot be followed as it is written; `problems` has a sentence for each reason."""

    exit_code = 2

    def __init__(self, file: str, problems: list[str]) -> None:
        super().__init__(
            "\n  ".join([f"{file}:", *problems]) if len(problems) > 1 else f"{file}: {problems[0]}"
        )
        self.problems = problems


class DataInvalid(CannotTrain):
    """Rows cannot be trained on; `problems` has file, line and field of each, as far as shown."""

    exit_code = 2

    def __init__(self, problems: list[str], num_more: int = 0) -> None:
        more = [f"and {num_more} more"] if num_more else []
        super().__init__("\n  ".join(["the data cannot be used:", *problems, *more]))
        self.problems = problems


class StoreUnavailable(AdapterError):
    """Bytes or rows cannot be read or written at present."""


class StoreFull(StoreUnavailable):
    """There is no room for bytes or rows; nothing was kept of what was sent."""


class StoreRefused(StoreUnavailable):
    """The place that was named is not there, or does not let us in."""


class BlobDamaged(StoreUnavailable):
    """A blob's bytes have another sha256 than its name says, also when they are read again."""

    def __init__(self, sha256: str) -> None:
        super().__init__(f"blob {sha256} is damaged: its bytes have another sha256")
        self.sha256 = sha256


class BlobTooLarge(AdapterError):
    """More bytes arrived than the writer's limit."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"more than {max_bytes} bytes arrived")
        self.max_bytes = max_bytes


class BlobMissing(AdapterError):
    """No blob with this sha256 is in the store."""

    def __init__(self, sha256: str) -> None:
        super().__init__(f"the store has no blob {sha256}")
        self.sha256 = sha256


class CatalogError(AdapterError):
    """The catalog cannot do what was asked; its state is unchanged."""


class NotInCatalog(CatalogError):
    """No such thing; `what` is adapter, version, alias or key."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"there is no {what} {name!r}")
        self.what = what


class AliasInUse(CatalogError):
    """Aliases point at the version that was to go."""

    def __init__(self, name: str, version: int, aliases: list[str]) -> None:
        super().__init__(
            f"version {version} of {name!r} is what {', '.join(aliases)} means: "
            "move or delete the alias first"
        )
        self.aliases = aliases


class VersionDisabled(CatalogError):
    """A version is out of service."""

    def __init__(self, name: str, version: int) -> None:
        super().__init__(f"version {version} of {name!r} is disabled: enable it first")


class RevisionChanged(CatalogError):
    """The adapter is not in the state that the caller saw."""

    def __init__(self, name: str) -> None:
        super().__init__(f"adapter {name!r} was changed meanwhile: read it again")


class QuotaExceeded(CatalogError):
    """A tenant's versions would be more than its quota; `what` is versions or bytes."""

    def __init__(self, tenant: str, what: str, wanted: int, allowed: int) -> None:
        super().__init__(
            f"with this upload the tenant {tenant!r} would have {wanted} {what} in the store, and "
            f"it may have {allowed}: delete versions that nobody needs"
        )


class PublicNameTaken(CatalogError):
    """Two public adapters of one name would leave it open which of them it means."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"another tenant has a public adapter {name!r}: take another name, or upload it with "
            "visibility private"
        )


class AdminKeyNeeded(CatalogError):
    """A key was to be made while there is nobody who could make or revoke one afterwards."""

    def __init__(self) -> None:
        super().__init__(
            "there is no admin key yet, so the first key must have the scope 'admin' and belong to "
            "the tenant 'default': else nobody could make or revoke keys"
        )


class LastAdminKey(CatalogError):
    """The key that was to be revoked is the only one that can make and revoke keys."""

    def __init__(self, key_id: str) -> None:
        super().__init__(
            f"the key {key_id!r} is the last admin key of the tenant 'default': make another one "
            "first, or start the server with --admin-key-file"
        )


class NotFinite(AdapterError):
    """A merged matrix holds values beyond the serving dtype."""


class MergeBudgetExceeded(AdapterError):
    """A merged copy of `needed_bytes` does not fit into what `--merged-bytes` leaves."""

    def __init__(self, needed_bytes: int, used_bytes: int, ceiling_bytes: int) -> None:
        super().__init__(
            f"a merged copy needs {needed_bytes} bytes; {used_bytes} of {ceiling_bytes} are in use"
            ": unmerge another, or raise --merged-bytes"
        )
        self.needed_bytes = needed_bytes
        self.used_bytes = used_bytes
        self.ceiling_bytes = ceiling_bytes


class PinBudgetExceeded(AdapterError):
    """A version of `needed_bytes` does not fit into what pins may take of host memory."""

    def __init__(self, needed_bytes: int, used_bytes: int, ceiling_bytes: int) -> None:
        super().__init__(
            f"pinning it takes {needed_bytes} bytes; {used_bytes} of the {ceiling_bytes} that pins "
            "may take are in use: unpin another, or raise --adapter-host-bytes"
        )
        self.needed_bytes = needed_bytes
        self.used_bytes = used_bytes
        self.ceiling_bytes = ceiling_bytes
