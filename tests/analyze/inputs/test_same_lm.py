"""An SAE is scored only on a cache of the LM that it was trained on, whatever the metric, wherever the LM lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from routesae.analyze.clamp.run import clamp
from routesae.analyze.clamp.settings import ClampSettings
from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.inputs.lm import LMRecord, lm_of_cache, lm_of_sae, load_lm_of
from routesae.analyze.latents.settings import LatentsSettings
from routesae.analyze.latents.text import latents_of_text
from routesae.analyze.scores.metrics import LM_METRICS
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.machine import device
from routesae.machine.files import signed
from routesae.machine.settings import LMSettings
from routesae.reporting import WrongInput
from routesae.train.folder.checkpoint import load_sae
from routesae.train.run import train
from routesae.train.settings import settings_of


@pytest.fixture(scope="module")
def topk(tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saes")
    settings = {"cache": str(tiny_cache.path), "out": str(out), "sae": "topk", "layer": 3, "latents": 64, "k": 8}
    (result,) = train(settings_of({**settings, "batch_tokens": 4096, "device": "cpu"}))
    return result.folder


@pytest.fixture(scope="module")
def other_cache(
    tiny_model: Path, tiny_settings: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory
) -> Cache:
    """Of an LM with the same configuration and tokenizer, and other weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("other")
    other = Path(shutil.copytree(tiny_model, folder / "model"))
    model = AutoModelForCausalLM.from_pretrained(other)
    model.get_input_embeddings().weight.data[0] += 1
    model.save_pretrained(other)
    return harvest(tiny_settings(model=str(other), out=str(folder / "shards")))


COMMANDS: dict[str, Callable[[Cache, Path, Path], Any]] = {
    "analyze, of the cache": lambda cache, sae, out: analyze(
        AnalyzeSettings(cache=str(cache.path), saes=(str(sae),), metrics=("L0",), device="cpu")
    ),
    "analyze, with the LM": lambda cache, sae, out: analyze(
        AnalyzeSettings(cache=str(cache.path), saes=(str(sae),), metrics=("KLDiv",), device="cpu")
    ),
    "contexts": lambda cache, sae, out: contexts(
        ContextSettings(cache=str(cache.path), saes=(str(sae),), device="cpu")
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_cache_of_another_lm_of_the_same_width_is_refused(
    command: str, topk: Path, other_cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(WrongInput) as refused:
        COMMANDS[command](other_cache, topk, tmp_path)
    message = str(refused.value)
    assert message.startswith(
        f"the LM of the cache {other_cache.path} is not the LM of the SAE {topk}: its weights differ"
    )
    assert message.endswith("; give the cache that the SAE was trained on with --cache")
    assert "\n" not in message


def test_another_configuration_is_refused_unless_another_transformers_wrote_it(
    topk: Path, tiny_cache: Cache, tmp_path: Path
) -> None:
    """The hash of a configuration changes with the version of transformers, and the weights are the same."""

    def changed(name: str, **facts: Any) -> Path:
        def change(config: dict[str, Any]) -> None:
            config["metadata"]["routesae"]["source"]["cache"] |= facts

        return with_config(topk, tmp_path / name, change)

    with pytest.raises(WrongInput, match=r"changed: its config differs .*; give the cache that the SAE was"):
        COMMANDS["contexts"](tiny_cache, changed("changed", config_hash="0" * 64), tmp_path)
    versions = {"transformers": "4.0.0"}
    assert COMMANDS["analyze, of the cache"](
        tiny_cache, changed("upgraded", config_hash="0" * 64, versions=versions), tmp_path
    )


def test_the_same_lm_harvested_from_another_place_is_the_same(
    topk: Path, tiny_model: Path, tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    cache = harvest(tiny_settings(model=str(moved), tokens=3000, out=str(tmp_path / "shards")))
    assert COMMANDS["analyze, of the cache"](cache, topk, tmp_path)["saes"]


def test_a_strangers_sae_is_scored_with_one_warning(
    topk: Path, tiny_cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def strip(config: dict[str, Any]) -> None:
        config["metadata"]["routesae"]["source"] = {}
        config["metadata"]["model_name"] = "gpt2"

    folder = with_config(topk, tmp_path / "theirs", strip)
    assert COMMANDS["analyze, of the cache"](tiny_cache, folder, tmp_path)["saes"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "only width and layers were compared" in warning
    assert f"the SAE names 'gpt2', the cache {tiny_cache.manifest.model!r}" in warning


def with_config(folder: Path, copy: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "cfg.json").read_text())
    change(config)
    config["metadata"]["routesae"] = signed(config["metadata"]["routesae"])
    (copy / "cfg.json").write_text(json.dumps(config))
    return copy


def test_an_lm_of_automatic_precision_runs_in_the_one_its_cache_was_harvested_in(
    topk: Path, tiny_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dtype(record: LMRecord, lm_dtype: str = "auto") -> torch.dtype:
        found: torch.dtype = load_lm_of([record], None, LMSettings(device="cpu", lm_dtype=lm_dtype)).model.dtype
        return found

    def said(lm_dtype: Any) -> LMRecord:
        return of_cache._replace(facts={**of_cache.facts, "lm_dtype": lm_dtype})

    of_cache, of_sae = lm_of_cache(tiny_cache), lm_of_sae(topk, load_sae(topk, torch.device("cpu")).recipe)
    monkeypatch.setattr(device, "has_bfloat16_units", lambda of: True)
    assert dtype(of_cache) == dtype(of_sae) == torch.float32
    assert dtype(of_cache, "bfloat16") == torch.bfloat16
    monkeypatch.setattr(device, "has_bfloat16_units", lambda of: False)
    assert dtype(said("bfloat16")) == torch.bfloat16
    for nonsense in (None, "int4", ["float32"]):  # cfg.json may be a stranger's
        assert dtype(said(nonsense)) == torch.float32


def test_scores_clamps_and_latents_are_the_same_wherever_a_map_puts_the_lm(topk: Path, tiny_cache: Cache) -> None:
    pytest.importorskip("accelerate")

    def results(device_map: str | None) -> tuple[Any, ...]:
        where: dict[str, Any] = {"device": "cpu", "device_map": device_map}
        scoring = AnalyzeSettings(cache=str(tiny_cache.path), saes=(str(topk),), metrics=tuple(LM_METRICS), **where)
        clamping = ClampSettings(sae=str(topk), set=("3=9",), prompt=("the router reads",), max_new_tokens=4, **where)
        listing = LatentsSettings(sae=str(topk), text="the router reads a hidden state", **where)
        return analyze(scoring)["saes"], clamp(clamping)["texts"], list(latents_of_text(listing))

    assert results('{"": "disk"}') == results(None)
