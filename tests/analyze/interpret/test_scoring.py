"""Detection and fuzzing: whether explanations predict their latents, on texts the explainer did not see."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routesae.analyze.contexts.file import Context
from routesae.analyze.contexts.run import contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.interpret.run import interpret, prompt_of, read_template
from routesae.analyze.interpret.scoring import active_positions, fuzzed
from routesae.harvest.cache.reader import Cache
from routesae.reporting import FailedRun, WrongInput
from routesae.tests.analyze.interpret.chat_server import (
    Reply,
    Serve,
    asked,
    completion,
    good,
    invoke,
    lines,
    subject,
)
from routesae.train.folder.checkpoint import load_sae, save_sae
from routesae.train.run import train
from routesae.train.saes import Recipe, SingleLayerSAE, build
from routesae.train.settings import TrainSettings

# ----------------------------------------------------------------------------------------------------------- scoring


def test_fuzzing_is_balanced_accuracy_on_texts_the_explainer_did_not_see(tmp_path: Path, serve: Serve) -> None:
    shown: dict[int, list[str]] = {}
    hidden: dict[int, list[str]] = {}

    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        prompt = body["messages"][0]["content"]
        if body["response_format"]["json_schema"]["name"] == "explanation":
            shown[latent] = re.findall(r"example\d+", prompt)
            return good(explanation=f"latent-{latent}- router")
        texts = re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE)
        hidden.setdefault(latent, []).extend(re.findall(r"example\d+", prompt))
        truth = ["<ACTIVATED> router</ACTIVATED>" in text for text in texts]
        says = {0: truth, 1: [not one for one in truth], 2: [True] * len(truth), 3: truth[:-1]}[latent]
        return 200, {}, completion(json.dumps({"predictions": says}))

    server = serve(act)
    folder = subject(tmp_path / "sae", 4, samples=12)
    settings = asked(folder, server, scores=("fuzzing",))
    (summary,) = interpret(settings)
    fuzzing = summary["fuzzing"]
    assert fuzzing["by_latent"] == {"0": 1.0, "1": 0.0, "2": 0.5}
    assert (fuzzing["balanced_accuracy"], fuzzing["latents"], fuzzing["unfinished"]) == (0.5, 3, 1)
    assert all(len(set(hidden[n])) == 12 and not set(hidden[n]) & set(shown[n]) for n in range(4))
    before = server.asked.copy()
    (again,) = interpret(settings)
    assert (server.asked, again) == (before, summary)  # nothing is asked twice
    assert "fuzzing" in invoke(folder, server, "--score", "fuzzing", "--retries", 2).stdout


def test_texts_to_predict_on_are_drawn_from_all_of_the_sample(tmp_path: Path, serve: Serve) -> None:
    """It is ordered strongest first: the first texts of it would be the easy ones."""
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 1, samples=60)
    interpret(asked(folder, server, scores=("fuzzing",)))
    drawn = {row for line in lines(folder, "fuzzing.jsonl") for row, _, _ in line["places"]}
    assert len(drawn) == 20
    assert max(drawn) > 40 > min(drawn)


@pytest.mark.parametrize(("samples", "scored"), [(0, 0), (5, 0), (6, 2)])  # every other text is a negative; 3 of each
def test_latents_with_too_few_texts_are_not_scored_but_counted(
    samples: int, scored: int, tmp_path: Path, serve: Serve
) -> None:
    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        if body["response_format"]["json_schema"]["name"] == "explanation":
            return good()
        return 200, {}, completion(json.dumps({"predictions": [True] * samples}))

    server = serve(act)
    (summary,) = interpret(asked(subject(tmp_path / "sae", 2, samples=samples), server, scores=("fuzzing",)))
    assert (summary["fuzzing"]["latents"], summary["fuzzing"]["too_few_examples"]) == (scored, 2 - scored)
    assert server.asked.total() == 2 + scored


def test_detections_negatives_are_texts_in_which_the_latent_is_silent(
    tiny_cache: Cache, settings: Callable[..., TrainSettings], serve: Serve, tmp_path: Path
) -> None:
    train(settings(layer=3, name="topk"))
    folder = tmp_path / "saes" / "topk"
    contexts(
        ContextSettings(cache=str(tiny_cache.path), saes=(str(folder),), choose="top", top=3, samples=6, device="cpu")
    )

    def act(latent: int, nth: int, body: dict[str, Any]) -> Reply:
        if body["response_format"]["json_schema"]["name"] == "explanation":
            return good(explanation="words")
        count = len(re.findall(r"^\d+\. ", body["messages"][0]["content"], re.MULTILINE))
        return 200, {}, completion(json.dumps({"predictions": [True] * count}))

    server = serve(act)
    (summary,) = interpret(asked(folder, server, scores=("detection",), latents=8, device="cpu"))
    detection = summary["detection"]
    assert detection["latents"] >= 4
    assert detection["balanced_accuracy"] == 0.5
    active = active_positions_of_every_token(folder, tiny_cache)
    truths = Counter[bool]()
    for line in lines(folder, "detection.jsonl"):
        for truth, (row, first, length) in zip(line["truth"], line["places"], strict=True):
            base = row * tiny_cache.manifest.context + first
            assert bool(active[line["latent"]][base : base + length].any()) is truth
            truths[truth] += 1
    assert min(truths.values()) >= 20
    apart = tmp_path / "saes" / "user--repo"  # as of an SAE from the hub, whose weights are elsewhere
    apart.mkdir()
    shutil.copytree(folder / "contexts", apart / "contexts")
    (again,) = interpret(asked(apart, server, scores=("detection",), latents=8, device="cpu"))
    assert again["detection"]["latents"] == detection["latents"]


def test_a_latent_of_an_mlsae_is_silent_only_where_it_is_so_on_every_layer(tiny_cache: Cache, tmp_path: Path) -> None:
    import torch

    recipe = Recipe(sae="mlsae", layers=tiny_cache.manifest.layers, width=tiny_cache.manifest.width, latents=64, k=4)
    save_sae(tmp_path, build(recipe, torch.Generator().manual_seed(0)), {})
    first_row, latents = tiny_cache.manifest.rows - 300, [5, 3, 60]  # the rows begin within a shard
    found = active_positions(load_sae(tmp_path, torch.device("cpu")), tiny_cache, first_row, latents)
    of_layer = [active_positions_of_every_token(tmp_path, tiny_cache, layer) for layer in recipe.layers]
    every = [active[latents, first_row * tiny_cache.manifest.context :] for active in of_layer]
    assert (found == np.any(every, 0)).all()
    assert all((found != active).any() for active in every)


def active_positions_of_every_token(folder: Path, cache: Cache, layer: int = 3) -> Any:
    """bool [F, tokens], shard by shard and without the loader; of an SAE that reads one layer at a time."""
    import torch

    sae = load_sae(folder, torch.device("cpu"))
    assert isinstance(sae, SingleLayerSAE)
    active = np.zeros((sae.recipe.latents, cache.manifest.rows * cache.manifest.context), bool)
    for shard in cache.shards():
        hidden = torch.from_numpy(np.array(shard.read(f"layer_{layer:02}")))[None]
        found = sae.encode_at(hidden[0]).dense() > 0
        base = shard.record.rows[0] * cache.manifest.context
        active[:, np.asarray(shard.read("order")) + base] = found.numpy().T
    return active


def test_an_sae_that_was_replaced_is_not_taken_for_that_of_the_contexts(
    tiny_cache: Cache, settings: Callable[..., TrainSettings], serve: Serve, tmp_path: Path
) -> None:
    train(settings(layer=3, name="topk"))
    folder = tmp_path / "saes" / "topk"
    contexts(ContextSettings(cache=str(tiny_cache.path), saes=(str(folder),), threshold=0.25, device="cpu"))
    kept = shutil.move(folder / "contexts", tmp_path / "contexts")
    train(settings(layer=3, name="topk", seed=1, overwrite=True))
    shutil.move(kept, folder / "contexts")
    server = serve(lambda latent, nth, body: good())
    with pytest.raises(WrongInput, match="topk has other weights than its contexts"):
        interpret(asked(folder, server, scores=("detection",), latents=2, device="cpu"))


def test_another_cache_is_refused_for_detection(
    tiny_cache: Cache, settings: Callable[..., TrainSettings], serve: Serve, tmp_path: Path
) -> None:
    server = serve(lambda latent, nth, body: good())
    folder = subject(tmp_path / "sae", 2, samples=12)
    with pytest.raises(WrongInput, match="has no contexts of that corpus"):
        interpret(asked(folder, server, scores=("detection",), cache=str(tiny_cache.path)))
    with pytest.raises((WrongInput, FailedRun), match="nowhere is not a cache folder"):
        interpret(asked(folder, server, scores=("detection",)))
    assert (folder / "interpretations.json").exists()


# ----------------------------------------------------------------------------- texts whose characters are many tokens

WORDS = {
    "hindi": "भारत नदी शहर किताब पानी खेल संगीत बाज़ार सूरज पहाड़ घर लोग समय देश रात दिन काम हाथ आदमी बच्चा।",
    "thai": "สวัสดี ตลาด แม่น้ำ ภูเขา หนังสือ บ้าน คน เวลา กลางคืน วัน มือ น้ำ",
    "japanese": "天気 山川 学校 音楽 東京 ひらがな カタカナ 時間 人々 夜、 昼。",
    "emoji": "🏏 goal 👩‍👧 🎶🎶 played 🇮🇳 win 😀! 👍🏽 the",
    "english": "the a router layer token hidden state latent dictionary sparse, model block. reads writes",
}


def contexts_of(script: str, tokenizer: Any, latents: int, long: bool) -> list[list[Context]]:
    """For each of some latents, which are active on one token id each, the contexts it is active in."""
    rng = random.Random(script)
    sentences = [" ".join(rng.choices(WORDS[script].split(), k=60 if long else 8)) for _ in range(200)]
    ids = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
    vocabulary = Vocabulary(tokenizer)
    found = []
    for token in sorted(set(chain(*ids)))[:latents]:
        contexts = []
        for row, of_row in enumerate(ids):
            if len(contexts) == 24:
                break
            for at in [at for at, one in enumerate(of_row) if one == token][:1]:
                window = slice(max(0, at - 32), at + 32)
                part = np.array(of_row[window])
                pieces = tuple(vocabulary.pieces(part, np.array([len(part)])).tolist())
                active = tuple(np.where(part == token, 5.0, 0.0).tolist())
                named = {"kind": "weak", "token_class": "x", "activation": 5.0, "layer": 3, "document": 0}
                place = {"row": row, "position": at, "at": at - window.start}
                contexts.append(Context(**named, **place, token_ids=(), tokens=pieces, activations=active))
        rng.shuffle(contexts)
        found.append(contexts)
    return found


def fraction(text: str) -> float:
    return text.index("<ACTIVATED>") / len(text)


def marked(text: str) -> str:
    return text.partition("<ACTIVATED>")[2].partition("</ACTIVATED>")[0]


GUESSERS: dict[str, Callable[[str], bool]] = {
    "an empty mark": lambda text: not marked(text).strip(),
    "a space in front": lambda text: marked(text)[:1] == " ",
    "one character": lambda text: len(marked(text).strip()) == 1,
    "a sign and no letter": lambda text: not any(map(str.isalpha, marked(text))),
    "half a character": lambda text: "\ufffd" in marked(text),
    "near the front": lambda text: fraction(text) < 0.4,
    "right in the middle": lambda text: abs(fraction(text) - 0.5) < 0.04,
    "a long text": lambda text: len(text) > 120,
}


@pytest.mark.parametrize("long", [False, True], ids=["sentences", "windows"])
@pytest.mark.parametrize("script", WORDS)
def test_marks_cover_whole_characters_and_tell_nothing_without_the_explanation(
    script: str, long: bool, tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = [
        example for latent in contexts_of(script, tokenizer, 40, long) for example in fuzzed(latent, random.Random(0))
    ]
    assert sum(example.active for example in examples) * 2 == len(examples) > 200
    characters = set(WORDS[script]) | {" ", "\ufffd"}
    for example in examples:
        assert marked(example.text).strip()
        assert set(marked(example.text)) <= characters
    deviation = 0.5 / (len(examples) / 2) ** 0.5 / 2**0.5  # of the balanced accuracy of a coin
    for name, guess in GUESSERS.items():
        right = [[guess(e.text) is truth for e in examples if e.active is truth] for truth in (True, False)]
        accuracy = sum(sum(guesses) / len(guesses) for guesses in right) / 2
        assert abs(accuracy - 0.5) < 3.5 * deviation, (name, accuracy)


@pytest.mark.parametrize("script", WORDS)
def test_no_prompt_has_an_empty_mark(script: str, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    template = read_template(None)
    for latent in contexts_of(script, AutoTokenizer.from_pretrained(tiny_model), 20, False):
        prompt = prompt_of(template, latent[:64])
        assert "<ACTIVATED></ACTIVATED>" not in prompt
        assert "Token:  |" not in prompt
