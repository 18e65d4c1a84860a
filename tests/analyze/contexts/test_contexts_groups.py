"""Which latents are on in the documents of one label, and what is known of a context's document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routesae.analyze.contexts.file import read_contexts
from routesae.analyze.contexts.groups import Groups
from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.api import Cache as Notebook
from routesae.harvest.cache.reader import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import WrongInput
from routesae.tests.conftest import sentences
from routesae.train.run import train
from routesae.train.settings import settings_of

WORDS = {"sport": "router ", "tech": "layer "}  # what only documents of that label say


@pytest.fixture(scope="module")
def labelled(tiny_settings: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Documents of two labels, and a few of none, over several shards."""
    folder = tmp_path_factory.mktemp("labelled")
    with (folder / "a.jsonl").open("w") as file:
        for n, text in enumerate(sentences(60, 7)):
            label = [*WORDS, None][n % 3]
            for word in WORDS.values():
                text = text.replace(word, "")
            text += WORDS.get(str(label), "") * 20
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    changes = {"data": str(folder / "a.jsonl"), "keep_fields": "label", "tokens": 3000, "shard_tokens": 256}
    return harvest(tiny_settings(out=str(folder / "shards"), **changes))


@pytest.fixture(scope="module")
def sae(labelled: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saes")
    given: dict[str, Any] = {"sae": "topk", "layer": 3, "latents": 64, "k": 4, "batch_tokens": 500, "lr": 3e-3}
    train(settings_of({"cache": str(labelled.path), "out": str(out), "device": "cpu", "epochs": 4, **given}))
    return next(out.glob("topk*"))


def test_scores_of_groups_are_those_of_documents_counted_one_by_one(labelled: Cache) -> None:
    rng = np.random.default_rng(0)
    labels, starts = labelled.documents()["label"].to_pylist(), labelled.document_starts()
    groups, expected = Groups(labelled, "label", 5), [[set[int](), set[int]()] for _ in range(5)]
    for shard in labelled.shards():
        position_n = shard.positions()
        for part in np.array_split(rng.permutation(position_n), 3):
            latent_M = rng.integers(0, 5, len(part))
            on = rng.random(len(part)) < 0.02
            groups.add(part, latent_M[on], part[on])
            for latent, position in zip(latent_M[on].tolist(), part[on].tolist(), strict=True):
                document = int(np.searchsorted(starts, position, "right")) - 1
                if document >= 0 and labels[document] is not None:
                    expected[latent][groups.names.index(labels[document])].add(document)
        groups.end_shard(shard.record.rows[1] * labelled.manifest.context)
    assert groups.on_FG.tolist() == [[len(of_group) for of_group in of_latent] for of_latent in expected]
    sizes = [labels.count(name) for name in groups.names]
    for row in groups.strongest():
        at = groups.names.index(row["group"])
        on, elsewhere = (len(expected[row["latent"]][one]) for one in (at, 1 - at))
        assert (row["on"], row["documents"], row["elsewhere"], row["others"]) == (
            on,
            sizes[at],
            elsewhere,
            sizes[1 - at],
        )
        assert row["score"] == pytest.approx(on / sizes[at] - elsewhere / sizes[1 - at])


def test_one_command_finds_the_latents_of_a_label_and_contexts_show_it(labelled: Cache, sae: Path) -> None:
    asked = {"cache": str(labelled.path), "saes": (str(sae),), "threshold": 1.0, "device": "cpu"}
    (row,) = contexts(ContextSettings(**asked, group_by="label"))
    best = {name: next(one for one in row["groups"] if one["group"] == name) for name in WORDS}
    assert min(one["score"] for one in best.values()) > 0.3, row["groups"]
    assert best["sport"]["latent"] != best["tech"]["latent"]
    documents = labelled.documents().to_pylist()
    for latent in read_contexts(sae).latents({best["sport"]["latent"]}):
        for context in latent.top:
            assert context.document is not None
            known = documents[context.document]
            assert (context.place, dict(context.fields).get("label")) == (known["place"], known["label"])
    document = Notebook(str(labelled.path)).document(7)
    assert (document.fields, document.place) == ({"label": "tech"}, "a.jsonl:8")
    assert document.roles == [None] * len(document.tokens)
    for field, reason in (("url", "harvest with --keep-fields url"), ("data", "1 groups, and 2 to 100 are compared")):
        with pytest.raises(WrongInput, match=reason):
            contexts(ContextSettings(**asked, group_by=field))


def test_rows_are_held_out_where_the_sae_was_trained_and_all_of_another_corpus(
    labelled: Cache, sae: Path, tiny_cache: Cache, tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    def scored(cache: Cache, **more: Any) -> dict[str, Any]:
        settings = AnalyzeSettings(
            cache=str(cache.path), saes=(str(sae),), metrics=("NormMSE",), device="cpu", **more
        )
        return analyze(settings)

    own, other = scored(labelled), scored(tiny_cache)
    assert (own["rows"], own["rows_scored"]) == ("held-out", [labelled.manifest.train_rows, labelled.manifest.rows])
    assert (other["rows"], other["rows_scored"]) == ("all", [0, tiny_cache.manifest.rows])
    assert scored(tiny_cache, rows="held-out")["rows_scored"][0] == tiny_cache.manifest.train_rows
    for share, rows in ((0.0, "all"), (1.0, "held-out"), (0.5, "held-out")):
        cache = harvest(tiny_settings(out=str(tmp_path / str(share)), held_out=share, tokens=500, layers="3"))
        assert cache.manifest.train_rows == round(cache.manifest.rows * (1 - share) - 0.1)
        whole = scored(cache, rows=rows)["rows_scored"]
        assert whole == [0 if share != 0.5 else cache.manifest.train_rows, cache.manifest.rows]
    with pytest.raises(WrongInput, match="has no held-out rows; --rows all"):
        scored(Cache(tmp_path / "0.0"), rows="held-out")
    given = {"cache": str(tmp_path / "1.0"), "sae": "topk", "latents": 64, "k": 4, "device": "cpu"}
    with pytest.raises(WrongInput, match="harvested with --held-out 1, for scoring alone"):
        train(settings_of({**given, "out": str(tmp_path / "saes")}))
    (trained,) = train(settings_of({**given, "cache": str(tmp_path / "0.0"), "out": str(tmp_path / "saes")}))
    assert trained.held_out is None
