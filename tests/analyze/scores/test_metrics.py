"""A metric is one record: everything that shows metrics follows the registry."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from routesae.analyze.scores.metrics import HIGHER, METRICS, Metric
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.train.run import train
from routesae.train.settings import settings_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "science" / "metrics.md"


def test_a_metric_that_is_added_to_the_registry_is_asked_for_computed_and_has_an_interval(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    density = Metric(
        name="Density",
        meaning="share of latents active on a token",
        better=HIGHER,
        value=lambda sums: sums["active"] / sums["readings"] / 64,
    )
    monkeypatch.setitem(METRICS, "Density", density)
    settings = {"cache": str(tiny_cache.path), "out": str(tmp_path), "sae": "topk", "latents": 64, "k": 8}
    train(settings_of({**settings, "batch_tokens": 4096, "device": "cpu"}))
    asked = AnalyzeSettings(cache=str(tiny_cache.path), out=str(tmp_path), metrics=("L0", "Density"), device="cpu")
    (row,) = json.loads(json.dumps(analyze(asked)["saes"]))
    assert row["Density"] == row["L0"] / 64
    assert row["intervals"]["Density"] == pytest.approx([end / 64 for end in row["intervals"]["L0"]])


def test_every_metric_is_explained_in_the_documentation() -> None:
    explained = re.findall(r"^- \*\*(\w+)\*\*", PAGE.read_text(), re.MULTILINE)
    assert explained == list(METRICS)  # the table above it is made from the registry


def test_names_are_known_without_torch_and_page_and_ablation_have_a_column_for_each_record(tmp_path: Path) -> None:
    code = """
import sys
from routesae.analyze.scores.metrics import METRICS, Metric
from routesae.analyze.scores.settings import AnalyzeSettings
METRICS["Dummy"] = Metric(name="Dummy", meaning="nothing at all", better=1, value=lambda sums: None)
assert "torch" not in sys.modules
assert AnalyzeSettings(metrics=("Dummy",))
from routesae.analyze.pipeline.ablation import COLUMNS
from routesae.analyze.report import runs
assert "Dummy" in COLUMNS and runs.Column("Dummy", "nothing at all", 1) in runs.MEASURED
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_says_what_it_is_in_one_sentence_and_has_numbers_of_its_own(metric: Metric) -> None:
    assert metric.better in (-1, 0, 1)
    assert re.fullmatch(r"[a-z].*[a-z]", metric.meaning)
    others = [name for other in METRICS.values() if other is not metric for name in other.numbers]
    assert not set(metric.numbers) & set(others)
