"""Where the files of a version are, be it in the store or in a static folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import AdapterRefused
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.loading import load_weights
from quickchange_adapters.records import CONFIG_FILE, WEIGHTS_FILE, VersionRecord
from quickchange_adapters.store import Store
from quickchange_adapters.structure import Structure, check_structure
from quickchange_adapters.weights import AdapterWeights

from quickchange_server.static_folder import check_unchanged


class VersionFiles:
    """Finds and reads files. Methods block; they run in threads.

    `folders`: the folder behind each static adapter's name. `limits.max_value` fits `dtype`.
    """

    def __init__(
        self, store: Store, base: BaseSpec, limits: AdapterLimits, dtype: torch.dtype
    ) -> None:
        self.folders: dict[str, Path] = {}
        self._store = store
        self._base = base
        self._limits = limits
        self._dtype = dtype

    def is_on_disk(self, version: VersionRecord) -> bool:
        """Whether all files are on this machine. Never waits."""
        is_static = version.name in self.folders
        return is_static or all(self._store.is_on_disk(file.sha256) for file in version.files)

    @contextmanager
    def held(self, version: VersionRecord, *files: str) -> Iterator[dict[str, Path]]:
        """Give where files can be read; they stay while the block runs.

        Raises: BlobMissing, StoreUnavailable, Conflict (a static folder changed).
        """
        folder = self.folders.get(version.name)
        if folder is not None:
            check_unchanged(version, folder)
            yield {file: folder / file for file in files}
            return
        digests = {file.file: file.sha256 for file in version.files}
        with ExitStack() as leases:
            yield {file: leases.enter_context(self._store.lease(digests[file])) for file in files}

    def fetch(self, version: VersionRecord) -> None:
        """Bring a version's files to this machine, where `read_weights` finds them.

        Raises: what `held` raises.
        """
        with self.held(version, CONFIG_FILE, WEIGHTS_FILE):
            pass

    def measure(self, version: VersionRecord) -> Structure:
        """Return what a version's files hold, without its numbers.

        Raises: AdapterRefused, OSError, and what `held` raises.
        """
        with self.held(version, CONFIG_FILE, WEIGHTS_FILE) as paths:
            structure = check_structure(
                paths[CONFIG_FILE], paths[WEIGHTS_FILE], self._base, self._limits
            )
        if structure.problems:
            raise AdapterRefused(structure.problems)
        return structure

    def read_staged(self, config: Path, weights: Path, digest: str) -> AdapterWeights:
        """Return the tensors of an upload that is not in the store yet.

        Raises: AdapterRefused, OSError.
        """
        return load_weights(config, weights, self._base, digest, self._dtype, self._limits)

    def read_weights(self, version: VersionRecord) -> AdapterWeights:
        """Return a version's tensors.

        Raises: AdapterRefused, OSError, and what `held` raises.
        """
        with self.held(version, CONFIG_FILE, WEIGHTS_FILE) as paths:
            return load_weights(
                paths[CONFIG_FILE],
                paths[WEIGHTS_FILE],
                self._base,
                version.digest,
                self._dtype,
                self._limits,
            )
