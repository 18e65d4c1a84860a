"""An SAE's contexts, explanations and decoder in; the list of its latents and, in pieces, all that is shown of each,
out, as JSON takes it.

A context is [kind, activation, layer, row, position, document, at, words, active, activations]: kind an index into
contexts.file.KINDS, words indices into the piece's own list of texts, active the indices of the tokens on which the
latent is active and activations what it is there.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from routesae.analyze.contexts.file import KINDS, SAMPLES, Context, LatentContexts
from routesae.analyze.report.lens import LogitLens, decoder_of, nearest, unit_rows
from routesae.analyze.report.runs import Run
from routesae.reporting import Progress, Report
from routesae.train.saes import SAE

PIECE = 128  # latents: some 100 kB, read in the time of a key press
CLASSES_LISTED = 12  # token classes of a latent that the list shows and searches
COMPRESSION = 6


def packed(data: Any) -> str:
    """JSON, gzip, base64: letters, digits, + / =, so that no text in it can end the element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), COMPRESSION, mtime=0)).decode("ascii")


class Shown:
    """The list of an SAE's latents, filled while its contexts stream by. contexts: how many of a latent are shown."""

    def __init__(self, run: Run, contexts: int):
        assert run.contexts is not None
        self.run, self.file = run, run.contexts
        self.limits = {"chosen": contexts} | dict.fromkeys(SAMPLES, max(1, contexts // 4))
        summaries = self.file.summaries
        fixed = run.recipe.layers[0] if len(run.recipe.layers) == 1 else None
        asked = run.explanations
        self.columns: dict[str, Any] = {
            "readings": self.file.facts["readings"],
            "threshold": self.file.facts["settings"]["threshold"],
            "active": [summary.active for summary in summaries],
            "max": [number(summary.max_activation) for summary in summaries],
            "mean": [number(summary.mean_activation) for summary in summaries],
            "kept": [int(summary.kept) for summary in summaries],
            "layer": [fixed if summary.active else None for summary in summaries],
            "words": [""] * len(summaries),
            "score": [asked.get(summary.latent, {}).get("score") for summary in summaries],
            "explained": {str(latent): _explanation(line) for latent, line in asked.items()},
        }

    def note(self, latent: LatentContexts) -> None:
        """Its token classes, one a line, and the layer it is read from most."""
        drawn = [context for kind in SAMPLES for context in latent.samples[kind]]
        classes = dict.fromkeys(context.token_class for context in (*latent.chosen, *drawn))
        names = (name.replace("\n", "↵") for name in list(classes)[:CLASSES_LISTED])
        self.columns["words"][latent.latent] = "\n".join(names)
        layers = Counter(context.layer for context in drawn or latent.chosen)
        if len(self.run.recipe.layers) > 1 and layers:
            self.columns["layer"][latent.latent] = layers.most_common(1)[0][0]

    def contexts_of(self, latent: LatentContexts) -> Iterator[Context]:
        yield from latent.chosen[: self.limits["chosen"]]
        for kind in SAMPLES:
            yield from latent.samples[kind][: self.limits[kind]]


def latent_pieces(shown: Shown, sae: SAE, lens: LogitLens | None, report: Report) -> Iterator[dict[str, Any]]:
    """A piece for every PIECE latents, in order, the last of those that remain."""
    W_dec = decoder_of(sae)
    unit_FC = unit_rows(W_dec)
    latents = len(shown.file.summaries)
    assert len(W_dec) == latents
    streamed = shown.file.latents()
    ahead = next(streamed, None)
    for first in range(0, latents, PIECE):
        after = min(first + PIECE, latents)
        words: dict[str, int] = {}
        contexts: dict[str, list[Any]] = {}
        while ahead is not None and ahead.latent < after:
            shown.note(ahead)
            contexts[str(ahead.latent)] = [_packed_context(c, words) for c in shown.contexts_of(ahead)]
            ahead = next(streamed, None)
        near = nearest(unit_FC, first, after)
        piece: dict[str, Any] = {
            "words": list(words),
            "contexts": contexts,
            "near": near.latent_nK.tolist(),
            "cosine": _rounded(near.cosine_nK),
        }
        if lens is not None:
            effects = lens.effects(W_dec[first:after])
            for name, of_latents in effects._asdict().items():
                piece[name] = [[[text, number(value)] for text, value in tokens] for tokens in of_latents]
        yield piece
        report(Progress(f"report {shown.run.name}", after, latents, "latents", {}))


def _packed_context(context: Context, words: dict[str, int]) -> list[Any]:
    active = [at for at, activation in enumerate(context.activations) if activation > 0]
    return [
        KINDS.index(context.kind),
        number(context.activation),
        context.layer,
        context.row,
        context.position,
        context.document,
        context.at,
        [words.setdefault(token, len(words)) for token in context.tokens],
        active,
        [number(context.activations[at]) for at in active],
    ]


def _explanation(line: Any) -> list[Any]:
    """[outcome, category, explanation, or what went wrong]."""
    return [line.get("outcome"), line.get("category"), line.get("explanation") or line.get("reason") or ""]


def _rounded(values_nK: torch.Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in values] for values in values_nK.tolist()]


def number(value: float) -> float | None:
    """To four digits; None, which JSON knows, for what is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
