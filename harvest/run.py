"""Run the stage harvest: a corpus and an LM become a cache of hidden states.

    documents → tokens/ (routesae.harvest.filling.begin) → LM → missing shards (routesae.harvest.filling.shards)

Any number of harvesters share a folder: one tokenises, and then each takes shards that nobody has claimed.
"""

import logging
from collections.abc import Sequence
from typing import Any

from routesae.harvest.cache.arrays import BadArray
from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import shard_name
from routesae.harvest.cache.reader import Cache, damaged, root_array
from routesae.harvest.cache.ring import Ring
from routesae.harvest.cache.writer import remove_partial_shards
from routesae.harvest.filling.begin import open_or_begin, require_disk
from routesae.harvest.filling.output import Output
from routesae.harvest.filling.shards import harvest_shards
from routesae.harvest.lm import model as lm
from routesae.harvest.lm import probe
from routesae.harvest.settings import HarvestSettings, share_of
from routesae.machine.device import pick_device, pick_lm_dtype
from routesae.machine.files import disk_faults
from routesae.machine.stop import ending_at_once
from routesae.reporting import FailedRun, Report, WrongInput, silent

log = logging.getLogger(__name__)


def harvest(settings: HarvestSettings, report: Report = silent) -> Cache:
    """Write the cache `settings.out`, or what is missing of it; return it opened, and whole.

    Raises WrongInput for a corpus, model or folder that cannot be used, FailedRun if a run cannot finish, Stopped if
    it was asked to stop.
    """
    device = pick_device(settings.device)
    lm_dtype = pick_lm_dtype(settings.lm_dtype, device)
    share_of(settings)  # raises what is wrong with it before the corpus is read
    output = Output(settings.out)
    folder = output.folder
    early = ending_at_once("stopped before a shard was begun; run the same command again to go on")
    config = lm.load_config(settings.model)
    loaded: list[tuple[lm.LanguageModel, str]] = []  # and the exact hash of its weights

    def load(revision: str | None) -> None:
        model = lm.load_lm(settings.model, revision, device=device, lm_dtype=lm_dtype, device_map=settings.device_map)
        loaded.append((model, lm.weights_hash(model, exact=True)))

    def prove(tokenizer: Any, layers: Sequence[int]) -> dict[str, Any]:
        load(getattr(config, "_commit_hash", None))
        (model, exact) = loaded[0]
        weights = lm.weights_hash(model)  # before it runs, which unpacks some quantised weights for good
        offset = probe.prove(model, settings.model, tokenizer, layers, settings.context)
        return {"hidden_states_offset": offset, "weights_hash": weights, "exact_weights_hash": exact}

    claims = Claims(folder)
    with early, disk_faults(folder, lambda: _kept(output), lambda: claims.has_taken), claims:
        is_resumed = output.is_begun()
        cache = open_or_begin(output, settings, config, lm_dtype, claims, report, prove)
        state = cache.ring()
        if settings.keep is not None and settings.keep != (state and state.keep):
            begun = f"with --keep {state.keep}" if state else "without --keep"
            raise WrongInput(f"{settings.out} was begun {begun}, not {settings.keep}; give that, or another --out")
        ring = Ring(cache) if state else None
        remove_partial_shards(folder, claims)
        cache.tokens(), cache.roles(), cache.documents()  # refused where they are not what was written
        output.publish_left(cache, claims)
        if missing := len(cache.missing()):
            if is_resumed:
                count = cache.manifest.shard_count
                log.info("%d of %d shards are there already", count - missing, count)
                room = ring.capacity - len(cache.shards_at.shard_names()) if ring else missing
                require_disk(output, cache.manifest, max(0, min(missing, room)))
            if not loaded:
                load(cache.manifest.revision)
            model, weights = loaded.pop()
            if weights != cache.manifest.exact_weights_hash:
                raise WrongInput(
                    f"{settings.out} was begun with other weights than {settings.model} has now; "
                    "give the model it was begun with, or another --out"
                )
            model = lm.cut_after(model, cache.manifest.layers[-1])  # the only reference: the rest is freed
            harvest_shards(output, cache, model, claims, settings, report, ring)
            remove_partial_shards(folder, claims)
        cache.require_unchanged()
        return _whole(Cache(output.store or folder))


def _whole(cache: Cache) -> Cache:
    """The cache as others read it, after a look at every file (size, index). Raises FailedRun where one is gone."""
    name = ""
    try:
        cache.require_whole()
        for name in cache.manifest.root_hashes:
            root_array(cache.storage, cache.manifest, name)
        for shard in cache.shards():
            for array in shard.record.hashes:
                name = f"{shard_name(shard.record.index)}/{array}"
                shard.array(array)
    except BadArray as bad:
        raise FailedRun(str(damaged(f"{cache.path}/{name}", bad))) from bad
    except WrongInput as bad:
        raise FailedRun(str(bad)) from bad
    return cache


def _kept(output: Output) -> str:
    if output.store is not None:
        return f"what is in {output.out} stays"
    if not output.is_begun():
        return "nothing is written yet"
    cache = Cache(output.folder)
    return f"{cache.manifest.shard_count - len(cache.missing())} of {cache.manifest.shard_count} shards are there"
