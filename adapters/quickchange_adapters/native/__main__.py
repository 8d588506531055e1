"""Build the native library now: `python -m quickchange_adapters.native`. An install runs this."""

import sys

from quickchange_adapters.native.build import BuildFailed, library_path


def main() -> int:
    """Print where the library is, or why there is none; exit code 1 then."""
    try:
        print(library_path())
    except BuildFailed as error:
        print(f"no native kernels here: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
