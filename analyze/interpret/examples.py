"""Texts from a latent's contexts that a model predicts on, with the truth about each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from routesae.analyze.contexts.file import Context, LatentContexts

EACH = 10  # positives, and as many negatives, of a latent


class Example(NamedTuple):
    """A text to predict on. active: the truth. row, position, length: its tokens in the cache, to find it again."""

    text: str
    active: bool
    row: int
    position: int
    length: int


def held_out(latent: LatentContexts, shown: int) -> list[Context]:
    """Contexts of the sample whose window overlaps none that the explainer saw, nor one another."""
    taken = [place_of(context) for context in latent.chosen[:shown]]
    apart = []
    for context in (context for kind in latent.samples.values() for context in kind):
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
            examples.append(Example(text_of(context, at), active, *place_of(context)))
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


def place_of(context: Context) -> tuple[int, int, int]:
    """Row, position and number of the window's tokens."""
    return context.row, context.position - context.at, len(context.tokens)
