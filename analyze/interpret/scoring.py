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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from itertools import chain
from string import Template
from typing import Any, NamedTuple

from routesae.analyze.contexts.file import Context, ContextsFile, LatentContexts
from routesae.analyze.interpret.answers import Predictions, parse_predictions
from routesae.analyze.interpret.asking import ANSWERED, UNANSWERED, Question, settled
from routesae.analyze.interpret.ledger import Line
from routesae.analyze.interpret.settings import InterpretSettings

EACH = 10  # positives, and as many negatives, of a latent
LEAST = 3  # positives and negatives below which a latent is not scored
BATCH = 10  # examples a request
POOL_TEXTS = 2_000  # that negatives of detection are drawn from
KEY = ("latent", "digest", "batch")  # what names a question in a scoring ledger
Place = tuple[int, int, int]
"""Row, first position and number of tokens of a window."""


class Example(NamedTuple):
    """A text to predict on. active: the truth. place: its tokens in the cache, to find it again."""

    text: str
    active: bool
    place: Place


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def template_of(mode: str) -> str:
    """The packaged prompt of a mode."""
    return files("routesae.analyze.interpret").joinpath(f"prompts/{mode}.txt").read_text(encoding="utf-8")


def scoring_identity(mode: str, seed: int) -> dict[str, Any]:
    """What scores depend on, besides what explanations depend on."""
    return {f"{mode} prompt": digest_of(template_of(mode)), "seed": seed, "each": EACH, "batch": BATCH}


def scoring_questions(
    mode: str,
    contexts: ContextsFile,
    explained: Mapping[int, str],
    lines: Sequence[Line],
    settings: InterpretSettings,
) -> list[Question]:
    """The questions about latents with enough examples that `lines` do not answer. explained: by latent."""
    done = settled(lines, KEY, settings.retry_unparsed)
    batches = {(line["latent"], line["digest"]): line["batches"] for line in lines}
    keys = {latent: (latent, digest_of(explanation)[:16]) for latent, explanation in explained.items()}
    open_latents = [
        latent for latent, key in keys.items() if any((*key, n) not in done for n in range(batches.get(key, 1)))
    ]
    questions = []
    for latent, examples in _examples(mode, contexts, open_latents, settings):
        count = -(-len(examples) // BATCH)
        for number in range(count):
            batch = examples[number * BATCH : (number + 1) * BATCH]
            texts = "\n".join(f"{n}. {example.text}" for n, example in enumerate(batch, 1))
            prompt = Template(template_of(mode)).substitute(
                explanation=explained[latent], count=len(batch), examples=texts
            )
            question = Question(
                key=dict(zip(KEY, (*keys[latent], number), strict=True)),
                prompts=iter((prompt,)),
                form=Predictions,
                parse=partial(parse_predictions, count=len(batch)),
                line={
                    "batches": count,
                    "truth": [example.active for example in batch],
                    "places": [example.place for example in batch],
                },
            )
            questions += [question] if (*keys[latent], number) not in done else []
    return questions


def _examples(
    mode: str, contexts: ContextsFile, latents: Sequence[int], settings: InterpretSettings
) -> Iterator[tuple[int, list[Example]]]:
    """Each latent with its positives and negatives in random order, if it has enough of both."""
    if not latents:
        return
    if mode == "detection":
        from routesae.analyze.interpret.silence import Silence  # brings torch, which nothing else of interpret needs

        silence = Silence(contexts, latents, settings.cache, settings.device)
        last_rows = (
            (place_of(context), text_of(context))
            for latent in contexts.latents()
            for context in chain(latent.chosen, *latent.samples.values())
            if context.row >= silence.first_row
        )
        pool = dict(zip(range(POOL_TEXTS), last_rows, strict=False)).values()
    for latent in contexts.latents(latents):
        rng = random.Random(f"{settings.seed} {latent.latent}")
        texts = held_out(latent, settings.examples)
        rng.shuffle(texts)
        if mode == "fuzzing":
            examples = fuzzed(texts, rng)
        else:
            silent = [(place, text) for place, text in dict(pool).items() if silence.holds(latent.latent, place)]
            examples = [Example(text_of(context), True, place_of(context)) for context in texts[:EACH]]
            examples += [Example(text, False, place) for place, text in rng.sample(silent, min(EACH, len(silent)))]
        if min(sum(example.active is truth for example in examples) for truth in (True, False)) >= LEAST:
            rng.shuffle(examples)
            yield latent.latent, examples


def held_out(latent: LatentContexts, shown: int) -> list[Context]:
    """Contexts of the sample whose window overlaps none that the explainer saw, nor one another."""
    taken = [place_of(context) for context in latent.chosen[:shown]]
    apart = []
    for context in chain(*latent.samples.values()):
        row, first, length = place_of(context)
        if not any(row == r and first < f + n and f < first + length for r, f, n in taken):
            taken.append((row, first, length))
            apart.append(context)
    return apart


def fuzzed(texts: Sequence[Context], rng: random.Random) -> list[Example]:
    """Every other text with its own mark, the rest marked where the latent is silent; no text twice."""
    examples: list[Example] = []
    for context in texts:
        on_tokens = zip(context.tokens, context.activations, strict=True)
        silent = [at for at, (text, activation) in enumerate(on_tokens) if activation == 0 and text.strip()]
        positives = sum(example.active for example in examples)
        negatives = len(examples) - positives
        active = not silent or positives <= negatives
        if (positives if active else negatives) < EACH:
            at = context.at if active else rng.choice(silent)
            examples.append(Example(text_of(context, at), active, place_of(context)))
    return examples


def text_of(context: Context, marked_at: int | None = None) -> str:
    """The context on one line, one token marked or none."""
    pieces = list(context.tokens)
    if marked_at is not None:
        pieces[marked_at] = f"<ACTIVATED>{pieces[marked_at]}</ACTIVATED>"
    return one_line("".join(pieces))


def one_line(text: str) -> str:
    """The text with its line breaks written out, so that it cannot look like a line of the prompt."""
    return text.replace("\r", "\\r").replace("\n", "\\n").strip()


def place_of(context: Context) -> Place:
    return context.row, context.position - context.at, len(context.tokens)


def score_summary(lines: Sequence[Line], explained: Mapping[int, str]) -> dict[str, Any]:
    """What a scoring ledger says of these explanations.

    balanced_accuracy: mean over the latents of which every request was answered. latents: how many those are.
    unfinished: latents with a request that was not. unanswered: requests without an answer. too_few_examples: latents
    about which nothing was asked.
    """
    batches: dict[tuple[int, str], dict[int, Line]] = {}
    for line in lines:
        batches.setdefault((line["latent"], line["digest"]), {})[line["batch"]] = line
    scores: dict[str, float] = {}
    unfinished = unanswered = 0
    for latent, explanation in explained.items():
        asked = list(batches.get((latent, digest_of(explanation)[:16]), {}).values())
        if asked and len(asked) == asked[0]["batches"] and all(line["outcome"] == ANSWERED for line in asked):
            scores[str(latent)] = balanced_accuracy(asked)
        else:
            unfinished += bool(asked)
            unanswered += sum(line["outcome"] == UNANSWERED for line in asked)
    return {
        "balanced_accuracy": sum(scores.values()) / len(scores) if scores else None,
        "latents": len(scores),
        "unfinished": unfinished,
        "unanswered": unanswered,
        "too_few_examples": len(explained) - len(scores) - unfinished,
        "by_latent": scores,
    }


def balanced_accuracy(lines: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the shares of active and of silent examples that were predicted right."""
    pairs = [pair for line in lines for pair in zip(line["truth"], line["predictions"], strict=True)]
    right = [[prediction is truth for active, prediction in pairs if active is truth] for truth in (True, False)]
    return sum(sum(predicted) / len(predicted) for predicted in right) / 2
