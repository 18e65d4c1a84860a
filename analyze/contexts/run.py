"""Run `routesae contexts`: write into an SAE's folder the text that every latent is active on.

No LM is loaded: hidden states and tokens come from the cache.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routesae import __version__
from routesae.analyze.contexts.collect import collect
from routesae.analyze.contexts.file import FORMAT, read_facts, write_contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.contexts.table import context_batches, latent_table
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.inputs.identity import sae_identity
from routesae.analyze.inputs.lm import lm_of_cache, load_tokenizer_of
from routesae.analyze.inputs.saes import OpenSAE, open_saes
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import Progress, Report, WrongInput, silent

log = logging.getLogger(__name__)

RULE = ("threshold", "per_class", "max_classes", "min_contexts", "top", "window", "samples", "seed")


@dataclass(frozen=True, kw_only=True)
class ContextResult:
    """What was written for one SAE.

    features: latents that the published rule keeps. chosen: latents with contexts in contexts.json. contexts: rows of
    contexts.parquet, samples included.
    """

    sae: str
    folder: Path
    latents: int
    features: int
    chosen: int
    contexts: int
    max_activation: float

    def row(self) -> dict[str, Any]:
        """A row of the table."""
        counts = {
            "latents": self.latents,
            "Features": self.features,
            "chosen": self.chosen,
            "contexts": self.contexts,
        }
        return {"sae": self.sae, **counts, "strongest": self.max_activation}


def contexts(settings: ContextSettings, report: Report = silent) -> list[ContextResult]:
    """Write the contexts of every SAE asked for. One from the hub gets a folder of its own under `out`.

    Raises WrongInput if cache, SAEs and tokenizer do not belong together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    opened = open_saes(settings.saes, Path(settings.out), cache, pick_device(settings.device))
    if not settings.overwrite:
        for one in opened.values():
            _require_same_results(one.beside, settings, cache)
    vocabulary = Vocabulary(load_tokenizer_of([lm_of_cache(cache)], settings.model))
    return [_write(settings, name, sae, cache, vocabulary, report) for name, sae in opened.items()]


def _require_same_results(folder: Path, settings: ContextSettings, cache: Cache) -> None:
    """Raises WrongInput if there are contexts in `folder` which are not those that the settings would give again."""
    try:
        facts = read_facts(folder)
    except WrongInput:
        return  # damaged: nobody can read them
    if facts is None:
        return
    before, now = facts["settings"], settings.to_dict()
    changed = [
        f"--{name.replace('_', '-')} {before.get(name)}, now {now[name]}"
        for name in RULE
        if before.get(name) != now[name]
    ]
    if facts["cache"].get("tokens_hash") != cache.manifest.tokens_hash:
        changed.append(f"the corpus {facts['cache'].get('corpus')}, now {cache.manifest.corpus}")
    if changed:
        raise WrongInput(f"{folder} has contexts of {'; '.join(changed)}; give --overwrite to replace them")


def _write(
    settings: ContextSettings, name: str, sae: OpenSAE, cache: Cache, vocabulary: Vocabulary, report: Report
) -> ContextResult:
    def report_this_sae(now: Progress) -> None:
        report(now._replace(stage=f"contexts {name}"))

    collected = collect(sae.sae, cache, vocabulary, settings, report_this_sae)
    kept = collected.contexts
    result = ContextResult(
        sae=name,
        folder=sae.beside,
        latents=len(collected.kept_F),
        features=int(collected.kept_F.sum()),
        chosen=len(np.unique(kept.of.latent_M[kept.kind_M == 0].numpy())),
        contexts=len(kept.kind_M),
        max_activation=float(collected.max_F.max()),
    )
    if settings.top is None and result.features == 0:
        log.warning(
            "%s: the rule keeps no latent; the strongest activation is %.1f: give a --threshold well below it",
            name,
            result.max_activation,
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
    sae.beside.mkdir(parents=True, exist_ok=True)
    write_contexts(sae.beside, facts, latent_table(collected), context_batches(collected, cache, vocabulary))
    return result
