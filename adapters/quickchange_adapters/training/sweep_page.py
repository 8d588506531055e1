"""A study's results as a table and as a picture. Knows nothing of how they came about."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quickchange_adapters.training.sweep_run import Result

TABLE = "SWEEP.md"
PICTURE = "sweep.png"
_NOTES = (
    "The validation loss is on the base that was trained on, rounded unless base_bits is 16; test "
    "figures are on the base as it is served. Times and memory are of training alone, and times of "
    "whatever else the machine did."
)


def sweep_page(recipe_name: str, results: Sequence[Result]) -> str:
    """Return the table as Markdown."""
    figure = next((each["figure"] for each in results if "figure" in each), None)
    heads = ["", "trained", "file", "steps", "validation loss", "test loss"]
    heads += [figure] if figure else []
    heads += ["CPU time", "peak memory"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += [f"| {' | '.join(_cells(each, figure is not None))} |" for each in results]
    made = f"Written by `quickchange train sweep`, from `{recipe_name}`; do not edit. {_NOTES}"
    return "\n\n".join(["# Study", made, "\n".join(lines)]) + "\n"


def _cells(result: Result, has_figure: bool) -> list[str]:
    cells = [
        _label(result),
        _shown(result, "parameters", ",d"),
        _shown(result, "adapter_bytes", ".2f", 1e-6, " MB"),
        _shown(result, "steps", "d"),
        _shown(result, "validation_loss", ".3f"),
        _shown(result, "test_loss", ".3f"),
    ]
    cells += [_shown(result, "value", ".1f", 100, " %")] if has_figure else []
    times = [_shown(result, "cpu_seconds", ".0f", 1, " s")]
    return cells + times + [_shown(result, "peak_bytes", ".2f", 2**-30, " GiB")]


def _shown(result: Result, key: str, form: str, factor: float = 1, unit: str = "") -> str:
    value = result.get(key)
    if value is None:
        return "-"
    return f"{value if factor == 1 else value * factor:{form}}{unit}"


def _label(result: Result) -> str:
    settings = result["settings"].items()
    words = [f"{k} {'+'.join(v) if isinstance(v, list) else v}" for k, v in settings]
    return ", ".join(words) or str(result["name"])


def write_sweep_picture(results: Sequence[Result], file: Path) -> None:
    """Draw quality, parameters, time and memory of all cells.

    Raises: ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    cells = [each for each in results if "parameters" in each]
    panels: list[tuple[str, str, float]] = [
        ("validation_loss", "validation loss", 1),
        ("parameters", "trained parameters, millions", 1e-6),
        ("cpu_seconds", "CPU time, s", 1),
        ("peak_bytes", "peak memory, GiB", 2**-30),
    ]
    if cells and "value" in cells[0]:
        panels.insert(1, ("value", cells[0]["figure"], 1))
    figure = Figure(figsize=(3.2 * len(panels), 1.2 + 0.45 * len(cells)), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    labels = [_label(each) for each in cells]
    for axis, (key, title, factor) in zip(axes, panels, strict=True):
        bars = axis.barh(labels, [each[key] * factor for each in cells], color="#5b8aa6")
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.margins(x=0.2)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis() if axis is axes[0] else None
    figure.savefig(file, dpi=120, metadata={"Software": None})
