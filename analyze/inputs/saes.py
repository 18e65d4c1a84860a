"""Find and open the SAEs of an analysis, check that they fit its cache, and record what both are."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from routesae.analyze.inputs.lm import lm_of_cache, lm_of_sae, require_same_lm_as_cache
from routesae.harvest.cache.reader import Cache
from routesae.machine.settings import OUT
from routesae.reporting import WrongInput
from routesae.train.evaluate import require_fit
from routesae.train.folder.checkpoint import find_saes, load_sae
from routesae.train.folder.hub import fetch_sae
from routesae.train.saes import SAE

log = logging.getLogger(__name__)


class OpenSAE(NamedTuple):
    """An SAE, where it is, and where files about it go: beside it, unless that is the hub's cache."""

    folder: Path
    beside: Path
    sae: SAE


def sae_folders(references: Sequence[str], out: Path) -> dict[str, tuple[Path, Path]]:
    """{name: (folder, beside)} of the SAEs that `references` name, folders or of the hub, or of all under `out`.

    Raises WrongInput if there is none, or `out` has nothing to do with those that are named.
    """
    fetched = {fetch_sae(reference): reference for reference in references}
    folders = list(fetched) or find_saes(out)
    inside = [folder.parent.resolve().is_relative_to(out.resolve()) for folder in fetched]
    of_hub = [folder != Path(named) for folder, named in fetched.items()]  # files about these go to `out`
    if fetched and str(out) != OUT.default and not any(inside + of_hub):
        raise WrongInput(
            f"--out {out} is where SAEs are looked for, and --sae {folders[0]} is not in it; give one of them"
        )
    places = {}
    for folder in folders:
        reference = fetched.get(folder, str(folder))
        if folder == Path(reference):
            alone = sum(other.name == folder.name for other in folders) == 1
            places[folder.resolve().name if alone else str(folder)] = (folder, folder)
        else:  # the hub's folder has the name of a commit
            places[reference] = (folder, out / reference.replace("/", "--"))
    return places


def one_sae(reference: str | None, out: Path) -> tuple[Path, Path]:
    """(folder, beside) of an SAE, or of the only one under `out`. Raises WrongInput if there are more."""
    places = list(sae_folders((reference,) if reference is not None else (), out).values())
    if len(places) > 1:
        names = ", ".join(str(folder) for folder, _ in places[:8]) + " …" * (len(places) > 8)
        raise WrongInput(f"{len(places)} SAEs under {out}, and this takes one; name it with --sae: {names}")
    return places[0]


def open_saes(references: Sequence[str], out: Path, cache: Cache, device: torch.device) -> dict[str, OpenSAE]:
    """Load the SAEs of `sae_folders`. Raises WrongInput if one cannot be loaded or was trained on another LM than the
    cache's, or the cache lacks a layer of it."""
    opened = {}
    for name, (folder, beside) in sae_folders(references, out).items():
        sae = load_sae(folder, device)
        try:
            require_fit(sae, cache)
        except WrongInput as misfit:
            raise WrongInput(f"{folder}: {misfit}") from misfit
        if warning := require_same_lm_as_cache(lm_of_sae(folder, sae.recipe), lm_of_cache(cache)):
            log.warning("%s: %s", folder, warning)
        opened[name] = OpenSAE(folder, beside, sae)
    return opened


def rows_to_read(
    rows: str | None, cache: Cache, opened: Mapping[str, OpenSAE], tokens: int | None = None
) -> tuple[str, int, int]:
    """Which rows of the cache are read, "held-out" or "all", the first, and the one after the last.

    rows: which, or None for all if every SAE says that it was trained on another corpus, else those held out, which
    a ring alone has. tokens: no more than these, in whole rows. Raises WrongInput if there is none.
    """
    manifest, elsewhere = cache.manifest, True
    for one in opened.values() if rows is None else ():
        facts = lm_of_sae(one.folder, one.sae.recipe).facts
        same = {name: facts.get(name) == getattr(manifest, name) for name in ("corpus", "tokens_hash", "held_out")}
        of_corpus = same["corpus"] or same["tokens_hash"]
        elsewhere &= "tokens_hash" in facts and not of_corpus
        if of_corpus and not (same["tokens_hash"] and same["held_out"]):
            log.warning("%s was trained on the same corpus, and may have read some of these rows", one.folder)
    rows = rows or ("all" if elsewhere and not cache.ring() else "held-out")
    first = 0 if rows == "all" else manifest.train_rows
    if first == manifest.rows:
        raise WrongInput(f"{cache.path} has no held-out rows; --rows all reads those that SAEs may be trained on")
    most = manifest.rows if tokens is None else max(1, tokens // manifest.context)
    return rows, first, min(manifest.rows, first + most)


def sae_identity(sae: SAE) -> dict[str, Any]:
    """The recipe of a loaded SAE, and an xxh3-128 of each file of weights as it was read."""
    return {"recipe": sae.recipe.to_dict(), "weights": dict(sorted(sae.hashes.items()))}


def cache_identity(cache: Cache) -> dict[str, Any]:
    """Where it is, its manifest, the LM's weights, and an xxh3-128 of what the records of its shards say.

    They hold hashes of all that was written; the hidden states themselves are not read.
    """
    manifest = cache.manifest.to_dict()
    records = [(of.index, of.weights_hash, dict(of.hashes)) for of in (shard.record for shard in cache.shards())]
    written = json.dumps([manifest, records], sort_keys=True)
    return {
        "path": cache.storage.address,
        **manifest,
        "lm_weights": cache.manifest.weights_hash,
        "fingerprint": xxhash.xxh3_128(written.encode()).hexdigest(),
    }
