"""Write docs/configuration.md from the settings themselves: `python tools/configuration_page.py`.

A test compares the page with what this script would write, so it cannot fall behind.
"""

from collections.abc import Iterable
from pathlib import Path

from quickchange_server.config import CLIENT_VARIABLES, CONFIG_VARIABLE, OPTIONS
from quickchange_server.option import ENV_PREFIX, Option
from quickchange_server.vllm_flags import ANYTHING, NOTHING, VLLM_FLAGS, VllmFlag

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"


def _code(names: Iterable[str]) -> list[str]:
    return [f"`{name}`" for name in names]


EXAMPLE = """\
model = "builtin:smollm2-135m"
port = 8001
kv_cache_bytes = "512MiB"
max_queue = 64
cors_origin = ["http://localhost:3000"]

[adapter]
sentiment = "adapters/examples/sentiment/adapter"
"""

HEAD = f"""\
<!-- Written by tools/configuration_page.py; change the settings in config.py, not this page. -->
# Configuration

Every setting of `quickchange serve` has one name in three spellings with one meaning: a flag, an
environment variable, and a key of the TOML file that `--config` (or `{CONFIG_VARIABLE}`) names.
**A flag wins over a variable, a variable over the file, the file over the default.**

- An unknown key in the file is an error that names the nearest known one. An unknown
  `{ENV_PREFIX}*` variable is a warning, since others may set variables for us; the ones Kubernetes
  makes for a Service (`…_SERVICE_HOST`, `…_PORT=tcp://…`) are ignored. An empty variable counts
  as not set.
- A wrong value ends the start with one sentence and exit code 2. A base or an adapter that cannot
  be served, or a port that is taken, ends it with exit code 1.
- `BYTES` are written `2GiB`, `512MiB`, `1.5GB` or as a plain number. `auto` takes a share of what
  is free when the server starts, and the start prints the resulting table; the shares are in
  [operations.md](operations.md#memory).
- Switches take no value on the command line (`--strict-fields`, `--no-strict-fields`), and `true`
  or `false` elsewhere. Settings that may be repeated are lists in the file, and separated by
  commas in a variable.

The same in a file:

```toml
{EXAMPLE}```
"""

VLLM = """\
## vLLM's flags

A command line written for vLLM starts this server too. These are flags alone, and not shown by
`--help`; `--model`, `--host` and the like, and those of the table above, mean the same in both
(`--dtype half` and `--dtype float` are `float16` and `float32`). Each that has no effect is named
by a warning at the start; one that is refused ends it, with what does the same here.

"""

TAIL = f"""\
## The client

The command line client and the Python client read {" and ".join(_code(CLIENT_VARIABLES))};
`--url` wins over the variable. The key goes out with every request ([security.md](security.md)).
"""


def render() -> str:
    """Return the whole page."""
    groups: dict[str, list[Option]] = {}
    for option in OPTIONS.values():
        groups.setdefault(option.group, []).append(option)
    sections = [_section(name, options) for name, options in groups.items()]
    return "\n".join([HEAD, *sections, _vllm_section(), TAIL])


def _section(name: str, options: Iterable[Option]) -> str:
    lines = [
        f"## {name}",
        "",
        "| flag | variable | key | default | meaning |",
        "|---|---|---|---|---|",
        *(_row(option) for option in options),
    ]
    return "\n".join(lines) + "\n"


def _vllm_section() -> str:
    rows = [f"| `{each.flag}` | {_escaped(_meaning(each))} |" for each in VLLM_FLAGS]
    return VLLM + "\n".join(["| flag of vLLM's | here |", "|---|---|", *rows]) + "\n"


def _meaning(each: VllmFlag) -> str:
    """Return what becomes of one flag of vLLM's."""
    if each.ours is not None:
        return f"is `--{each.ours.replace('_', '-')}`"
    if each.accepts is NOTHING:
        return f"refused: {each.instead}"
    if each.accepts is ANYTHING:
        return f"no effect: {each.note}"
    if each.is_switch:
        theirs = each.flag if each.accepts.holds(True) else f"--no-{each.flag[2:]}"
        return f"`{theirs}` has no effect: {each.note}; the other is refused"
    return f"{each.accepts.text} has no effect: {each.note}; others are refused"


def _row(option: Option) -> str:
    flag = option.flag if option.kind == "switch" else f"{option.flag} {option.metavar}"
    cells = [*_code((flag, option.variable, option.name)), _default(option), option.help]
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _default(option: Option) -> str:
    if option.kind == "switch":
        return "on" if option.default else "off"
    if option.default is None and option.metavar.endswith("|auto"):
        return "`auto`"
    return "" if option.default in (None, ()) else f"`{option.default}`"


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
