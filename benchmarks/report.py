"""Results as people and machines read them: a markdown table, and JSON with every single run."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine
from benchmarks.timing import Figures, median_figures
from benchmarks.workload import Scenario

Row = Sequence[str]
SCENARIO_HEADER = (
    "scenario",
    "tokens/s out (lowest–highest)",
    "TTFT p50 / p99 ms",
    "ITL p50 / p99 ms",
    "TPOT p50 ms",
    "E2E p50 / p99 s",
    "client cores",
    "server cores",
)


@dataclass(frozen=True, slots=True)
class Report:
    """One benchmark's outcome: what stands above the table, the table, and every run for JSON."""

    title: str
    machine: Machine
    settings: Mapping[str, object]
    table: str
    results: Sequence[Mapping[str, Any]]

    def markdown(self) -> str:
        """Return heading, machine, settings and table."""
        settings = "\n".join(f"- {name}: {value}" for name, value in self.settings.items())
        return f"### {self.title}\n\n{self.machine.describe()}\n{settings}\n\n{self.table}\n"

    def json(self) -> str:
        """Return everything, for machines."""
        settings = {name: str(value) for name, value in self.settings.items()}
        whole = {
            "title": self.title,
            "machine": asdict(self.machine),
            "settings": settings,
            "results": self.results,
        }
        return json.dumps(whole, indent=1) + "\n"

    def publish(self, markdown_file: Path | None, json_file: Path | None) -> None:
        """Print the table, and write the files that were asked for."""
        print(self.markdown())
        if markdown_file:
            markdown_file.write_text(self.markdown(), encoding="utf-8")
        if json_file:
            json_file.write_text(self.json(), encoding="utf-8")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `Report.publish` takes."""
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here")


def option_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse show the sentence of a ValueError instead of the function's name."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def markdown_table(header: Row, rows: Sequence[Row]) -> str:
    """Return a table whose columns line up: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_aligned(header, widths), rule, *(_aligned(row, widths) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def scenario_table(runs: Mapping[Scenario, Sequence[Figures]]) -> str:
    """Return one row per scenario: medians over its runs, and the spread of the throughput."""
    return markdown_table(SCENARIO_HEADER, [_scenario_row(s, r) for s, r in runs.items()])


def scenario_results(runs: Mapping[Scenario, Sequence[Figures]]) -> list[dict[str, Any]]:
    """Return the same for JSON, with every run."""
    return [
        {
            "scenario": scenario.label,
            "median": asdict(median_figures(figures)),
            "runs": [asdict(run) for run in figures],
        }
        for scenario, figures in runs.items()
    ]


def _scenario_row(scenario: Scenario, runs: Sequence[Figures]) -> Row:
    middle = median_figures(runs)
    rates = [run.tokens_per_s for run in runs]
    return (
        scenario.title,
        f"{middle.tokens_per_s:.1f} ({min(rates):.1f}–{max(rates):.1f})",
        f"{1e3 * middle.ttft_p50_s:.0f} / {1e3 * middle.ttft_p99_s:.0f}",
        f"{1e3 * middle.itl_p50_s:.1f} / {1e3 * middle.itl_p99_s:.1f}",
        f"{1e3 * middle.tpot_p50_s:.1f}",
        f"{middle.e2e_p50_s:.2f} / {middle.e2e_p99_s:.2f}",
        _cores(middle.client_cores),
        _cores(middle.server_cores),
    )


def _cores(value: float) -> str:
    return "–" if value != value else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _aligned(row: Row, widths: Sequence[int]) -> Row:
    return [
        c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ]
