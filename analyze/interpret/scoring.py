"""How well explanations predict where their latents are active, judged by a model that sees nothing else.

    detection  is the latent active anywhere in this text? Against texts of other latents in which it is silent
    fuzzing    is the latent active on the marked token? Against its own texts, marked where it is silent

Both follow 2410.13928. The score is balanced accuracy, 0.5 for guessing. Texts that the explainer saw are never used:
the positives come from the uniform sample that `routesae contexts` draws apart from its choice. Nor is it guessed
where a latent is silent: for detection the SAE runs over the rows that its negatives come from.

Dimension letters: N tokens, F latents, W latents asked about, P positions of the cache's last rows, M active pairs.
"""

import hashlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from string import Template
from typing import NamedTuple
from unicodedata import category

import numpy as np
import numpy.typing as npt
import torch

from routesae.analyze.contexts.file import Context, ContextsFile, LatentContexts
from routesae.analyze.interpret.answers import Predictions
from routesae.analyze.interpret.asking import Question, settled
from routesae.analyze.interpret.ledger import Line
from routesae.analyze.interpret.settings import InterpretSettings
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import WrongInput
from routesae.train.evaluate import read_in_order
from routesae.train.folder.checkpoint import CONFIG, load_sae
from routesae.train.saes import SAE

EACH = 10  # positives, and as many negatives, of a latent
LEAST = 3  # positives and negatives below which a latent is not scored
BATCH = 10  # examples a request
MADE_BY = {"each": EACH, "batch": BATCH, "rule": 2}  # how examples are made; a ledger says so
NEXT_TEXTS = 8  # in which a mark like the positive's is looked for
POOL_TEXTS = 2_000  # that negatives of detection are drawn from
POOL_TOKENS = 16_384  # that they stand in: enough for ten texts of any latent that is not active nearly everywhere
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


def digests_of(explained: Mapping[int, str]) -> dict[int, str]:
    """What names each explanation in a scoring ledger, by latent."""
    return {latent: digest_of(explanation)[:16] for latent, explanation in explained.items()}


def template_of(name: str) -> str:
    """A packaged prompt: that of a mode, or of "explanation"."""
    return files("routesae.analyze.interpret").joinpath(f"prompts/{name}.txt").read_text(encoding="utf-8")


def questions_of(
    mode: str,
    contexts: ContextsFile,
    explained: Mapping[int, str],
    lines: Sequence[Line],
    settings: InterpretSettings,
) -> list[Question]:
    """The questions about latents with enough examples that `lines` do not answer. explained: by latent."""
    done, template, questions = settled(lines, KEY, settings), Template(template_of(mode)), []
    batches = {(line["latent"], line["digest"]): line["batches"] for line in lines}
    digests = digests_of(explained)
    unsettled = [key[0] for key in digests.items() if any((*key, n) not in done for n in range(batches.get(key, 1)))]
    for latent, examples in _examples(mode, contexts, unsettled, settings):
        parts = [examples[first : first + BATCH] for first in range(0, len(examples), BATCH)]
        for number, batch in enumerate(parts):
            key = {"latent": latent, "digest": digests[latent], "batch": number}
            texts = "\n".join(f"{n}. {example.text}" for n, example in enumerate(batch, 1))
            prompt = template.substitute(explanation=explained[latent], count=len(batch), examples=texts)
            truth, places = [example.active for example in batch], [example.place for example in batch]
            line = {"batches": len(parts), "truth": truth, "places": places}
            if tuple(key.values()) not in done:
                questions.append(Question(key, iter((prompt,)), Predictions, len(batch), line))
    return questions


def _examples(
    mode: str, contexts: ContextsFile, latents: Sequence[int], settings: InterpretSettings
) -> Iterator[tuple[int, list[Example]]]:
    """Each latent with its positives and negatives in random order, if it has enough of both."""
    if not latents:
        return
    if mode == "detection":
        silence = Silence(contexts, latents, settings.cache, settings.device)
        pool: dict[Place, str] = {}
        for other in contexts.latents():
            last_rows = (c for c in chain(other.chosen, *other.samples.values()) if c.row >= silence.first_row)
            pool |= {place_of(context): text_of(context) for context in last_rows}
            if len(pool) >= POOL_TEXTS:
                break
    for latent in contexts.latents(latents):
        rng = random.Random(f"{settings.seed} {latent.latent}")
        texts = held_out(latent, settings.examples)
        rng.shuffle(texts)
        if mode == "fuzzing":
            examples = fuzzed(texts, rng)
        else:
            silent = [(place, text) for place, text in pool.items() if silence.holds(latent.latent, place)]
            rng.shuffle(silent)
            examples = [Example(text_of(context), True, place_of(context)) for context in texts[:EACH]]
            for positive in examples[: len(silent)]:  # an equally long text, since long ones are less often silent
                place, text = min(silent, key=lambda item: abs(len(item[1]) - len(positive.text)))
                silent.remove((place, text))
                examples.append(Example(text, False, place))
        if min(map([example.active for example in examples].count, (True, False))) >= LEAST:
            rng.shuffle(examples)
            yield latent.latent, examples


class Silence:
    """What the SAE says of `latents` in the last rows of the cache that `contexts` are of.

    Raises WrongInput if cache or SAE is another one.
    """

    def __init__(self, contexts: ContextsFile, latents: Collection[int], path: str | None, device: str):
        facts = contexts.facts
        cache = Cache(path or facts["cache"]["path"])
        if cache.manifest.tokens_hash != facts["cache"]["tokens_hash"]:
            raise WrongInput(f"--cache {path} is not the one the contexts in {contexts.folder} are of; give that one")
        # The contexts of an SAE from the hub are in a folder of their own.
        folder = contexts.folder if (contexts.folder / CONFIG).exists() else Path(facts["sae"]["folder"])
        sae = load_sae(folder, pick_device(device))
        if sae.hashes != facts["sae"]["weights"]:
            raise WrongInput(f"{folder} has other weights than its contexts; run routesae contexts again")
        self.context = cache.manifest.context
        self.first_row = max(0, cache.manifest.rows - POOL_TOKENS // self.context)
        self.active = dict(zip(latents, active_positions(sae, cache, self.first_row, list(latents)), strict=True))

    def holds(self, latent: int, place: tuple[int, int, int]) -> bool:
        """Whether the latent is silent on a window (row, first position, length), which is in the last rows."""
        row, first, length = place
        at = (row - self.first_row) * self.context + first
        return row >= self.first_row and not self.active[latent][at : at + length].any()


@torch.no_grad()
def active_positions(sae: SAE, cache: Cache, first_row: int, latents: Sequence[int]) -> npt.NDArray[np.bool_]:
    """bool [W, P]: on which positions of the cache's rows from `first_row` on each of `latents` is active."""
    context, rows = cache.manifest.context, slice(first_row, cache.manifest.rows)
    positions = (rows.stop - first_row) * context
    active_WP = torch.zeros(len(latents), positions, dtype=torch.bool, device=sae.device)
    asked_F = torch.full((sae.recipe.latents,), -1, device=sae.device)
    asked_F[list(latents)] = torch.arange(len(latents), device=sae.device)
    for hidden, position_N in read_in_order(cache, rows, [sae]):
        row_M, latent_M, _ = sae.encode(hidden).active()  # an mlsae's rows come layer after layer
        position_M, asked_M = position_N[row_M % hidden.tokens] - first_row * context, asked_F[latent_M]
        active_WP[asked_M[asked_M >= 0], position_M[asked_M >= 0]] = True
    return active_WP.cpu().numpy()


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


class Mark(NamedTuple):
    """Neighbouring tokens of a context, from `first` to before `after`, that spell `text`.

    activation: the strongest on them. where: how far into the context, from 0 to 1. kinds: what the text begins and
    ends with.
    """

    first: int
    after: int
    text: str
    activation: float
    where: float
    kinds: tuple[str, ...]


def whole(context: Context, at: int) -> Mark:
    """The tokens that spell the characters of token `at`.

    A character of several tokens stands at the last of them. The space before it may stand at the first.
    """
    tokens, first, after = context.tokens, at, at + 1
    while first and not tokens[first - 1].strip(" "):
        first -= 1
    while after < len(tokens) and not tokens[after - 1].strip(" "):
        after += 1
    text = "".join(tokens[first:after])
    kinds = tuple(category(character)[0] for character in text[:1] + text.strip()[:1] + text[-1:])
    return Mark(first, after, text, max(context.activations[first:after]), first / len(tokens), kinds)


def unlike(one: Mark, other: Mark) -> float:
    """How well two marks can be told apart by kind and number of their characters, and by where they stand."""
    fewer, more = sorted((len(one.text), len(other.text)))
    return 2 * (one.kinds != other.kinds) + 1 - fewer / more + abs(one.where - other.where)


def fuzzed(texts: Sequence[Context], rng: random.Random) -> list[Example]:
    """Pairs of texts, one with its own mark, the other marked where the latent is silent; no text twice.

    A mark tells nothing by itself: of the silent ones of the next few texts it is the one most like the positive's.
    The ends of each text are cut by a random few tokens, since a long one was cut around its own mark.
    """
    examples: list[Example] = []
    left = [(context, whole(context, context.at)) for context in texts]
    left = [(context, mark) for context, mark in left if mark.text.strip()]
    while len(left) > 1 and len(examples) < 2 * EACH:
        context, mark = left.pop(0)
        others = [
            (unlike(mark, other), n, other)
            for n, (text, _) in enumerate(left[:NEXT_TEXTS])
            for other in {whole(text, at) for at in range(len(text.tokens))}
            if other.activation == 0 and other.text.strip()
        ]
        if others:
            _, n, other = min(others)
            examples.append(Example(text_of(context, mark, rng), True, place_of(context)))
            context, _ = left.pop(n)
            examples.append(Example(text_of(context, other, rng), False, place_of(context)))
    return examples


def text_of(context: Context, mark: Mark | None = None, rng: random.Random | None = None) -> str:
    """The context on one line, with a mark or none. With `rng` its ends are cut by up to an eighth of its tokens."""
    pieces = list(context.tokens)
    if mark is not None:
        pieces[mark.first] = f"<ACTIVATED>{pieces[mark.first]}"
        pieces[mark.after - 1] += "</ACTIVATED>"
        if rng is not None:
            most = len(pieces) // 8
            end = len(pieces) - rng.randint(0, min(most, len(pieces) - mark.after))
            pieces = pieces[rng.randint(0, min(most, mark.first)) : end]
    return one_line("".join(pieces))


def one_line(text: str) -> str:
    """The text with its line breaks written out, so that it cannot look like a line of the prompt."""
    return text.replace("\r", "\\r").replace("\n", "\\n").strip()


def place_of(context: Context) -> Place:
    return context.row, context.position - context.at, len(context.tokens)
