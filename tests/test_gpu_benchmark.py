"""benchmarks/gpu.py runs, and measures what it says, on small shapes of a CPU."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_the_tiny_run_measures_every_row_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "gpu.json"
    flags = ["--tiny", "--device", "cpu", "--folder", str(tmp_path), "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["gpu.py", *flags])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    found = json.loads(path.read_text())
    figures = {row["what"]: row for row in found["rows"]}
    for kind, count in (("copy", 2), ("bare forward", 1), ("harvest of layers", 4), ("loader", 1), ("step of", 4)):
        assert sum(what.startswith(kind) for what in figures) == count, kind
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in figures.values())
    for what, row in figures.items():
        if what.startswith("harvest"):
            bare = next(of["value"] for name, of in figures.items() if name.startswith("bare forward"))
            assert row["of_bare"] == pytest.approx(row["value"] / bare)
        if what.startswith("step"):
            assert min(row["dense_topk_ms"], row["limit_ms"]) > 0
    table = capsys.readouterr().out
    assert all(f"| {what} |" in table for what in figures)
