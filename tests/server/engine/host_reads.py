"""Notes where the host would wait for a device."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations that would wait for the device: a step with one cannot be captured."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(each in name for each in ("_local_scalar_dense", "nonzero", "unique", "equal")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
