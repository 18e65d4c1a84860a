"""The benchmarks behind the evidence run on today's code: a few steps of each on the tiny cache, in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from routesae.harvest.cache.reader import Cache

ROOT = Path(__file__).parent.parent
TINY = {"layer": 3, "latents": 48, "k": 4, "steps": 4, "batch": 256}
SIZES = ["--latents", "48", "--k", "4", "--batch-tokens", "256", "--tokens", "1000", "--seeds", "1"]


def run(script: str, *arguments: str, results: Path) -> list[dict[str, Any]]:
    """The lines that it wrote."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--results", str(results)]
    packages = str(Path(sys.modules["routesae"].__path__[0]).parent)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": packages}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in results.read_text().splitlines()]


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "rowwise", "grow": [1, 2], "whiten": 0.5, "data": 1.0, "ema": 0.9},
        {"sae": "jumprelu", "penalty": "tanh", "optimizer": "muon", "project": False},
    ],
)
def test_a_rung_of_the_ladder_trains(change: dict[str, object], tiny_cache: Cache, tmp_path: Path) -> None:
    (line,) = run(
        "ladder.py", "--cache", str(tiny_cache.path), json.dumps(TINY | change), results=tmp_path / "l.jsonl"
    )
    assert 0 < line["norm_mse"] < 1.5


def test_quality_trains_ours_and_the_controls(tiny_cache: Cache, tmp_path: Path) -> None:
    which = ["--layer", "3", "--variants", "jumprelu", "control", "--curve-every", "2"]
    which += ["--trainers", "routesae:freeze=decoder", "pca", "mean"]
    lines = run("quality.py", "--cache", str(tiny_cache.path), *SIZES, *which, results=tmp_path / "q.jsonl")
    assert [line["trainer"] for line in lines] == ["routesae:freeze=decoder", "pca", "mean"]
    assert [round(line["l0"]) for line in lines] == [4, 4, 0]


def test_routing_scores_routers_layers_and_mlsae(tiny_cache: Cache, tmp_path: Path) -> None:
    rows = ["top2", "mlsae", "fixed layer 3"]
    which = ["--layers", "3", "--only", *rows]
    lines = run("routing.py", "--cache", str(tiny_cache.path), *SIZES, *which, results=tmp_path / "r.jsonl")
    assert [line["what"] for line in lines] == rows
    assert all(line["KLDiv"] > 0 for line in lines)
