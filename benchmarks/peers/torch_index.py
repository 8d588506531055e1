"""Where builds of torch for CPUs come from: PyTorch's own index, if it answers."""

import os
import urllib.error
import urllib.request

DEFAULT_INDEX = "https://download.pytorch.org/whl/cpu"


def cpu_index() -> list[str]:
    """Return pip's options for the index of CPU builds; none where it does not answer.

    pip then takes a build that it finds by itself, such as a local one. The variable
    TORCH_CPU_INDEX names another address, as for tools/setup.sh.
    """
    address = os.environ.get("TORCH_CPU_INDEX", DEFAULT_INDEX)
    try:
        with urllib.request.urlopen(f"{address}/torch/", timeout=3):
            return ["--extra-index-url", address]
    except (urllib.error.URLError, OSError, ValueError):
        return []
