"""Pictures of results: each system's figures are in them, and the same results draw the same."""

import json
from pathlib import Path

import pytest

from benchmarks.failure import BenchmarkFailure
from benchmarks.plots import draw

pytest.importorskip("matplotlib", reason="plots need matplotlib")

PEERS = {
    "title": "Quickchange and its peers",
    "results": [
        {"scenario": "8:16", "system": "ours", "runs": [{"tokens_per_s": 431.0}]},
        {"scenario": "8:16", "system": "theirs", "runs": [{"tokens_per_s": 57.0}]},
        {"scenario": "base:1", "system": "theirs", "runs": []},
    ],
}
SCALING = {
    "title": "More and more adapters",
    "results": [
        {"adapters": 0, "popularity": None, "share_of_base": 1.0},
        {"adapters": 8, "popularity": "zipf", "share_of_base": 0.8},
        {"adapters": 1, "popularity": "zipf", "share_of_base": 0.9},
    ],
}


def test_known_results_are_drawn_and_others_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {"other": {"title": "x"}, "untitled": {"steps": []}, "rows": [1, 2]}
    for name, result in {"peers": PEERS, "scaling": SCALING, **others}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    first, second = draw(tmp_path, tmp_path / "a"), draw(tmp_path, tmp_path / "b")
    assert [file.name for file in first] == ["peers.svg", "scaling.svg"]
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    drawn = first[0].read_text(encoding="utf-8")
    assert all(text in drawn for text in ("ours", "theirs", "431", "57", "8:16"))
    assert "base:1" not in drawn
    said = capsys.readouterr().err
    assert all(f"{name}.json" in said for name in others)


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailure, match="nothing to draw"):
        draw(tmp_path, tmp_path / "plots")
