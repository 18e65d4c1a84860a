"""The stage harvest: a corpus and an LM in; a cache of hidden states out.

    documents → tokens/ (all of them, before the LM loads) → for each missing shard: LM → shard buffer → disk

The LM fills one shard buffer while a thread writes the other.

Dimension letters: S rows of tokens, T context, s rows a shard, B rows a batch.
"""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routesae import __version__
from routesae.harvest import lm
from routesae.harvest.batching import Batching
from routesae.harvest.buffer import ShardBuffer
from routesae.harvest.cache import (
    STAGED_TOKENS,
    Cache,
    Manifest,
    ShardRecord,
    begin_cache,
    is_uncommitted,
    remove_partial_shards,
    token_bytes,
)
from routesae.harvest.corpus import write_tokens
from routesae.harvest.device import keep_freed_memory, pick_device, pick_lm_dtype
from routesae.harvest.settings import HarvestSettings, parse_layers
from routesae.harvest.tokens import tokenizer_hash
from routesae.reporting import Progress, Report, WrongInput, human_bytes, silent

log = logging.getLogger(__name__)

# The manifest's fields that are flags by another name; shard_rows is --shard-tokens in rows of the context.
FLAGS = {"corpus": "data", "tokens_asked": "tokens", "shard_rows": "shard-tokens, in rows,"}
DISK_RESERVE = 1.01  # indexes, metadata and the file system's own rounding


def harvest(settings: HarvestSettings, report: Report = silent) -> Cache:
    """Write the cache `settings.out`, or what is missing of it; returns it opened.

    Raises WrongInput for a corpus, model or folder that cannot be used, FailedRun where a run cannot finish.
    """
    device = pick_device(settings.device)
    lm_dtype = pick_lm_dtype(settings.lm_dtype, device)
    path = Path(settings.out)
    config = lm.load_config(settings.model)
    resumed = (path / "zarr.json").exists()
    if resumed:
        cache = Cache(path)
        _refuse_other_settings(cache.manifest, settings, config, lm_dtype)
    else:
        cache = prepare(settings, config, lm_dtype, report)
    remove_partial_shards(path)
    missing = cache.missing()
    if missing:
        if resumed:
            present = cache.manifest.shard_count - len(missing)
            log.info("%d of %d shards are there already", present, cache.manifest.shard_count)
            _require_disk(path, _bytes_of(cache.manifest, len(missing)), settings)
        model = lm.load_lm(settings.model, cache.manifest.revision, device=device, lm_dtype=lm_dtype)
        weights = lm.weights_hash(model)
        _refuse_other_weights(cache, weights, settings)
        model = lm.cut_after(model, cache.manifest.layers[-1])
        harvest_shards(cache, model, weights, missing, settings, report)
    return cache


# --------------------------------------------------------------------------------------------- corpus → tokens


def prepare(settings: HarvestSettings, config: Any, lm_dtype: str, report: Report) -> Cache:
    """Tokenise and pack the corpus, and begin the cache with it and the manifest."""
    path = Path(settings.out)
    if path.exists() and not (path.is_dir() and is_uncommitted(path)):
        raise WrongInput(f"--out {path} exists and is not a routesae cache; give a new folder")
    depth = lm.model_layers(config)
    layers = parse_layers(settings.layers, depth)
    width = int(config.get_text_config().hidden_size)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and settings.context > limit:
        raise WrongInput(f"--context {settings.context} is more than the {limit} positions {settings.model} has")
    a_token = token_bytes(len(layers), width, settings.dtype)
    log.info(
        "%d layers (%d to %d) x %d x %s: %s a token, up to %s for %s tokens",
        len(layers),
        layers[0],
        layers[-1],
        width,
        settings.dtype,
        human_bytes(a_token),
        human_bytes(a_token * settings.tokens),
        f"{settings.tokens:,}",
    )
    revision = getattr(config, "_commit_hash", None)
    tokenizer = lm.load_tokenizer(settings.model, revision)
    prepared = path / STAGED_TOKENS
    shutil.rmtree(prepared, ignore_errors=True)
    made_folder = not path.exists()
    prepared.mkdir(parents=True)
    try:
        facts = write_tokens(prepared, settings, tokenizer, report)
        manifest = Manifest(
            model=settings.model,
            revision=revision,
            config_hash=lm.config_hash(config),
            tokenizer_hash=tokenizer_hash(tokenizer),
            lm_dtype=lm_dtype,
            model_layers=depth,
            layers=layers,
            width=width,
            versions={"routesae": __version__, **{p: version(p) for p in ("torch", "transformers", "zarr")}},
            **_shared_settings(settings),
            **facts,
        )
        _require_disk(path, _bytes_of(manifest, manifest.shard_count), settings)
        begin_cache(path, manifest, prepared)
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
        if made_folder and not any(path.iterdir()):
            path.rmdir()
    return Cache(path)


def _shared_settings(settings: HarvestSettings) -> dict[str, Any]:
    """The manifest's fields that are settings: what a resumed run must agree on."""
    return {
        "context": settings.context,
        "shard_rows": max(1, settings.shard_tokens // settings.context),
        "dtype": settings.dtype,
        "overflow": settings.overflow,
        "compress": settings.compress,
        "seed": settings.seed,
        "corpus": settings.data,
        "split": settings.split,
        "text_field": settings.text_field,
        "min_chars": settings.min_chars,
        "tokens_asked": settings.tokens,
        "keep_special": settings.keep_special,
        "skip_positions": settings.skip_positions,
    }


def _refuse_other_settings(manifest: Manifest, settings: HarvestSettings, config: Any, lm_dtype: str) -> None:
    asked = {
        "model": settings.model,
        "layers": parse_layers(settings.layers, lm.model_layers(config)),
        "config_hash": lm.config_hash(config),
        "lm_dtype": lm_dtype,
        **_shared_settings(settings),
    }
    differing = [
        f"{FLAGS.get(name, name)} is {getattr(manifest, name)}, not {value}"
        for name, value in asked.items()
        if getattr(manifest, name) != value
    ]
    if differing:
        raise WrongInput(
            f"{settings.out} was begun with other settings: {'; '.join(differing)}. "
            "Give the settings it was begun with, or another --out"
        )


def _bytes_of(manifest: Manifest, shards: int) -> int:
    return int(manifest.kept_tokens * manifest.token_bytes * shards / manifest.shard_count * DISK_RESERVE)


def _require_disk(path: Path, needed: int, settings: HarvestSettings) -> None:
    free = shutil.disk_usage(path).free
    log.info("the shards will take %s; %s is free at %s", human_bytes(needed), human_bytes(free), path)
    if needed > free:
        raise WrongInput(
            f"the shards need {human_bytes(needed)}, but {path} has {human_bytes(free)} free; "
            f"ask for fewer than {settings.tokens:,} --tokens, fewer --layers, or another --out"
        )


# --------------------------------------------------------------------------------------------- tokens → shards


def harvest_shards(
    cache: Cache,
    model: lm.LanguageModel,
    weights: str,
    missing: list[int],
    settings: HarvestSettings,
    report: Report,
) -> None:
    """Run the LM over the missing shards and write each; two buffers, so that writing hides beside the LM."""
    manifest = cache.manifest
    batching = Batching(settings.batch_sequences, cache, model.device)
    log.info("harvest on %s", how_it_runs(model, manifest.lm_dtype, batching.sequences))
    keep_freed_memory()
    tokens = cache.tokens()
    total = sum(last - first for first, last in map(manifest.shard_range, missing)) * manifest.context
    done = 0

    def step(rows: int) -> None:
        nonlocal done
        done += rows * manifest.context
        written = human_bytes(done / total * _bytes_of(manifest, len(missing)) / DISK_RESERVE)
        report(Progress("harvest", done, total, "tokens", {"size": written}))

    with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
        pending: list[Future[ShardRecord]] = []
        for index in missing:
            first, after = manifest.shard_range(index)
            make = partial(ShardBuffer, np.array(tokens[first:after]), manifest, index, model.device)
            buffer = batching.fill(make, model, step)
            if pending:  # at most one shard being written while one is filled
                pending.pop().result()
            pending.append(writer.submit(buffer.commit, cache, weights, batching.sequences))
        for last in pending:
            last.result()


def how_it_runs(model: lm.LanguageModel, lm_dtype: str, sequences: int) -> str:
    """What was chosen by device, in one line."""
    chosen = [
        torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "the CPU",
        f"LM in {lm_dtype}",
        f"{getattr(model.model.config, '_attn_implementation', None) or 'its own'} attention",
        f"{torch.get_num_threads()} threads",
        f"{sequences} rows a batch",
    ]
    return ", ".join(chosen)


def _refuse_other_weights(cache: Cache, weights: str, settings: HarvestSettings) -> None:
    if cache.weights_hash() not in (None, weights):
        raise WrongInput(
            f"{settings.out} was begun with other weights than {settings.model} has now; "
            "give the model it was begun with, or another --out"
        )
