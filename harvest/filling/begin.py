"""A cache opened to write shards into: settings in; its tokens and manifest on the disk out.

    documents → tokens/ (all of them, before the LM loads) → the manifest

Of several harvesters that start at once in one folder one tokenises, and the others wait for it; where it dies,
another begins anew.

Dimension letters: T context.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from routesae import __version__
from routesae.harvest.cache import arrays
from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import SETTINGS, Manifest, token_bytes
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.storage import is_url
from routesae.harvest.cache.writer import STAGED_TOKENS, TOKENS, begin_cache, is_uncommitted, partial_folder
from routesae.harvest.corpus.packing import write_tokens
from routesae.harvest.corpus.tokens import tokenizer_hash
from routesae.harvest.filling.staging import STAGED_SHARDS, stage_of, staging_folder
from routesae.harvest.lm import model as lm
from routesae.harvest.settings import HarvestSettings, parse_layers
from routesae.machine.lock import Lock
from routesae.reporting import Progress, Report, WrongInput, human_bytes

log = logging.getLogger(__name__)

DISK_RESERVE = 1.01  # indexes, metadata and the file system's own rounding
POLL_SECONDS = 0.5  # between looks at what another harvester does


def open_or_begin(settings: HarvestSettings, config: Any, lm_dtype: str, claims: Claims, report: Report) -> Cache:
    """The cache `settings.out`; where it is none yet, begun here or by whoever has claimed that.

    Raises WrongInput where it was begun with other settings, or the corpus cannot be used.
    """
    path = staging_folder(settings)
    stage, waiting = stage_of(settings), False
    while not is_begun(path):
        if path.exists() and not (path.is_dir() and is_uncommitted(path)) and not is_begun(path):
            raise WrongInput(f"--out {path} exists and is not a routesae cache; give a new folder")
        made_folder = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            claim = claims.take(TOKENS)
        except FileNotFoundError:  # another harvester gave up, and took the empty folder with it
            continue
        if claim is None:
            if not waiting:
                log.info("%s tokenises; waiting for it", claims.owner(TOKENS) or "another harvester")
            waiting = True
            _report_other(path, settings, report)
            time.sleep(POLL_SECONDS)
            continue
        try:
            if not is_begun(path) and not (stage is not None and stage.fetch_root()):
                _begin(settings, config, lm_dtype, claim, report)
        except OSError:
            if claim.held() or not path.exists():
                raise
            log.info("another harvester took the tokenising over while this process was suspended")
        finally:
            claim.release()
            if made_folder:
                with suppress(OSError):  # another harvester is in it, or it is a cache now
                    path.rmdir()
    cache = Cache(path)
    refuse_other_settings(cache.manifest, settings, config, lm_dtype)
    return cache


def is_begun(path: Path) -> bool:
    return (path / "zarr.json").exists()


def _report_other(path: Path, settings: HarvestSettings, report: Report) -> None:
    """How far another harvester's tokenising has come, by the size of its file."""
    for folder in path.glob(STAGED_TOKENS):
        with suppress(OSError):
            done = arrays.data_file(folder / TOKENS, 2).stat().st_size // 4
            report(Progress("tokenise elsewhere", min(done, settings.tokens), settings.tokens, "tokens", {}))


def _begin(settings: HarvestSettings, config: Any, lm_dtype: str, claim: Lock, report: Report) -> None:
    """Tokenise and pack the corpus, and make a cache of it and the manifest."""
    path = staging_folder(settings)
    layers = _checked_layers(settings, config)
    revision = getattr(config, "_commit_hash", None)
    tokenizer = lm.load_tokenizer(settings.model, revision)
    for left in path.glob(STAGED_TOKENS):  # of those that died: the claim is ours
        shutil.rmtree(left, ignore_errors=True)
    prepared = partial_folder(path, TOKENS)
    try:
        facts = write_tokens(prepared, settings, tokenizer, report)
        manifest = Manifest(
            model=settings.model,
            revision=revision,
            config_hash=lm.config_hash(config),
            tokenizer_hash=tokenizer_hash(tokenizer),
            lm_dtype=lm_dtype,
            model_layers=lm.model_layers(config),
            layers=layers,
            width=int(config.get_text_config().hidden_size),
            versions={"routesae": __version__, **{p: version(p) for p in ("torch", "transformers", "zarr")}},
            **_shared_settings(settings),
            **facts,
        )
        require_disk(path, manifest, manifest.shard_count, settings)
        if claim.held():  # else another took over, while this process was suspended
            begin_cache(path, manifest, prepared)
    finally:
        shutil.rmtree(prepared, ignore_errors=True)


def _checked_layers(settings: HarvestSettings, config: Any) -> tuple[int, ...]:
    """The layers asked for, once layers and context are known to fit the model; logs what a token will take."""
    layers = parse_layers(settings.layers, lm.model_layers(config))
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
    return layers


def _shared_settings(settings: HarvestSettings) -> dict[str, Any]:
    """The manifest's fields that are settings: what a resumed run must agree on."""
    rows = max(1, settings.shard_tokens // settings.context)
    return {"shard_rows": rows, **{field: getattr(settings, name) for field, name in SETTINGS.items()}}


def refuse_other_settings(manifest: Manifest, settings: HarvestSettings, config: Any, lm_dtype: str) -> None:
    """Raises WrongInput, naming each setting that differs from those the cache was begun with."""
    asked = {
        "model": settings.model,
        "layers": parse_layers(settings.layers, lm.model_layers(config)),
        "config_hash": lm.config_hash(config),
        "lm_dtype": lm_dtype,
        **_shared_settings(settings),
    }
    differing = [
        f"{SETTINGS.get(name, name)} is {getattr(manifest, name)}, not {value}"
        for name, value in asked.items()
        if getattr(manifest, name) != value
    ]
    if differing:
        raise WrongInput(
            f"{settings.out} was begun with other settings: {'; '.join(differing)}. "
            "Give the settings it was begun with, or another --out"
        )


def bytes_of(manifest: Manifest, shards: int) -> int:
    """What so many of its shards take on disk, about."""
    return int(manifest.kept_tokens * manifest.token_bytes * shards / manifest.shard_count * DISK_RESERVE)


def require_disk(
    path: Path, manifest: Manifest, shards: int, settings: HarvestSettings, *, begun_bytes: int = 0
) -> None:
    """Raises WrongInput where the disk of `path` has not got what `shards` more shards take there.

    begun_bytes: that of it which is there already.
    """
    if is_url(settings.out):
        log.info("the shards will take %s at %s", human_bytes(bytes_of(manifest, shards)), settings.out)
        shards = min(shards, STAGED_SHARDS)
    needed, free = bytes_of(manifest, shards) - begun_bytes, shutil.disk_usage(path).free
    log.info("the shards will take %s; %s is free at %s", human_bytes(needed), human_bytes(free), path)
    if needed > free:
        raise WrongInput(
            f"the shards need {human_bytes(needed)}, but {path} has {human_bytes(free)} free; "
            f"ask for fewer than {settings.tokens:,} --tokens, fewer --layers, or another --out"
        )
