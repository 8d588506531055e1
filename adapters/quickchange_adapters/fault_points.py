"""Named moments of writing, at which tests kill the process or see what came before what.

Each step below has two points, `before STEP` and `after STEP`. A step that fails has no after.

| step | what is done between its two points |
|---|---|
| `stage.sync` | the bytes of one part of an upload go to the disk |
| `reserve.commit` | the catalog spares the blobs that an upload is about to put |
| `put.rename` | a staged file gets its digest as its name |
| `put.sync` | the entry of that name goes to the disk |
| `publish.commit` | the version's row: the upload is real |
| `release.commit` | a failed upload's reservation ends |
| `set_alias.commit` | an alias moves |
| `delete_alias.commit` | an alias goes |
| `begin_delete.commit` | a version, or a name with all of its versions, takes no new requests |
| `purge.commit` | a version's row goes, and its references to blobs |
| `delete.remove` | a blob that nothing refers to is removed |
| `delete.sync` | that removal goes to the disk |
| `collect.commit` | the rows of the removed blobs go |
| `reply` | the answer to a request goes out |

Nothing outside of the process can arm them: no variable, no file, no request. A program that wants
to be told calls `observe` itself; without that a point is one comparison.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Observer = Callable[[str], None]

_observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """Call `observer` with the name of each point that this process reaches; None ends it."""
    global _observer
    _observer = observer


def reach(point: str) -> None:
    """Say that a point was reached. What the observer raises, the step raises."""
    if _observer is not None:
        _observer(point)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Reach the point before a step, and the one after it unless it fails."""
    reach(f"before {name}")
    yield
    reach(f"after {name}")
