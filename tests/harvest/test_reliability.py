"""The trials behind benchmarks/RELIABILITY.md: nothing is lost, whatever is done to a harvester."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


def trials(kills: int, others: int, seed: int) -> dict[str, list[str]]:
    """The cells of each row, by fault. Fails where the benchmark found a byte or an exit code that is not right."""
    command = [sys.executable, str(BENCHMARK), "harvest", "--kills", str(kills), "--trials", str(others)]
    run = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    return {row[0].split(" (")[0]: row[1:] for row in rows[1:]}


@pytest.mark.slow
def test_faults_of_every_kind_cost_nothing() -> None:
    rows = trials(kills=60, others=8, seed=1)
    assert {cells[2] for cells in rows.values()} == {"0"}
    assert int(rows["harvester killed"][1]) >= 50
    assert all(int(cells[1]) > 0 for cells in rows.values())
    assert len(rows) >= 8  # a disk can be mounted by root alone


@pytest.mark.slow
def test_torchrun_divides_the_shards_and_makes_the_same_cache(
    tiny_model: Path, tiny_corpus: Path, tiny_cache: object, tmp_path: Path
) -> None:
    size = ["--tokens", "9000", "--context", "16", "--shard-tokens", "2048", "--layers", "2-5", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "routesae"]
    data = ["harvest", "--model", str(tiny_model), "--data", str(tiny_corpus), "--out", str(tmp_path / "shards")]
    run = subprocess.run([*launch, *data, *size], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "worker 0 of 0-1" in run.stderr
    assert "worker 1 of 0-1" in run.stderr
    whole = Path(tiny_cache.path)  # type: ignore[attr-defined]
    assert contents(tmp_path / "shards") == contents(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
