"""Whether the native library computes a base's steps, and by which instructions."""

import ctypes
import logging
from dataclasses import dataclass
from typing import Any

from quickchange_adapters.native.amx import use_amx
from quickchange_adapters.native.build import BuildFailed
from quickchange_adapters.native.library import load_library

from quickchange_server.engine.native_step import native_refusal
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.unsupported import UnsupportedBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NativeChoice:
    """The library or why it is not used, and why its products are not computed by AMX if so."""

    library: ctypes.CDLL | None
    refusal: str | None
    amx_refusal: str | None


def choose_native(model: Any, settings: EngineSettings) -> NativeChoice:
    """Return the native library, ready to use, or else why this base is not run by it.

    Raises: UnsupportedBase if native kernels were asked for.
    """
    if settings.kernels not in ("auto", "native"):
        return _refused(f"--kernels {settings.kernels}")
    reason = native_refusal(model, settings.kv_block_size)
    if reason is None:
        try:
            library = load_library(settings.native_folder)
            amx_refusal = use_amx(library, wanted=settings.amx)
            if amx_refusal is not None:
                log.info("AMX is not used: %s", amx_refusal)
            return NativeChoice(library, None, amx_refusal)
        except BuildFailed as error:
            reason = str(error)
    if settings.kernels == "native":
        raise UnsupportedBase(f"native kernels cannot run this base here: {reason}")
    if model.device.type == "cpu":  # on a GPU nobody expects them
        log.info("native kernels are not used: %s", reason)
    return _refused(reason)


def _refused(reason: str) -> NativeChoice:
    return NativeChoice(None, reason, reason)
