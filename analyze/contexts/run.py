"""The stage contexts: a cache, SAEs and the tokenizer in; of every latent the text it is active on, as files, out.

No LM is loaded: hidden states and tokens come from the cache. What is chosen: routesae.analyze.contexts.collect;
what is written: routesae.analyze.contexts.file.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routesae import __version__
from routesae.analyze.contexts.collect import Collected, Wanted, collect
from routesae.analyze.contexts.file import FORMAT, SAMPLES, write_contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.contexts.table import choose, context_batches, kept_by_rule, latent_table
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.inputs.identity import sae_identity
from routesae.analyze.inputs.lm import lm_of_cache, load_tokenizer_of
from routesae.analyze.inputs.saes import OpenSAE, open_saes
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import Progress, Report, silent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ContextResult:
    """One SAE's: features, the number of its latents that the published rule keeps; chosen, latents with contexts in
    contexts.json; contexts, rows of contexts.parquet, samples included."""

    sae: str
    folder: Path
    latents: int
    features: int
    chosen: int
    contexts: int
    max_activation: float

    def row(self) -> dict[str, Any]:
        """For a table."""
        named = {"latents": self.latents, "Features": self.features, "chosen": self.chosen, "contexts": self.contexts}
        return {"sae": self.sae, **named, "strongest": self.max_activation}


def contexts(settings: ContextSettings, report: Report = silent) -> list[ContextResult]:
    """Write the contexts of every SAE asked for. One from the hub gets a folder of its own under `out`.

    Raises WrongInput where cache, SAEs and tokenizer do not fit together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    opened = open_saes(settings.saes, Path(settings.out), cache, pick_device(settings.device))
    vocabulary = Vocabulary(load_tokenizer_of([lm_of_cache(cache)], settings.model))
    wanted = Wanted(
        threshold=settings.threshold,
        per_class=settings.per_class,
        max_classes=settings.max_classes,
        top=settings.top,
        sample=len(SAMPLES) * settings.samples,
        window=settings.window,
        seed=settings.seed,
    )
    results = []
    for name, sae in opened.items():

        def of_this(now: Progress, stage: str = f"contexts {name}") -> None:
            report(now._replace(stage=stage))

        collected = collect(sae.sae, cache, vocabulary, wanted, batch_tokens=settings.batch_tokens, report=of_this)
        results.append(_write(settings, name, sae, cache, vocabulary, collected))
    return results


def _write(
    settings: ContextSettings,
    name: str,
    sae: OpenSAE,
    cache: Cache,
    vocabulary: Vocabulary,
    collected: Collected,
) -> ContextResult:
    kept_F = kept_by_rule(collected, max_classes=settings.max_classes, min_contexts=settings.min_contexts)
    chosen = choose(collected, kept_F)
    latents_of_chosen = chosen.kept.of.latent_M[chosen.kind_M == 0].numpy()
    if settings.top is None and not kept_F.any():
        log.warning(
            "%s: the rule keeps no latent; the strongest activation is %.1f: give a --threshold well below it",
            name,
            float(collected.max_F.max()),
        )
    result = ContextResult(
        sae=name,
        folder=sae.beside,
        latents=len(kept_F),
        features=int(kept_F.sum()),
        chosen=len(np.unique(latents_of_chosen)),
        contexts=len(chosen.kind_M),
        max_activation=float(collected.max_F.max()),
    )
    facts = {
        "format": FORMAT,
        "routesae": __version__,
        "settings": settings.to_dict(),
        "cache": {"path": cache.address, **cache.manifest.to_dict()},
        "sae": {"name": name, "folder": str(sae.folder.resolve()), **sae_identity(sae.folder, sae.sae)},
        "tokens": collected.tokens,
        "readings": collected.readings,
        "features": result.features,
        "chosen": result.chosen,
    }
    layers = sae.sae.recipe.layers if collected.one_layer else None
    batches = context_batches(chosen, cache, vocabulary, layers)
    sae.beside.mkdir(parents=True, exist_ok=True)
    write_contexts(sae.beside, facts, latent_table(collected, kept_F), batches)
    return result
