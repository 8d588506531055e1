"""What can be wrong with an adapter, as data that travels to whoever sent it.

AdapterError
├── AdapterRefused      the bytes are not an adapter that this base can serve (many problems)
├── StoreUnavailable    the place where bytes live did not answer
└── MergeBudgetExceeded a merged copy would pass the ceiling
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


class StoreUnavailable(AdapterError):
    """Bytes or rows cannot be read or written at present."""


class MergeBudgetExceeded(AdapterError):
    """A merged copy of `needed_bytes` does not fit into what `--merged-bytes` leaves."""

    def __init__(self, needed_bytes: int, used_bytes: int, ceiling_bytes: int) -> None:
        super().__init__(
            f"a merged copy needs {needed_bytes} bytes; {used_bytes} of {ceiling_bytes} are in use"
        )
        self.needed_bytes = needed_bytes
        self.used_bytes = used_bytes
        self.ceiling_bytes = ceiling_bytes
