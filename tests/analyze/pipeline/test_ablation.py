"""The ablation: every variant trained and scored in one go, and its table, files and plot saying the same."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from routesae.analyze.contexts.file import read_contexts
from routesae.analyze.interpret.ledger import SUMMARY
from routesae.analyze.pipeline.ablation import COLUMNS, ablation, draw_pareto
from routesae.analyze.pipeline.settings import VARIANTS, AblationSettings
from routesae.analyze.scores.metrics import CACHE_METRICS, LM_METRICS, METRICS
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.machine.files import signed, write_json
from routesae.reporting import WrongInput


def asked(cache: Cache, out: Path, **flags: Any) -> AblationSettings:
    base = {"cache": str(cache.path), "latents": 64, "lr": 5e-3, "batch_tokens": 512, "device": "cpu"}
    return AblationSettings.from_flags({**base, "out": str(out), "score_tokens": 32, **flags})


def test_all_six_variants_are_scored_and_the_files_say_what_analyze_says(tiny_cache: Cache, tmp_path: Path) -> None:
    rows = ablation(asked(tiny_cache, tmp_path, k=(4, 8)))
    assert {row["variant"] for row in rows} == set(VARIANTS)
    assert len(rows) == 2 * len(VARIANTS)
    folders = tuple(str(path) for path in sorted((tmp_path / "saes").iterdir()))
    metrics = (*CACHE_METRICS, *LM_METRICS)
    apart = AnalyzeSettings(cache=str(tiny_cache.path), saes=folders, metrics=metrics, tokens=32, device="cpu")
    alone = {row["sae"]: row for row in analyze(apart)["saes"]}
    for row in rows:
        compared = [METRICS[name].column for name in metrics]
        assert {name: row[name] for name in compared} == {name: alone[row["sae"]][name] for name in compared}
    read = json.loads((tmp_path / "ablation.json").read_text())["saes"]
    assert [{name: row[name] for name in rows[0]} for row in read] == rows
    others = ("Probe_1", "Absorption", "Features", "Score")  # the corpus has no labels, and nothing read the latents
    assert list(rows[0]) == [name for name in COLUMNS if name not in others]
    with (tmp_path / "ablation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["sae"] for row in table] == [row["sae"] for row in rows]
    assert [float(row["Recovered"]) for row in table] == [row["Recovered"] for row in rows]


def test_the_plot_names_every_variant_once_and_is_a_png_and_an_svg(tmp_path: Path) -> None:
    rows = [
        {"variant": variant, "L0": l0, "Recovered": recovered}
        for variant, recovered in (("topk", 0.9), ("gated", 0.8))
        for l0 in (16.0, 32.0)
    ]
    draw_pareto(rows, [tmp_path / "p.png", tmp_path / "p.svg"])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "p.svg").read_text()
    ElementTree.fromstring(svg)
    for text in ("topk", "gated", "L0, active latents a token"):
        assert svg.count(f"<!-- {text} -->") == 1


def test_a_second_call_trains_nothing_again(tiny_cache: Cache, tmp_path: Path) -> None:
    settings = asked(tiny_cache, tmp_path, sae=("topk", "gated"), k=4, plot=False)
    first = ablation(settings)
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "saes").rglob("*.safetensors")}
    assert ablation(settings) == first
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert not (tmp_path / "pareto.png").exists()


def test_overwrite_in_the_file_is_refused_by_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text("overwrite = true\n")
    with pytest.raises(WrongInput, match=rf"^{file}: overwrite is not for ablation; leave it out, and del"):
        AblationSettings.from_flags({"config": str(file)})
    file.write_text("overwrite = false\nresume = true\n")
    assert AblationSettings.from_flags({"config": str(file)}).training.resume


def test_out_in_the_file_is_the_ablations_and_the_flag_wins(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text('out = "mine"\n')
    given = ({"config": str(file)}, {"config": str(file), "out": "other"}, {})
    made = [AblationSettings.from_flags(flags) for flags in given]
    assert [one.out for one in made] == ["mine", "other", "ablation"]
    assert [one.training.out for one in made] == [str(Path(one.out) / "saes") for one in made]
    file.write_text("out = 5\n")
    with pytest.raises(WrongInput, match=r"^--out 5 is not text$"):
        AblationSettings.from_flags({"config": str(file)})


def test_features_and_score_are_columns_of_the_table_and_the_files(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = {"plot": False, "contexts": True, "threshold": 0.25}
    settings = asked(tiny_cache, tmp_path, sae=("topk", "gated"), k=4, **contexts)
    rows = ablation(settings)
    kept = [sum(one.kept for one in read_contexts(Path(row["folder"])).summaries) for row in saved(tmp_path)]
    assert [row["Features"] for row in rows] == kept
    assert max(kept) > 0
    assert [row["Features"] for row in saved(tmp_path)] == kept
    with (tmp_path / "ablation.csv").open() as file:
        assert [int(row["Features"]) for row in csv.DictReader(file)] == kept
    strict = ablation(asked(tiny_cache, tmp_path, sae=("topk", "gated"), k=4, **contexts | {"threshold": 100.0}))
    assert [row["Features"] for row in strict] == [0, 0]  # contexts of another threshold are replaced
    assert [row["Features"] for row in ablation(settings)] == kept
    write_json(
        Path(saved(tmp_path)[0]["folder"]) / SUMMARY, signed({"score": 3.5, "unanswered": 0, "last_loss": None})
    )
    monkeypatch.setattr("routesae.analyze.pipeline.ablation.contexts", None)  # contexts of this threshold are there
    again = ablation(settings)
    assert [(row["Features"], row["Score"]) for row in again] == list(zip(kept, [3.5, None], strict=True))


def saved(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "ablation.json").read_text())["saes"]
    return rows


def test_without_matplotlib_it_is_refused_before_anything_is_trained(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WrongInput, match=r"needs matplotlib: pip install 'routesae\[plot\]', or give --no-plot"):
        ablation(asked(tiny_cache, tmp_path, sae="topk", k=4))
    assert not (tmp_path / "saes").exists()
