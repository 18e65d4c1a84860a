"""Explanations in; how well they predict where their latents are active, by a model that sees nothing else, out.

    detection  is the latent active anywhere in this text? Against texts of other latents in which it is silent
    fuzzing    is the latent active on the marked token? Against its own texts, marked where it is silent

Both after 2410.13928. The score is balanced accuracy, 0.5 for guessing. Texts that the explainer saw are never used:
the positives are of the uniform sample that `routesae contexts` draws apart from its choice. Whether a latent is
silent in a text is not guessed either: detection runs the SAE over the rows that its negatives come from.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

from routesae.analyze.contexts.file import ContextsFile
from routesae.analyze.interpret.answers import PREDICTIONS_SCHEMA, parse_predictions
from routesae.analyze.interpret.asking import ANSWERED, UNPARSED, Question
from routesae.analyze.interpret.examples import EACH, Example, fuzzed, held_out, place_of, text_of
from routesae.analyze.interpret.ledger import Ledger

if TYPE_CHECKING:
    from routesae.analyze.interpret.silence import Pool

LEAST = 3  # positives and negatives below which a latent is not scored
BATCH = 10  # examples a request


class Explained(NamedTuple):
    """A latent and what it is said to be active on."""

    latent: int
    explanation: str

    @property
    def key(self) -> tuple[int, str]:
        """Latent and a hash of the explanation: another explanation is another thing to score."""
        return self.latent, hashlib.sha256(self.explanation.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Scoring:
    """One mode's questions about one SAE, and the ledger of their answers."""

    def __init__(
        self,
        mode: str,
        folder: Path,
        contexts: ContextsFile,
        identity: Mapping[str, Any],
        *,
        cache: str | None,
        device: str,
        seed: int,
        examples: int,
        retry_unparsed: bool,
        overwrite: bool,
    ):
        self.mode, self.folder, self.contexts = mode, folder, contexts
        self.cache, self.device, self.seed, self.shown = cache, device, seed, examples
        prompt = files("routesae.analyze.interpret").joinpath(f"prompts/{mode}.txt")
        self.template = prompt.read_text(encoding="utf-8")
        self.paid = (ANSWERED,) if retry_unparsed else (ANSWERED, UNPARSED)
        template = hashlib.sha256(self.template.encode()).hexdigest()
        about = {**identity, f"{mode} prompt": template, "seed": seed, "each": EACH, "batch": BATCH}
        self.ledger = Ledger(folder / f"{mode}.jsonl", about, overwrite=overwrite)

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *exception: object) -> None:
        self.ledger.file.close()

    def questions(self, explained: Sequence[Explained]) -> list[Question]:
        """Those not answered yet, of latents with examples enough."""
        paid = {key_of(line) for line in self.ledger.lines if line["outcome"] in self.paid}
        batches = {(line["latent"], line["digest"]): line["batches"] for line in self.ledger.lines}
        unfinished = {
            one.latent: one
            for one in explained
            if any((*one.key, batch) not in paid for batch in range(batches.get(one.key, 1)))
        }
        return [
            question
            for one, examples in self._examples(unfinished)
            for question in self._batches(one, examples)
            if key_of(question.line) not in paid
        ]

    def _examples(self, wanted: Mapping[int, Explained]) -> Iterator[tuple[Explained, list[Example]]]:
        if not wanted:
            return
        pool = self._pool(wanted) if self.mode == "detection" else None
        for latent in self.contexts.latents(wanted):
            rng = random.Random(f"{self.seed} {latent.latent}")
            texts = held_out(latent, self.shown)
            rng.shuffle(texts)
            if pool is None:
                examples = fuzzed(texts, rng)
            else:
                positives = [Example(text_of(c), True, *place_of(c)) for c in texts[:EACH]]
                negatives = pool.silent(latent.latent, EACH, rng)
                examples = positives + [Example(text, False, *place) for place, text in negatives]
            if min(sum(e.active is truth for e in examples) for truth in (True, False)) >= LEAST:
                rng.shuffle(examples)
                yield wanted[latent.latent], examples

    def _pool(self, wanted: Collection[int]) -> Pool:
        from routesae.analyze.interpret.silence import Pool  # brings torch, which nothing else of interpret needs

        return Pool(self.folder, self.contexts, wanted, cache=self.cache, device=self.device)

    def _batches(self, one: Explained, examples: list[Example]) -> Iterator[Question]:
        batches = [examples[first : first + BATCH] for first in range(0, len(examples), BATCH)]
        for number, batch in enumerate(batches):
            texts = "\n".join(f"{n}. {example.text}" for n, example in enumerate(batch, 1))
            count = len(batch)
            yield Question(
                line={
                    "latent": one.latent,
                    "digest": one.key[1],
                    "batch": number,
                    "batches": len(batches),
                    "truth": [example.active for example in batch],
                    "places": [[example.row, example.position, example.length] for example in batch],
                },
                prompt=Template(self.template).substitute(explanation=one.explanation, count=count, examples=texts),
                name="predictions",
                schema=PREDICTIONS_SCHEMA,
                parse=partial(_predictions, count=count),
            )


def _predictions(text: str, *, count: int) -> dict[str, Any]:
    return {"predictions": list(parse_predictions(text, count))}


def key_of(line: Mapping[str, Any]) -> tuple[int, str, int]:
    """What makes a question the same one."""
    return line["latent"], line["digest"], line["batch"]


def score_summary(lines: Sequence[Mapping[str, Any]], explained: Sequence[Explained]) -> dict[str, Any]:
    """What a scoring ledger says of these explanations.

    balanced_accuracy: mean over the latents of which every request was answered. latents: how many those are.
    unfinished: latents with a request that was not. too_few_examples: latents about which nothing was asked.
    """
    of: dict[tuple[int, str], dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        of.setdefault((line["latent"], line["digest"]), {})[line["batch"]] = line
    scores, unfinished = {}, 0
    for one in explained:
        asked = list(of.get(one.key, {}).values())
        if asked and len(asked) == asked[0]["batches"] and all(line["outcome"] == ANSWERED for line in asked):
            scores[one.latent] = balanced_accuracy(asked)
        elif asked:
            unfinished += 1
    return {
        "balanced_accuracy": sum(scores.values()) / len(scores) if scores else None,
        "latents": len(scores),
        "unfinished": unfinished,
        "too_few_examples": len(explained) - len(scores) - unfinished,
        "by_latent": {str(latent): score for latent, score in scores.items()},
    }


def balanced_accuracy(lines: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the shares of active and of silent examples that were predicted right."""
    pairs = [pair for line in lines for pair in zip(line["truth"], line["predictions"], strict=True)]
    right = {
        truth: [prediction is truth for active, prediction in pairs if active is truth] for truth in (True, False)
    }
    return sum(sum(predicted) / len(predicted) for predicted in right.values()) / 2
