"""The metric Probe: what is told of labels that the text shows, of labels that nothing shows, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from routesae.analyze.latents.cache import Cache as Documents
from routesae.analyze.scores import probe
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.cli import main
from routesae.harvest.cache.manifest import RingState, shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.ring import write_state
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import WrongInput
from routesae.tests.shards import change_attributes
from routesae.train.folder.checkpoint import load_sae
from routesae.train.run import train
from routesae.train.settings import settings_of

ALPHABETS = {"vowels": "aeiou", "first": "bcdfg", "last": "vwxyz"}
COLUMNS = {"Probe_1", "Probe_5", "Probe_20", "Probe_input"}


@pytest.fixture(scope="module")
def cache(tiny_settings: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """90 documents whose letters are those of their label; some without one, three of a rare one."""
    folder, drawn = tmp_path_factory.mktemp("labelled"), random.Random(0)
    documents = []
    for number in range(90):
        label = list(ALPHABETS)[number % 3]
        text = " ".join("".join(drawn.choices(ALPHABETS[label], k=4)) for _ in range(12))
        kept = None if number % 15 == 0 else "rare" if number in (31, 32, 34) else label
        noise = drawn.choice(["heads", "tails"])
        documents.append({"text": text, "label": kept, "noise": noise, "url": f"http://{number}"})
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    changes = {
        "tokens": 4500,
        "layers": "2,3",
        "keep_fields": ("label", "noise", "url"),
        "shard_tokens": 1024,
        "min_chars": 1,
    }
    return harvest(tiny_settings(data=str(data), out=str(folder / "shards"), **changes))


@pytest.fixture(scope="module")
def saes(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saes")
    runs = {"sae": ["topk", "routesae", "mlsae", "crosscoder"], "layer": 3, "latents": 48, "k": 6}
    train(settings_of({**runs, "cache": str(cache.path), "out": str(out), "batch_tokens": 512, "device": "cpu"}))
    return out


def probed(cache: Cache, out: Path, **changes: Any) -> list[dict[str, Any]]:
    chosen = {"metrics": ("Probe",), "label": "label", "device": "cpu", **changes}
    rows: list[dict[str, Any]] = analyze(AnalyzeSettings(cache=str(cache.path), out=str(out), **chosen))["saes"]
    return rows


def test_labels_that_the_text_shows_are_told_by_every_kind_of_sae_and_a_coins_are_not(
    cache: Cache, saes: Path
) -> None:
    rows = probed(cache, saes)
    assert len(rows) == 4
    for row in rows:
        assert row["intervals"].keys() == COLUMNS
        assert row["Probe_input"] > 0.9, row
        assert row["Probe_20"] > 0.8, row
        assert all(row["intervals"][name][0] <= row[name] <= row["intervals"][name][1] for name in COLUMNS)
    topk = {"saes": tuple(row["folder"] for row in rows if row["variant"] == "topk")}
    (row,) = probed(cache, saes, label="noise", **topk)
    assert 0.2 < row["Probe_5"] < 0.8, row


def test_a_document_is_the_mean_over_its_kept_tokens(
    cache: Cache, saes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(probe, "_told", lambda *args: seen.append(args) or np.zeros(len(args[1])))
    (topk,) = saes.glob("topk*")
    sae = load_sae(topk, torch.device("cpu"))
    results = probe.probe({"": sae}, cache, slice(0, cache.manifest.rows), "label", 0, lambda now: None)[""]
    (latents_mF, label_m, _, _), (input_mD, _, _, _) = seen[0], seen[-1]
    documents, numbers = Documents(cache.path), []
    for number, label in enumerate(cache.documents()["label"].to_pylist()):
        if label in ALPHABETS:
            document = documents.document(number)
            hidden_TD = document.hidden[3][document.kept]
            f_TF = sae.encode(hidden_TD).dense()
            x_TD = sae(hidden_TD).x_ND
            np.testing.assert_allclose(latents_mF[len(numbers)], f_TF.mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(input_mD[len(numbers)], x_TD.mean(0), rtol=1e-4, atol=1e-5)
            assert label_m[len(numbers)] == label
            numbers.append(number)
    assert len(numbers) == len(label_m) == len(results["documents"]) > 60


def test_latents_are_chosen_on_the_documents_that_are_fitted_alone() -> None:
    # Of 3,000 columns of noise some tell all 60 labels by chance; those of four fifths say nothing of the last.
    random_mC = np.random.default_rng(0).standard_normal((60, 3000)).astype(np.float32)
    label_m = np.array(["a", "b"] * 30)
    assert 0.3 < probe._told(random_mC, label_m, 5, 0).mean() < 0.7
    random_mC[:, 1234] = 5 * (label_m == "b")
    assert probe._told(random_mC, label_m, 1, 0).mean() == 1


def test_of_a_ring_the_documents_that_stay_are_asked_about(cache: Cache, saes: Path, tmp_path: Path) -> None:
    ring, stays = tmp_path / "ring", cache.manifest.first_held_out_shard
    shutil.copytree(cache.path, ring)
    for index in range(stays):
        shutil.rmtree(ring / shard_name(index))
    write_state(ring, cache.manifest, RingState(keep=10**9, used=stays))
    for label in ("label", "noise"):  # too few of them here, as with --rows held-out
        with pytest.raises(WrongInput, match="Probe needs two such"):
            probed(Cache(ring), saes, label=label)


def test_the_rows_that_were_probed_are_said_and_none_need_be_held_out(
    cache: Cache, saes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[slice] = []

    def fake(saes: dict[str, Any], cache: Cache, rows: slice, *rest: Any) -> dict[str, dict[str, Any]]:
        read.append(rows)
        return {
            key: dict.fromkeys(("documents", "probe_1", "probe_5", "probe_20", "probe_input"), np.ones(3))
            for key in saes
        }

    monkeypatch.setattr("routesae.analyze.scores.run.probe", fake)
    rows, asked = cache.manifest.rows, {"cache": str(cache.path), "out": str(saes), "device": "cpu"}
    alone = analyze(AnalyzeSettings(metrics=("Probe",), **asked))
    assert (alone["rows"], alone["rows_scored"], alone["rows_probed"]) == ("all", [0, rows], [0, rows])
    beside = analyze(AnalyzeSettings(metrics=("Probe", "L0"), **asked))
    assert (beside["rows"], beside["rows_scored"]) == ("held-out", [cache.manifest.train_rows, rows])
    assert beside["rows_probed"] == [0, rows]
    assert read == [slice(0, rows)] * 2
    assert analyze(AnalyzeSettings(metrics=("L0",), **asked))["rows_probed"] is None
    flags = ["analyze", "--cache", str(cache.path), "--out", str(saes), "--metric", "Probe", "--device", "cpu"]
    last = [CliRunner().invoke(main, [*flags, *more]).output.splitlines()[-1] for more in ([], ["--metric", "L0"])]
    assert " tokens of all rows of " in last[0]
    assert "on its rows" not in last[0]
    assert last[1].endswith(f"; Probe on its rows 0 to {rows - 1}")

    shutil.copytree(cache.path, tmp_path / "shards")
    change_attributes(tmp_path / "shards", held_out=0.0)
    assert analyze(AnalyzeSettings(metrics=("Probe",), **{**asked, "cache": str(tmp_path / "shards")}))["saes"]
    with pytest.raises(WrongInput, match="no held-out rows"):
        analyze(AnalyzeSettings(metrics=("Probe", "L0"), **{**asked, "cache": str(tmp_path / "shards")}))


def test_labels_that_cannot_be_probed_are_refused(
    cache: Cache, tiny_cache: Cache, saes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        WrongInput, match="Probe needs one field of the documents; give --label, of label, noise, url"
    ):
        probed(cache, saes, label=None)
    with pytest.raises(WrongInput, match=r"--label topic was not kept of .* documents \(label, noise, url\)"):
        probed(cache, saes, label="topic")
    with pytest.raises(WrongInput, match=r"--label url has .* values on .* documents, of which 0 are on 10 or more"):
        probed(cache, saes, label="url")
    with pytest.raises(WrongInput, match=r"--label label has .*; Probe needs two such"):
        probed(cache, saes, rows="held-out")
    monkeypatch.setattr(probe, "MOST_DOCUMENTS", 24)  # which leave at most one label on 10
    with pytest.raises(
        WrongInput, match=r"--label label has . values on 24 documents, of which [01] are on 10 or more"
    ):
        probed(cache, saes)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(WrongInput, match=r"needs sklearn: pip install 'routesae\[probe\]'"):
        probed(cache, saes)
