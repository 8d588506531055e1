"""Whether this machine can run the native library; tests that need it say why they are skipped."""

import pytest
from quickchange_adapters.native.build import BuildFailed, check_cpu, find_compiler


def why_not() -> str | None:
    try:
        check_cpu()
        find_compiler()
    except BuildFailed as error:
        return str(error)
    return None


REASON = why_not()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")
