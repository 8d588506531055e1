"""What a check of a store and its catalog finds, as data that people and programs read."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        code: what kind, for programs.
        where: a blob's sha256, a version, an alias or a file.
        message: what is wrong, with the values.
        hint: what to do about it.
        used_by: the versions that need it.
        is_repaired: whether it was put right.
    """

    code: str
    where: str
    message: str
    hint: str = ""
    used_by: tuple[str, ...] = ()
    is_repaired: bool = False

    def repaired(self, how: str) -> "Finding":
        """Return the finding as one that was dealt with; `how` takes the place of the hint."""
        return replace(self, hint=how, is_repaired=True)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "code": self.code,
            "where": self.where,
            "message": self.message,
            "hint": self.hint,
            "used_by": list(self.used_by),
            "repaired": self.is_repaired,
        }


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was looked at, and what was found."""

    num_versions: int
    num_blobs: int
    num_bytes: int
    findings: tuple[Finding, ...]

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong any more."""
        return all(finding.is_repaired for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "object": "fsck.report",
            "ok": self.is_ok,
            "checked": {
                "versions": self.num_versions,
                "blobs": self.num_blobs,
                "bytes": self.num_bytes,
            },
            "problems": [finding.to_json() for finding in self.findings],
        }
