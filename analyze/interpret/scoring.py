"""How well explanations predict where their latents are active, judged by a model that sees nothing else.

    detection  is the latent active anywhere in this text? Against texts of other latents in which it is silent
    fuzzing    is the latent active on the marked token? Against its own texts, marked where it is silent

Both follow 2410.13928. The score is balanced accuracy, 0.5 for guessing. Texts that the explainer saw are never used:
the positives come from the uniform sample that `routesae contexts` draws apart from its choice. Nor is it guessed
where a latent is silent: for detection the SAE runs over the rows that its negatives come from.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from routesae.analyze.contexts.file import ContextsFile
from routesae.analyze.interpret.answers import Predictions, parse_predictions
from routesae.analyze.interpret.asking import ANSWERED, UNANSWERED, Question, settled
from routesae.analyze.interpret.examples import EACH, Example, fuzzed, held_out, place_of, text_of
from routesae.analyze.interpret.ledger import Line
from routesae.analyze.interpret.settings import InterpretSettings

LEAST = 3  # positives and negatives below which a latent is not scored
BATCH = 10  # examples a request
KEY = ("latent", "digest", "batch")  # what names a question in a scoring ledger


class Explained(NamedTuple):
    """A latent and its explanation."""

    latent: int
    explanation: str

    @property
    def digest(self) -> str:
        """A hash of the explanation: another explanation is another thing to score."""
        return hashlib.sha256(self.explanation.encode()).hexdigest()[:16]


def template_of(mode: str) -> str:
    """The packaged prompt of a mode."""
    return files("routesae.analyze.interpret").joinpath(f"prompts/{mode}.txt").read_text(encoding="utf-8")


def scoring_identity(mode: str, seed: int) -> dict[str, Any]:
    """What a scoring ledger's answers depend on, besides what its explanations depend on."""
    template = hashlib.sha256(template_of(mode).encode()).hexdigest()
    return {f"{mode} prompt": template, "seed": seed, "each": EACH, "batch": BATCH}


def scoring_questions(
    mode: str,
    folder: Path,
    contexts: ContextsFile,
    explained: Sequence[Explained],
    lines: Sequence[Line],
    settings: InterpretSettings,
) -> list[Question]:
    """The questions of a mode that have no answer yet, about latents with enough examples."""
    done = settled(lines, KEY, settings.retry_unparsed)
    batches = {(line["latent"], line["digest"]): line["batches"] for line in lines}
    unfinished = {
        one.latent: one
        for one in explained
        if any((*key, n) not in done for key in [(one.latent, one.digest)] for n in range(batches.get(key, 1)))
    }
    questions = [
        question
        for latent, examples in _examples(mode, folder, contexts, unfinished, settings)
        for question in _questions_on(unfinished[latent], examples, template_of(mode))
    ]
    return [question for question in questions if tuple(question.key.values()) not in done]


def _examples(
    mode: str, folder: Path, contexts: ContextsFile, latents: Collection[int], settings: InterpretSettings
) -> Iterator[tuple[int, list[Example]]]:
    """Each latent with its positives and negatives in random order, if it has enough of both."""
    if not latents:
        return
    if mode == "detection":
        from routesae.analyze.interpret.silence import Pool  # brings torch, which nothing else of interpret needs

        pool = Pool(folder, contexts, latents, cache=settings.cache, device=settings.device)
    for latent in contexts.latents(latents):
        rng = random.Random(f"{settings.seed} {latent.latent}")
        texts = held_out(latent, settings.examples)
        rng.shuffle(texts)
        if mode == "fuzzing":
            examples = fuzzed(texts, rng)
        else:
            examples = [Example(text_of(context), True, *place_of(context)) for context in texts[:EACH]]
            examples += [Example(text, False, *place) for place, text in pool.silent(latent.latent, EACH, rng)]
        if min(sum(example.active is truth for example in examples) for truth in (True, False)) >= LEAST:
            rng.shuffle(examples)
            yield latent.latent, examples


def _questions_on(one: Explained, examples: Sequence[Example], template: str) -> Iterator[Question]:
    batches = [examples[first : first + BATCH] for first in range(0, len(examples), BATCH)]
    for number, batch in enumerate(batches):
        texts = "\n".join(f"{n}. {example.text}" for n, example in enumerate(batch, 1))
        prompt = Template(template).substitute(explanation=one.explanation, count=len(batch), examples=texts)
        yield Question(
            key=dict(zip(KEY, (one.latent, one.digest, number), strict=True)),
            prompts=partial(iter, (prompt,)),
            form=Predictions,
            parse=partial(parse_predictions, count=len(batch)),
            line={
                "batches": len(batches),
                "truth": [example.active for example in batch],
                "places": [[example.row, example.position, example.length] for example in batch],
            },
        )


def score_summary(lines: Sequence[Line], explained: Sequence[Explained]) -> dict[str, Any]:
    """What a scoring ledger says of these explanations.

    balanced_accuracy: mean over the latents of which every request was answered. latents: how many those are.
    unfinished: latents with a request that was not. unanswered: requests without an answer. too_few_examples: latents
    about which nothing was asked.
    """
    batches: dict[tuple[int, str], dict[int, Line]] = {}
    for line in lines:
        batches.setdefault((line["latent"], line["digest"]), {})[line["batch"]] = line
    scores: dict[int, float] = {}
    unfinished = unanswered = 0
    for one in explained:
        asked = list(batches.get((one.latent, one.digest), {}).values())
        if asked and len(asked) == asked[0]["batches"] and all(line["outcome"] == ANSWERED for line in asked):
            scores[one.latent] = balanced_accuracy(asked)
        elif asked:
            unfinished += 1
            unanswered += sum(line["outcome"] == UNANSWERED for line in asked)
    return {
        "balanced_accuracy": sum(scores.values()) / len(scores) if scores else None,
        "latents": len(scores),
        "unfinished": unfinished,
        "unanswered": unanswered,
        "too_few_examples": len(explained) - len(scores) - unfinished,
        "by_latent": {str(latent): score for latent, score in scores.items()},
    }


def balanced_accuracy(lines: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the shares of active and of silent examples that were predicted right."""
    pairs = [pair for line in lines for pair in zip(line["truth"], line["predictions"], strict=True)]
    right = [[prediction is truth for active, prediction in pairs if active is truth] for truth in (True, False)]
    return sum(sum(predicted) / len(predicted) for predicted in right) / 2
