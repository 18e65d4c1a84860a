"""Run `routesae contexts`: write into each SAE's folder the text that its latents are active on.

No LM is loaded: hidden states and tokens come from the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from routesae import __version__
from routesae.analyze.contexts.collect import collect
from routesae.analyze.contexts.file import CHOSEN, FORMAT, KINDS, read_facts, write_contexts
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.contexts.table import context_batches, latent_table, routes_table
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.inputs.identity import sae_identity
from routesae.analyze.inputs.lm import lm_of_cache, load_tokenizer_of
from routesae.analyze.inputs.saes import OpenSAE, open_saes
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import Report, Table, WrongInput, silent

log = logging.getLogger(__name__)

RULE = ("rows", "threshold", "per_class", "max_classes", "min_contexts", "choose", "top", "window", "samples", "seed")


def contexts(settings: ContextSettings, report: Report = silent) -> Table:
    """Write the contexts of every SAE asked for. One from the hub gets a folder of its own under `out`.

    Returns a row for each. Features: latents that the published rule keeps. chosen: latents in contexts.json.
    contexts: rows of contexts.parquet, the strongest and samples included. written: the folder. groups: of
    --group-by, see routesae.analyze.contexts.groups. Raises WrongInput if cache, SAEs and tokenizer do not belong
    together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    if cache.ring() and settings.rows == "all":
        log.info("%s is a ring, so contexts are of its held-out rows alone", cache.path)
        settings = settings.replace(rows="held-out")
    opened = open_saes(settings.saes, Path(settings.out), cache, pick_device(settings.device))
    made_from = {name: _facts(settings, name, sae, cache) for name, sae in opened.items()}
    if not settings.overwrite:
        for name, one in opened.items():
            _require_same_results(one.beside, made_from[name])
    vocabulary = Vocabulary(load_tokenizer_of([lm_of_cache(cache)], settings.model))
    saes, rows = {name: one.sae for name, one in opened.items()}, Table()
    found = collect(saes, cache, vocabulary, settings, report)
    for name, one in opened.items():
        collected = found.pop(name)
        kept, features, strongest = collected.contexts, int(collected.kept_F.sum()), float(collected.max_F.max())
        if settings.choose == "rule" and features == 0:
            log.warning(
                "%s: the rule keeps no latent; the strongest activation is %.1f: give a --threshold well below it",
                name,
                strongest,
            )
        chosen = len(np.unique(kept.of.latent_M[kept.kind_M == KINDS.index(CHOSEN)].numpy()))
        counts = {"tokens": collected.tokens, "readings": collected.readings, "features": features, "chosen": chosen}
        facts = {**made_from[name], **counts, "routes": routes_table(collected, cache, vocabulary, one.sae.layers)}
        batches = context_batches(collected, cache, vocabulary)
        place = write_contexts(one.beside, facts, latent_table(collected), batches)
        row = {"sae": name, "latents": len(collected.kept_F), "Features": features, "chosen": chosen}
        rows.append({**row, "contexts": len(kept.kind_M), "strongest": strongest, "written": str(place)})
        if collected.groups is not None:
            rows[-1]["groups"] = collected.groups.strongest()
            for one in rows[-1]["groups"]:
                classes = dict.fromkeys(kept.of.class_M[kept.of.latent_M == one["latent"]].tolist())
                one["words"] = ", ".join(vocabulary.class_texts[token_class].strip() for token_class in classes)[:24]
    return rows


def _facts(settings: ContextSettings, name: str, sae: OpenSAE, cache: Cache) -> dict[str, Any]:
    """What an SAE's contexts are made from, known before they are."""
    return {
        "format": FORMAT,
        "routesae": __version__,
        # How it was run is left out: the contexts are the same.
        "settings": {name: getattr(settings, name) for name in RULE},
        "cache": {"path": cache.address, **cache.manifest.to_dict()},
        "sae": {"name": name, "folder": str(sae.folder.resolve()), **sae_identity(sae.sae)},
    }


def _require_same_results(folder: Path, now: Mapping[str, Any]) -> None:
    """Raises WrongInput if there are contexts of this corpus in `folder` that would be others afterwards."""
    try:
        before = read_facts(folder, now["cache"]["tokens_hash"])
    except WrongInput:
        return  # damaged: nobody can read them
    if before is None:
        return
    changed = [
        f"--{name.replace('_', '-')} {before['settings'].get(name)}, now {now['settings'][name]}"
        for name in RULE
        if before["settings"].get(name) != now["settings"][name]
    ]
    if changed:
        raise WrongInput(f"{folder} has contexts of {'; '.join(changed)}; give --overwrite to replace them")
