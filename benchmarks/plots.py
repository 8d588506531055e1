"""Draws the results of benchmarks, as `--json FILE` keeps them, into pictures for documents.

    python benchmarks/plots.py docs/results docs/plots

A file is known by its title: the comparison with peers becomes bars, the scaling over adapters
lines, and the pool with too many adapters lines. Others are passed over, by name. Needs
matplotlib.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.failure import BenchmarkFailure, exit_on_failure

Result = Mapping[str, Any]
WIDTH_INCHES, HEIGHT_INCHES = 7.0, 3.4


def new_axes() -> tuple[Any, Any]:
    """Return matplotlib's figure and axes, drawn alike on every machine.

    Raises: BenchmarkFailure without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise BenchmarkFailure("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quickchange"})
    figure, axes = pyplot.subplots(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def plot_peers(result: Result) -> Any:
    """Draw tokens per second of every system, a group of bars per scenario."""
    figure, axes = new_axes()
    found = {
        (each["scenario"], each["system"]): median(run["tokens_per_s"] for run in each["runs"])
        for each in result["results"]
        if each["runs"]
    }
    scenarios = list(dict.fromkeys(scenario for scenario, _ in found))
    systems = list(dict.fromkeys(system for _, system in found))
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        heights = [found.get((scenario, system), 0.0) for scenario in scenarios]
        places = [place + index * width for place in range(len(scenarios))]
        bars = axes.bar(places, heights, width, label=system)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(scenarios))], scenarios)
    axes.set_xlabel("adapters : clients")
    axes.set_ylabel("tokens/s out")
    axes.legend(frameon=False)
    return figure


def plot_scaling(result: Result) -> Any:
    """Draw the share of the base over the number of adapters, a line per popularity."""
    figure, axes = new_axes()
    lines: dict[str, list[tuple[int, float]]] = {}
    for each in result["results"]:
        if each["popularity"]:
            point = (each["adapters"], each["share_of_base"])
            lines.setdefault(each["popularity"], []).append(point)
    for kind, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=kind)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("adapters")
    axes.set_ylabel("throughput, share of the base's")
    axes.legend(frameon=False)
    return figure


PLOTS: Mapping[str, Callable[[Result], Any]] = {
    "Quickchange and its peers": plot_peers,
    "More and more adapters": plot_scaling,
}


def draw(results: Path, plots: Path) -> list[Path]:
    """Draw every file of a folder that is known; return the pictures.

    Raises: BenchmarkFailure when there is nothing to draw.
    """
    plots.mkdir(parents=True, exist_ok=True)
    drawn = []
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        title = result.get("title") if isinstance(result, dict) else None
        plot = PLOTS.get(title) if title else None
        if plot is None:
            print(f"{file.name}: no plot for {title!r}", file=sys.stderr)
            continue
        picture = plots / f"{file.stem}.svg"
        plot(result).savefig(picture, metadata={"Date": None})
        drawn.append(picture)
    if not drawn:
        raise BenchmarkFailure(f"nothing to draw in {results}: run a benchmark with --json first")
    return drawn


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder of JSON files")
    parser.add_argument("plots", type=Path, help="folder of pictures")
    options = parser.parse_args()
    for picture in draw(options.results, options.plots):
        print(picture)


if __name__ == "__main__":
    with exit_on_failure():
        main()
