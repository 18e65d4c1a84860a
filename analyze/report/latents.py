"""Turn an SAE's contexts, explanations and decoder into what the page shows of its latents, as JSON.

The page reads a list of all latents when it opens, and pieces of PIECE latents with their contexts as they are looked
at. A context is [kind, activation, layer, row, position, document, at, words, active, activations]: kind is an index
into contexts.file.KINDS, document is [number, what is known of it, place], words are indices into the piece's list of
texts, as the last two of document are, active are the indices of the words on which the latent is active and
activations its values there. A word is a token or, where a character takes several, all tokens of the character, with
their strongest activation.
"""

import base64
import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from routesae.analyze.contexts.file import KINDS, SAMPLES, Context, LatentContexts, words_of
from routesae.analyze.report.lens import NEAREST, LogitLens, nearest
from routesae.analyze.report.runs import Run
from routesae.reporting import Progress, Report, WrongInput
from routesae.train.saes import SAE

PIECE = 128  # latents: some 100 kB, read in the time of a key press
WORDS_LISTED = 16  # of a latent, which the list shows and searches
COMPRESSION = 6


def packed(data: Any) -> str:
    """JSON, gzip, base64: letters, digits, + / =, so that no text in it can end the element it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), COMPRESSION, mtime=0)).decode("ascii")


def latent_list(run: Run) -> dict[str, Any]:
    """The list of all latents, a column for each property; `latent_pieces` fills in words and layer from contexts."""
    assert run.contexts is not None
    facts, summaries = run.contexts.facts, run.contexts.summaries
    listed: dict[str, Any] = {
        "readings": facts["readings"],
        "threshold": facts["settings"]["threshold"],
        "active": [summary.active for summary in summaries],
        "max": [_number(summary.max_activation) for summary in summaries],
        "mean": [_number(summary.mean_activation) for summary in summaries],
        "kept": [int(summary.kept) for summary in summaries],
        "words": [""] * len(summaries),
        "on": [[]] * len(summaries),  # how strongly it is active on each of the words
    }
    if len(run.recipe.layers) > 1:  # otherwise it is the same for all
        listed["layer"] = [None] * len(summaries)
    if run.explanations:
        listed["score"] = [None] * len(summaries)
        listed["explained"] = {}
    for latent, line in run.explanations.items():
        if latent < len(summaries):
            said = [line.get(name) for name in ("outcome", "category", "explanation", "reason")]
            outcome, category, explanation, reason = (text if isinstance(text, str) else "" for text in said)
            listed["explained"][str(latent)] = [outcome, category, explanation or reason]
            listed["score"][latent] = _number(line.get("score"))
    return listed


def latent_pieces(
    run: Run, listed: dict[str, Any], sae: SAE, lens: LogitLens | None, contexts: int, report: Report
) -> Iterator[dict[str, Any]]:
    """Pieces of PIECE latents in order, the last of those that remain.

    listed: the list of all latents. contexts: at most this many of a latent's strongest are shown, of those that the
    rule chose besides, and a quarter of that from each third of its sample.
    """
    assert run.contexts is not None
    W_FC = sae.dictionary.W_dec_FD.detach()
    unit_FC = normalize(W_FC)
    latents = len(run.contexts.summaries)
    if len(W_FC) != latents:
        raise WrongInput(f"{run.folder} has {len(W_FC)} latents, its contexts {latents}; run routesae contexts again")
    streamed = run.contexts.latents()
    ahead = next(streamed, None)
    for first in range(0, latents, PIECE):
        after = min(first + PIECE, latents)
        texts: dict[str, int] = {}
        shown: dict[str, list[Any]] = {}
        while ahead is not None and ahead.latent < after:
            _list_words(listed, ahead)
            picked = {(context.row, context.position, context.layer): context for context in ahead.top[:contexts]}
            for context in ahead.chosen[:contexts]:
                picked.setdefault((context.row, context.position, context.layer), context)
            samples = [context for kind in SAMPLES for context in ahead.samples[kind][: max(1, contexts // 4)]]
            shown[str(ahead.latent)] = [_packed_context(one, texts) for one in (*picked.values(), *samples)]
            ahead = next(streamed, None)
        cosine_nK, near_nK = nearest(unit_FC[first:after], unit_FC, NEAREST, itself=first)
        summaries = run.contexts.summaries[first:after]
        piece = {
            "words": list(texts),
            "contexts": shown,
            "near": near_nK.tolist(),
            "cosine": cosine_nK.double().round(decimals=3).tolist(),
            "histogram": [[summary.histogram_first, *summary.histogram] for summary in summaries],
        }
        if lens is not None:
            for name, of_latents in lens.effects(W_FC[first:after]).items():
                piece[name] = [[[text, _number(value)] for text, value in tokens] for tokens in of_latents]
        yield piece
        report(Progress(f"report {run.name}", after, latents, "latents", {}))


def latent_pairs(unit_FC: Tensor, other_FC: Tensor) -> dict[str, Any]:
    """For each latent the nearest one of another SAE. Both are unit decoder rows; F may differ."""
    parts = [nearest(unit_nC, other_FC, 1) for unit_nC in torch.split(unit_FC, PIECE)]
    cosine_F1, latent_F1 = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
    return {"latent": latent_F1[:, 0].tolist(), "cosine": cosine_F1[:, 0].double().round(decimals=3).tolist()}


def _list_words(listed: dict[str, Any], latent: LatentContexts) -> None:
    """List the words a latent is active on, the strongest first, and the layer it is read from most."""
    sampled = [context for kind in SAMPLES for context in latent.samples[kind]]
    strongest: dict[str, float] = {}
    for context in sorted((*latent.top, *latent.chosen, *sampled), key=lambda context: -context.activation):
        word = (context.word.strip() or context.word).lower().replace("\n", "↵")
        strongest.setdefault(word, context.activation)
    whole = [word for word in strongest if "\ufffd" not in word] or list(strongest)  # of some a row has a half only
    listed["words"][latent.latent] = "\n".join(whole[:WORDS_LISTED])
    listed["on"][latent.latent] = [_number(strongest[word]) for word in whole[:WORDS_LISTED]]
    layers = Counter(context.layer for context in sampled or latent.top)
    if "layer" in listed and layers:
        listed["layer"][latent.latent] = layers.most_common(1)[0][0]


def _packed_context(context: Context, texts: dict[str, int]) -> list[Any]:
    words = words_of(context.tokens)
    peaks = [max(context.activations[word.start : word.stop]) for word in words]
    active = [at for at, peak in enumerate(peaks) if peak > 0]
    about = [f"{name}: {value}" for name, value in {**context.fields, "role": context.role}.items() if value]
    return [
        KINDS.index(context.kind),
        _number(context.activation),
        context.layer,
        context.row,
        context.position,
        [
            context.document,
            *(texts.setdefault(text, len(texts)) for text in (" · ".join(about), context.place or "")),
        ],
        next(at for at, word in enumerate(words) if context.at in word),
        [texts.setdefault("".join(context.tokens[word.start : word.stop]), len(texts)) for word in words],
        active,
        [_number(peaks[at]) for at in active],
    ]


def _number(value: object) -> float | None:
    """The value to four digits, or None for anything but a finite number; JSON has no NaN."""
    return float(f"{value:.4g}") if isinstance(value, int | float) and math.isfinite(value) else None
