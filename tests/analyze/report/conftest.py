"""A page about text whose characters take several tokens each."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.report.run import write_report
from routesae.analyze.report.settings import ReportSettings
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.train.run import train
from routesae.train.settings import settings_of

MANY_SCRIPTS = ["भारत", "नदी", "किताब", "पानी", "เธอ", "แม่น้ำ", "ภูเขา", "หนังสือ", "天気", "山川", "学校", "\u304c"]
MANY_SCRIPTS += ["👩\u200d👧", "❤️", "🇮🇳", "می\u200cخواهم"]


@pytest.fixture(scope="session")
def scripts_page(
    tiny_settings: Callable[..., HarvestSettings], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The page of a topk over Hindi, Thai, Japanese, Persian and emoji, by a tokenizer that knows none of them."""
    folder = tmp_path_factory.mktemp("scripts")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(MANY_SCRIPTS, k=40)) for _ in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cache = harvest(
        tiny_settings(
            data=str(folder / "texts.jsonl"), tokens=4000, context=32, layers="3", out=str(folder / "shards")
        )
    )
    common = {"cache": str(cache.path), "out": str(folder / "saes"), "device": "cpu"}
    train(settings_of({**common, "sae": "topk", "latents": 64, "k": 6, "batch_tokens": 512, "lr": 3e-3, "epochs": 4}))
    contexts(
        ContextSettings(cache=str(cache.path), out=str(folder / "saes"), choose="top", top=4, samples=2, device="cpu")
    )
    page = folder / "report.html"
    write_report(ReportSettings(out=str(folder / "saes"), html=str(page), model=str(tiny_model), device="cpu"))
    return page
