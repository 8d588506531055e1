"""Build the native library now: `python -m quickchange_adapters.native`. An install runs this.

With `--any-cpu` also on a machine that cannot run it, as when an image is made for others.
"""

import argparse
import sys

from quickchange_adapters.native.build import BuildFailed, library_path


def main() -> int:
    """Print where the library is, or why there is none; exit code 1 then."""
    parser = argparse.ArgumentParser(prog="python -m quickchange_adapters.native")
    parser.add_argument(
        "--any-cpu", action="store_true", help="build it although this CPU may be unable to run it"
    )
    options = parser.parse_args()
    try:
        print(library_path(needs_cpu=not options.any_cpu))
    except BuildFailed as error:
        print(f"no native kernels here: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
