"""Count to which layers a routesae sends the tokens of each class, over a cache.

A token class is what a token spells without blanks and case. The held-out rows are read, or all rows where none are
held out. With hard routing a token counts for its layer; with soft routing for each layer by its weight.

Dimension letters: L layers, N tokens, C token classes.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routesae.analyze.contexts.windows import Vocabulary
from routesae.harvest.cache.reader import Cache
from routesae.reporting import Progress, Report, WrongInput, silent
from routesae.train.evaluate import BATCH_TOKENS, require_fit
from routesae.train.loading.batches import Selection, cut_plans, load
from routesae.train.saes import SAE
from routesae.train.saes.normalise import Hidden, places_of
from routesae.train.saes.routesae import RouteSAE

CLASSES = 40


@torch.no_grad()
def routes_by_class(sae: SAE, cache: Cache, vocabulary: Vocabulary, report: Report = silent) -> dict[str, Any]:
    """The most frequent classes, how many tokens each has, and their shares, one for each of the SAE's layers.

    Raises WrongInput where SAE and cache do not fit.
    """
    assert isinstance(sae, RouteSAE)
    require_fit(sae, cache)
    held_out = cache.manifest.train_rows < cache.manifest.rows
    first = cache.manifest.train_rows if held_out else 0
    selection = Selection(cache, first, cache.manifest.rows, sae.recipe.layers)
    if not len(selection):
        raise WrongInput(f"{cache.path} has no kept token in rows {first} to {cache.manifest.rows - 1}")
    positions = [selection.positions(shard) for shard in range(len(selection.shards))]
    token_ids = cache.tokens().reshape(-1)
    class_n = [torch.from_numpy(vocabulary.class_V[token_ids[position_n]]) for position_n in positions]
    weight_CL = torch.zeros(len(vocabulary.class_names), len(sae.recipe.layers), dtype=torch.float64)
    plans, blocks = (
        cut_plans(iter(selection.blocks()), BATCH_TOKENS),
        cut_plans(iter(selection.blocks()), BATCH_TOKENS),
    )
    done = 0
    with closing(load(selection, plans, BATCH_TOKENS, sae.device)) as batches:
        for batch, plan in zip(batches, blocks, strict=True):
            class_N = torch.cat([class_n[block.shard][block.first : block.after] for block in plan])
            position_N = np.concatenate([positions[block.shard][block.first : block.after] for block in plan])
            place_N = places_of(*map(torch.from_numpy, (token_ids[position_N], position_N % cache.manifest.context)))
            routed_NL = _routed(sae, Hidden(*batch, place_N.to(sae.device)))
            weight_CL.index_add_(0, class_N, routed_NL.double().cpu())
            done += len(class_N)
            report(Progress("routes", done, len(selection), "tokens", {}))
    count_C = torch.bincount(torch.cat(class_n), minlength=len(weight_CL))
    top = [c for c in count_C.argsort(descending=True, stable=True)[:CLASSES].tolist() if count_C[c]]
    return {
        "layers": list(sae.recipe.layers),
        "tokens": len(selection),
        "held_out": held_out,
        "classes": [vocabulary.class_texts[c] for c in top],
        "counts": [int(count_C[c]) for c in top],
        "shares": [[round(share, 4) for share in (weight_CL[c] / count_C[c]).tolist()] for c in top],
    }


def _routed(sae: RouteSAE, hidden: Hidden) -> Tensor:
    """routed_NL, the share of each layer in each token; they sum to 1."""
    if sae.recipe.routing == "soft":
        return sae.routing(hidden)
    return torch.nn.functional.one_hot(sae.routes(hidden).at_R, len(sae.recipe.layers))
