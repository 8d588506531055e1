"""What the routes work with, as one frozen object, and how a route gets at it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from quickchange_server.adapter_service import AdapterService
from quickchange_server.api.upload_pace import UploadPace
from quickchange_server.engine.interface import GenerationEngine
from quickchange_server.key_service import KeyService
from quickchange_server.keyring import Keyring
from quickchange_server.lora_roots import LoraRoots
from quickchange_server.metrics import ServerMetrics
from quickchange_server.process_memory import ProcessMemory
from quickchange_server.request_quotas import RequestQuotas
from quickchange_server.request_record import RequestObserver
from quickchange_server.tokenizer import Tokenizer
from quickchange_server.upload_quotas import UploadQuotas

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Largest bodies that are read, in bytes, and the slowest; files have limits of their own."""

    json_bytes: int = 8 * MIB
    upload_bytes: int = GIB + 2 * MIB
    upload_pace: UploadPace = UploadPace()
    json_pace: UploadPace = UploadPace(max_s=600.0)


@dataclass(frozen=True, slots=True)
class AppServices:
    """Everything behind the routes, and the settings they need.

    Attributes:
        static_adapters: (name, folder) pairs served by this process only.
        is_strict: unknown request fields are refused, not named in a header.
        keyring: the keys that are good now; while it is open, nobody is asked for one.
        keys: makes and revokes keys, and tells the keyring; None: there is no place to keep them.
        quotas: how much a tenant may upload.
        requests: how many requests and loads a tenant may have.
        lora_roots: folders from which adapters may be loaded by path; none: nobody may.
        is_loopback_only: only this machine reaches the server, and may call while there is no key.
        cors_origins: origins whose pages may call nevertheless.
        memory: what the process had before the base was read.
        ping_s: silence after which a stream gets a comment line.
        observers: told of each request when it is over.
        shows_prompts: the observers are told the texts of prompts too.
        stall_s: an engine that gives no sign of life for longer than this hangs.
    """

    engine: GenerationEngine
    adapters: AdapterService
    tokenizer: Tokenizer
    metrics: ServerMetrics
    static_adapters: tuple[tuple[str, Path], ...] = ()
    is_strict: bool = False
    keyring: Keyring = field(default_factory=Keyring)
    keys: KeyService | None = None
    quotas: UploadQuotas = field(default_factory=UploadQuotas)
    requests: RequestQuotas = field(default_factory=RequestQuotas)
    lora_roots: LoraRoots = field(default_factory=LoraRoots)
    is_loopback_only: bool = True
    cors_origins: tuple[str, ...] = ()
    limits: BodyLimits = field(default_factory=BodyLimits)
    memory: ProcessMemory = field(default_factory=ProcessMemory)
    ping_s: float = 15.0
    stall_s: float = 120.0
    observers: tuple[RequestObserver, ...] = ()
    shows_prompts: bool = False


async def _services_of(request: Request) -> AppServices:
    services: AppServices = request.app.state.services
    return services


Services = Annotated[AppServices, Depends(_services_of)]
