"""Write docs/support.md: family × adapter feature × way of being served, from the tests' own list.

python tools/support_page.py            # writes the page
python tools/support_page.py --check    # exit code 1 if the page is out of date
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.server.engine.test_families import FAMILIES  # noqa: E402
from tests.server.engine.test_support import CELLS, FEATURES, MODES, Cell  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
TESTS = "tests/server/engine/test_support.py"
HEAD = f"""# What is served

Every cell is a test on a tiny random model of the family in float32 on the CPU: log probabilities
of every generated token against PEFT over the unmodified Hugging Face model, to 1e-4. A ✓ covers
all of these ways, in one test: {", ".join(MODES)}.

- **alone**: one request; **mixed**: beside another adapter and the base in one batch
- **chunked**: the prompt is longer than a step; **prefix**: its head is reused from earlier blocks
- **preempted**: computed anew after blocks ran out; **merged**: on a merged copy

A cell's test is `test_cell[FAMILY-FEATURE]` in `{TESTS}`, for example
`pytest "{TESTS}::test_cell[llama-lm_head]"`; where a feature cannot fit, the reason stands instead.
"""


def cell_text(cell: Cell) -> str:
    """Return one cell: a tick, or why not."""
    return "✓" if cell.refusal is None else cell.refusal


def page() -> str:
    """Return the whole page."""
    lines = [HEAD, "| family | " + " | ".join(FEATURES) + " |", "|---" * (len(FEATURES) + 1) + "|"]
    for family in FAMILIES:
        cells = [cell_text(cell) for cell in CELLS if cell.family == family]
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    names = ", ".join(f"`{name}` = {f.model_type} {f.overrides}" for name, f in FAMILIES.items())
    lines += ["", "The tiny models: " + names + ".", ""]
    return "\n".join(lines)


def main() -> int:
    """Write or check the page."""
    text = page()
    if "--check" in sys.argv:
        return 0 if PAGE.exists() and PAGE.read_text() == text else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
