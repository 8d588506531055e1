"""How large an adapter may be, as one frozen object."""

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """Ceilings that an upload is held to before anything is allocated for it.

    Attributes:
        max_rank: largest rank of a module.
        max_config_bytes: size of adapter_config.json.
        max_weights_bytes: size of adapter_model.safetensors.
        max_header_bytes: size of the safetensors header.
        max_value: largest magnitude the serving dtype can hold (default: bfloat16's).
    """

    max_rank: int = 256
    max_config_bytes: int = 256 * KIB
    max_weights_bytes: int = GIB
    max_header_bytes: int = MIB
    max_value: float = 3.3895e38


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """What checking one upload may cost; an upload that needs more is refused.

    Attributes:
        max_cpu_s: computing time, in whole seconds.
        max_wall_s: time in all, should others have the cores.
        max_memory_bytes: memory beyond what the process has before its first job.
        max_jobs: a process is replaced after so many.
    """

    max_cpu_s: int = 20
    max_wall_s: float = 60.0
    max_memory_bytes: int = 256 * MIB
    max_jobs: int = 500
