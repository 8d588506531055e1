"""The shipped examples' scripts as modules; they lie outside every package."""

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"


def load_example(script: str, example: str = "sentiment") -> ModuleType:
    """Run a script of an example as a module, without its `main`."""
    file = EXAMPLES / example / f"{script}.py"
    spec = importlib.util.spec_from_file_location(f"{example}_{script}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
