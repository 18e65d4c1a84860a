"""Turn an SAE's contexts, explanations and decoder into what the page shows of its latents, as JSON.

The page reads a list of all latents when it opens, and pieces of PIECE latents with their contexts as they are looked
at. A context is [kind, activation, layer, row, position, document, at, words, active, activations]: kind is an index
into contexts.file.KINDS, words are indices into the piece's list of texts, active are the indices of the words on
which the latent is active and activations its values there. A word is a token or, where a character takes several,
all tokens of the character, with their strongest activation.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from routesae.analyze.contexts.file import KINDS, SAMPLES, Context, LatentContexts, words_of
from routesae.analyze.report.lens import LogitLens, decoder_of, nearest, unit_rows
from routesae.analyze.report.runs import Run
from routesae.reporting import Progress, Report
from routesae.train.saes import SAE

PIECE = 128  # latents: some 100 kB, read in the time of a key press
WORDS_LISTED = 12  # of a latent, which the list shows and searches
COMPRESSION = 6


def packed(data: Any) -> str:
    """JSON, gzip, base64: letters, digits, + / =, so that no text in it can end the element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), COMPRESSION, mtime=0)).decode("ascii")


def latent_list(run: Run) -> dict[str, Any]:
    """The list of all latents, a column for each property; `latent_pieces` fills in words and layer from contexts."""
    assert run.contexts is not None
    facts, summaries, lines = run.contexts.facts, run.contexts.summaries, run.explanations
    only_layer = run.recipe.layers[0] if len(run.recipe.layers) == 1 else None
    return {
        "readings": facts["readings"],
        "threshold": facts["settings"]["threshold"],
        "active": [summary.active for summary in summaries],
        "max": [_number(summary.max_activation) for summary in summaries],
        "mean": [_number(summary.mean_activation) for summary in summaries],
        "kept": [int(summary.kept) for summary in summaries],
        "layer": [only_layer if summary.active else None for summary in summaries],
        "words": [""] * len(summaries),
        "score": [_number(lines.get(summary.latent, {}).get("score")) for summary in summaries],
        "explained": {
            str(latent): [
                line.get("outcome"),
                line.get("category"),
                line.get("explanation") or line.get("reason") or "",
            ]
            for latent, line in lines.items()
        },
    }


def latent_pieces(
    run: Run, listed: dict[str, Any], sae: SAE, lens: LogitLens | None, contexts: int, report: Report
) -> Iterator[dict[str, Any]]:
    """Pieces of PIECE latents in order, the last of those that remain.

    listed: the list of all latents. contexts: at most this many of a latent's strongest are shown, and a quarter of
    that from each third of its sample.
    """
    assert run.contexts is not None
    W_dec = decoder_of(sae)
    unit_FC = unit_rows(W_dec)
    latents = len(run.contexts.summaries)
    assert len(W_dec) == latents
    streamed = run.contexts.latents()
    ahead = next(streamed, None)
    for first in range(0, latents, PIECE):
        after = min(first + PIECE, latents)
        texts: dict[str, int] = {}
        shown: dict[str, list[Any]] = {}
        while ahead is not None and ahead.latent < after:
            _list_words(listed, ahead, several_layers=len(run.recipe.layers) > 1)
            picked = [*ahead.top[:contexts]]
            shown_already = {(context.row, context.position, context.layer) for context in picked}
            picked += [c for c in ahead.chosen[:contexts] if (c.row, c.position, c.layer) not in shown_already]
            picked += [context for kind in SAMPLES for context in ahead.samples[kind][: max(1, contexts // 4)]]
            shown[str(ahead.latent)] = [_packed_context(context, texts) for context in picked]
            ahead = next(streamed, None)
        cosine_nK, near_nK = nearest(unit_FC, first, after)
        piece = {
            "words": list(texts),
            "contexts": shown,
            "near": near_nK.tolist(),
            "cosine": [[round(value, 3) for value in values] for values in cosine_nK.tolist()],
        }
        if lens is not None:
            for name, of_latents in lens.effects(W_dec[first:after]).items():
                piece[name] = [[[text, _number(value)] for text, value in tokens] for tokens in of_latents]
        yield piece
        report(Progress(f"report {run.name}", after, latents, "latents", {}))


def _list_words(listed: dict[str, Any], latent: LatentContexts, *, several_layers: bool) -> None:
    """List the words a latent is active on, one a line, and the layer it is read from most."""
    sampled = [context for kind in SAMPLES for context in latent.samples[kind]]
    marked: dict[str, None] = {}
    for context in (*latent.top, *latent.chosen, *sampled):
        marked[(context.word.strip() or context.word).lower().replace("\n", "↵")] = None
    whole = [word for word in marked if "\ufffd" not in word] or list(marked)  # of some a row has a half only
    listed["words"][latent.latent] = "\n".join(whole[:WORDS_LISTED])
    layers = Counter(context.layer for context in sampled or latent.top)
    if several_layers and layers:
        listed["layer"][latent.latent] = layers.most_common(1)[0][0]


def _packed_context(context: Context, texts: dict[str, int]) -> list[Any]:
    words = words_of(context.tokens)
    peaks = [max(context.activations[word.start : word.stop]) for word in words]
    active = [at for at, peak in enumerate(peaks) if peak > 0]
    return [
        KINDS.index(context.kind),
        _number(context.activation),
        context.layer,
        context.row,
        context.position,
        context.document,
        next(at for at, word in enumerate(words) if context.at in word),
        [texts.setdefault("".join(context.tokens[word.start : word.stop]), len(texts)) for word in words],
        active,
        [_number(peaks[at]) for at in active],
    ]


def _number(value: object) -> float | None:
    """The value to four digits, or None for anything but a finite number; JSON has no NaN."""
    return float(f"{value:.4g}") if isinstance(value, int | float) and math.isfinite(value) else None
