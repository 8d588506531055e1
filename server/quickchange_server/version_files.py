"""Where the files of a version are, be it in the store or in a static folder."""

from pathlib import Path

import torch
from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.loading import load_weights
from quickchange_adapters.records import CONFIG_FILE, WEIGHTS_FILE, VersionRecord
from quickchange_adapters.store import Store
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

    def paths(self, version: VersionRecord) -> dict[str, Path]:
        """Return where each file can be read.

        Raises: BlobMissing, StoreUnavailable, Conflict (a static folder changed).
        """
        folder = self.folders.get(version.name)
        if folder is None:
            return {file.file: self._store.path(file.sha256) for file in version.files}
        check_unchanged(version, folder)
        return {file.file: folder / file.file for file in version.files}

    def read_staged(self, config: Path, weights: Path, digest: str) -> AdapterWeights:
        """Return the tensors of an upload that is not in the store yet.

        Raises: AdapterRefused, OSError.
        """
        return load_weights(config, weights, self._base, digest, self._dtype, self._limits)

    def read_weights(self, version: VersionRecord) -> AdapterWeights:
        """Return a version's tensors.

        Raises: AdapterRefused, OSError, and what `paths` raises.
        """
        paths = self.paths(version)
        return load_weights(
            paths[CONFIG_FILE],
            paths[WEIGHTS_FILE],
            self._base,
            version.digest,
            self._dtype,
            self._limits,
        )
