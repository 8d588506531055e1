"""What `serve run quickchange_server.ray_app:build NAME=VALUE …` is given. Imports no Ray.

A few names say how many replicas there are; all others are the server's own settings.
"""

import contextlib
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from quickchange_server.config import OPTIONS, ServerConfig, load_config
from quickchange_server.errors import ConfigInvalid

NOT_HERE = {
    "port": "http_options of Ray Serve say where its proxy listens",
    "admin_port": "one machine may hold several replicas, and they would want the same port",
}


@dataclass(frozen=True, slots=True)
class RaySettings:
    """How the application is laid out over a cluster.

    Attributes:
        min_replicas: engines that are always there.
        max_replicas: engines under load; 0: as many as `min_replicas`, without autoscaling.
        target_ongoing_requests: requests for each engine that autoscaling aims at; 0: one batch.
        max_ongoing_requests: requests that one engine is given at once; 0: two batches.
        upscale_delay_s: how long load must last before an engine is added.
        downscale_delay_s: how long quiet must last before one is taken away.
        ingress_replicas: processes that read requests and choose an engine.
        num_cpus: cores that Ray sets aside for an engine; also its number of threads.
        num_gpus: GPUs that Ray gives an engine.
    """

    min_replicas: int = 1
    max_replicas: int = 0
    target_ongoing_requests: float = 0.0
    max_ongoing_requests: int = 0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    ingress_replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def engine_options(self, config: ServerConfig) -> dict[str, Any]:
        """Return the options of the engines' deployment."""
        rows = config.max_batch_rows
        options: dict[str, Any] = {
            "max_ongoing_requests": self.max_ongoing_requests or 2 * rows,
            "max_queued_requests": config.max_queue,
            "graceful_shutdown_timeout_s": config.drain_timeout,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
        }
        if self.most_replicas == self.min_replicas:
            return {**options, "num_replicas": self.min_replicas}
        scaling = {
            "min_replicas": self.min_replicas,
            "max_replicas": self.most_replicas,
            "target_ongoing_requests": self.target_ongoing_requests or rows,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
        }
        return {**options, "autoscaling_config": scaling}

    def ingress_options(self, config: ServerConfig) -> dict[str, Any]:
        """Return the options of the ingress: it must never be what requests wait for."""
        engines = self.engine_options(config)["max_ongoing_requests"] * self.most_replicas
        return {
            "num_replicas": self.ingress_replicas,
            "max_ongoing_requests": engines + config.max_queue + 64,
            "graceful_shutdown_timeout_s": config.drain_timeout,
            "ray_actor_options": {"num_cpus": 0},
        }

    @property
    def most_replicas(self) -> int:
        """The engines under load."""
        return self.max_replicas or self.min_replicas


def read_settings(
    arguments: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> tuple[RaySettings, ServerConfig]:
    """Read both kinds of settings. Folders become absolute: replicas run elsewhere.

    Raises: ConfigInvalid.
    """
    given = {name.replace("-", "_"): value for name, value in arguments.items()}
    layout: dict[str, Any] = {each.name: each.default for each in fields(RaySettings)}
    for name in given:
        if name in NOT_HERE:
            raise ConfigInvalid(f"{name} is not for Ray: {NOT_HERE[name]}", param=name)
        if name not in OPTIONS and name not in layout and name != "config":
            nearest = difflib.get_close_matches(name, [*OPTIONS, *layout], n=1, cutoff=0.5)
            found = f" (nearest: {nearest[0]})" if nearest else ""
            raise ConfigInvalid(f"unknown setting {name!r}{found}", param=name)
    settings = RaySettings(**{n: _number(n, given[n], layout[n]) for n in layout if n in given})
    if settings.most_replicas < settings.min_replicas:
        raise ConfigInvalid("max_replicas is less than min_replicas", param="max_replicas")
    flags = {name: value for name, value in given.items() if name not in layout}
    return settings, _with_absolute_folders(load_config(flags, environ))


def _number(name: str, value: object, default: float) -> Any:
    """Read a number that came as itself or as text; only those with default 0 may be 0."""
    kind = type(default)
    number: float | None = None
    with contextlib.suppress(ValueError):
        number = kind(str(value))
    if number is None or not 0 <= number < 1e6 or (number == 0 and name == "min_replicas"):
        raise ConfigInvalid(
            f"{name} {value!r} is not {'a number' if kind is float else 'a whole number'} "
            f"{'from 1' if name == 'min_replicas' else 'from 0'} on",
            param=name,
        )
    return number


def _with_absolute_folders(config: ServerConfig) -> ServerConfig:
    model = Path(config.model).expanduser()
    changed: dict[str, Any] = {"cache": config.cache_folder.absolute()}
    if model.is_dir():
        changed |= {
            "model": str(model.absolute()),
            "served_model_name": config.base_name,
        }
    if config.store_url is None:
        changed["store"] = config.store_folder.absolute()
    for name in ("adapter", "lora_modules"):
        found = [replace(a, folder=a.folder.absolute()) for a in getattr(config, name)]
        changed[name] = tuple(found)
    changed["lora_root"] = tuple(folder.absolute() for folder in config.lora_root)
    return replace(config, **changed)
