"""Which bytes this process is to keep pinned or merged: the catalog's wishes, and its own.

A wish is about a version; what is done is done for its bytes, which several versions may share: one
that wishes is enough. A wish of this process alone (`?scope=replica`) holds until the catalog's own
changes, or the process ends. Lives on the event loop; starts nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quickchange_adapters.records import VersionRecord
from quickchange_adapters.version_states import Wish

from quickchange_server.adapter_directory import AdapterDirectory

Wished = Mapping[str, VersionRecord]
"""By digest, a version whose files can be loaded for it."""


@dataclass(frozen=True, slots=True)
class WishHere:
    """What this process alone wishes for a digest, and what the catalog wished at that time."""

    version: VersionRecord
    is_wished: bool
    was_wished: bool


class Wishes:
    """Wishes by digest, among versions that take requests."""

    def __init__(self, directory: AdapterDirectory) -> None:
        self._directory = directory
        self._here: dict[tuple[Wish, str], WishHere] = {}
        self._generation = -1
        self._wished: dict[Wish, dict[str, VersionRecord]] = {"pin": {}, "merge": {}}
        self._words: set[tuple[Wish, str]] = set()
        self._seen: dict[Wish, frozenset[str]] = {}

    def wished(self, wish: Wish) -> Wished:
        """Return all that is wished now."""
        if self._generation != self._directory.generation:
            self._generation = self._directory.generation
            self._renew()
        return self._wished[wish]

    def is_wished(self, wish: Wish, version: VersionRecord) -> bool:
        """Whether a wish holds for a version, or would if it were in service."""
        if version.state != "ready":
            return version.wants_pin if wish == "pin" else version.wants_merge
        return version.digest in self.wished(wish)

    def note_word(self, wish: Wish, digest: str) -> None:
        """Take note that somebody has asked for it, or against it, by name."""
        self._words.add((wish, digest))

    def has_word(self, wish: Wish, digest: str) -> bool:
        """Whether somebody has said how it is to be: here, or in the catalog while this one ran."""
        self.wished(wish)
        return (wish, digest) in self._words

    def get_here(self, wish: Wish, digest: str) -> WishHere | None:
        """Return what this process alone wishes."""
        return self._here.get((wish, digest))

    def set_here(self, wish: Wish, version: VersionRecord, is_wished: bool) -> None:
        """Wish something in this process alone."""
        was_wished = version.digest in self._of_catalog()[wish]
        here = WishHere(version, is_wished, was_wished)
        self.restore_here(wish, version.digest, here)

    def restore_here(self, wish: Wish, digest: str, here: WishHere | None) -> None:
        """Wish again what `get_here` gave; None: what the catalog wishes."""
        if here is not None:
            self._here[wish, digest] = here
        else:
            self._here.pop((wish, digest), None)
        self._generation = -1

    def _renew(self) -> None:
        wished = self._of_catalog()
        self._note_changes(wished)
        for (wish, digest), here in list(self._here.items()):
            is_old = (digest in wished[wish]) != here.was_wished
            if is_old or not self._directory.is_served(digest):
                del self._here[wish, digest]
            elif here.is_wished:
                wished[wish].setdefault(digest, here.version)
            else:
                wished[wish].pop(digest, None)
        self._wished = wished

    def _note_changes(self, wished: Mapping[Wish, Mapping[str, VersionRecord]]) -> None:
        """What came into the catalog's wishes or left them was somebody's word."""
        for wish, versions in wished.items():
            digests = frozenset(versions)
            changed = digests ^ self._seen.get(wish, frozenset())
            self._words.update((wish, digest) for digest in changed)
            self._seen[wish] = digests
        self._words = {word for word in self._words if self._directory.is_served(word[1])}

    def _of_catalog(self) -> dict[Wish, dict[str, VersionRecord]]:
        wished: dict[Wish, dict[str, VersionRecord]] = {"pin": {}, "merge": {}}
        for version in self._directory.served_versions():
            if version.wants_pin:
                wished["pin"].setdefault(version.digest, version)
            if version.wants_merge:
                wished["merge"].setdefault(version.digest, version)
        return wished
