"""The stage harvest: a corpus and an LM in; a cache of hidden states out.

    documents → tokens/ (routesae.harvest.filling.begin) → LM → missing shards (routesae.harvest.filling.shards)

Any number of harvesters share a folder: one tokenises, and each then takes shards that none has claimed.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.storage import is_url
from routesae.harvest.cache.writer import remove_partial_shards
from routesae.harvest.filling.begin import open_or_begin, require_disk
from routesae.harvest.filling.shards import harvest_shards, refuse_other_weights
from routesae.harvest.filling.staging import publish_left, published, stage_of, staging_folder
from routesae.harvest.lm import model as lm
from routesae.harvest.settings import HarvestSettings, share_of
from routesae.machine.device import has_bfloat16_units, pick_device, pick_lm_dtype
from routesae.machine.faults import disk_faults
from routesae.machine.stop import ending_at_once
from routesae.reporting import Report, silent

log = logging.getLogger(__name__)


def harvest(settings: HarvestSettings, report: Report = silent) -> Cache:
    """Write the cache `settings.out`, or what is missing of it; returns it opened, and whole.

    Raises WrongInput for a corpus, model or folder that cannot be used, FailedRun where a run cannot finish, Stopped
    where it was asked to stop.
    """
    device = pick_device(settings.device)
    # Scores stay in float32 on every CPU; hidden states lose 1e-4 of their variance to this, a thousandth of what an
    # SAE does, and come 2.5 times as fast.
    lm_dtype = pick_lm_dtype(settings.lm_dtype, device, bfloat16_units=has_bfloat16_units())
    share_of(settings)  # whatever is wrong with it is said before the corpus is read
    path, stage = staging_folder(settings), stage_of(settings)
    config = lm.load_config(settings.model)
    early = ending_at_once("stopped before a shard was begun; run the same command again to go on")
    with early, disk_faults(path, partial(_kept, path, settings)), Claims(path) as claims:
        resumed = (path / "zarr.json").exists()
        cache = open_or_begin(settings, config, lm_dtype, claims, report)
        remove_partial_shards(path, claims.is_live)
        if stage is not None:
            cache = stage.opened()
            publish_left(cache, claims)
        missing = cache.missing()
        if not missing:
            return published(cache)
        if resumed:
            present = cache.manifest.shard_count - len(missing)
            log.info("%d of %d shards are there already", present, cache.manifest.shard_count)
            require_disk(path, cache.manifest, len(missing), settings, begun_bytes=_bytes_begun(path))
        model = lm.load_lm(settings.model, cache.manifest.revision, device=device, lm_dtype=lm_dtype)
        weights = lm.weights_hash(model)
        refuse_other_weights(cache, weights, settings)
        model = lm.cut_after(model, cache.manifest.layers[-1])
        harvest_shards(cache, model, weights, claims, settings, report)
        remove_partial_shards(path, claims.is_live)
        claims.sweep(lambda name: (path / name).exists())
    return published(cache)


def _kept(path: Path, settings: HarvestSettings) -> str:
    if is_url(settings.out):
        return f"what is in {settings.out} stays"
    if not (path / "zarr.json").exists():
        return "nothing is written yet"
    cache = Cache(path)
    return f"{cache.manifest.shard_count - len(cache.missing())} of {cache.manifest.shard_count} shards are there"


def _bytes_begun(path: Path) -> int:
    """What shards that other harvesters are writing have of the disk already."""
    found = (file.stat().st_size for part in path.glob(".shard-*.partial") for file in part.rglob("*"))
    try:
        return sum(found)
    except FileNotFoundError:  # one was committed meanwhile
        return 0
