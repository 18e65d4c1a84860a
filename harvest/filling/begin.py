"""Open a cache to write shards into; if there is none yet, tokenise the corpus and begin it.

    documents → tokens/ (all of them, before the LM loads) → the manifest

Of several harvesters that start at once in one folder one tokenises and the others wait for it. If it dies, another
begins anew.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from routesae import __version__
from routesae.harvest.cache import arrays
from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import FOLLOWERS, SETTINGS, TOKENS, Manifest, RingState, token_bytes
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.ring import require_room, write_state
from routesae.harvest.cache.store.disk import folder_bytes
from routesae.harvest.cache.writer import STAGED_TOKENS, begin_cache, is_uncommitted, staging
from routesae.harvest.corpus.packing import write_tokens
from routesae.harvest.corpus.texts import require_read
from routesae.harvest.corpus.tokens import tokenizer_hash
from routesae.harvest.filling.output import STAGED_SHARDS, Output
from routesae.harvest.lm import model as lm
from routesae.harvest.settings import HarvestSettings, layer_list, parse_layers
from routesae.machine.lock import Lock
from routesae.reporting import Progress, Report, WrongInput, human_bytes

log = logging.getLogger(__name__)

Prove = Callable[[Any, Sequence[int]], dict[str, Any]]
"""Tries the LM out with a tokenizer at some layers; returns the manifest's fields about what it is."""

POLL_SECONDS = 0.5  # between looks at what another harvester does


def open_or_begin(
    output: Output,
    settings: HarvestSettings,
    config: Any,
    lm_dtype: str,
    claims: Claims,
    report: Report,
    prove: Prove,
) -> Cache:
    """The cache in `output.folder`, begun here or by another harvester if it is new.

    Raises WrongInput if it was begun with other settings, or the model or corpus cannot be used.
    """
    path, is_waiting = output.folder, False
    # The manifest's fields that the settings decide: a new cache is begun with them, an old one compared with them.
    fields = {
        "model": settings.model,
        "layers": parse_layers(settings.layers, lm.model_layers(config)),
        "config_hash": lm.config_hash(config),
        "lm_dtype": lm_dtype,
        "shard_rows": max(1, settings.shard_tokens // settings.context),
        **{field: getattr(settings, name) for field, name in SETTINGS.items()},
    }
    while not output.is_begun():
        if path.exists() and not (path.is_dir() and is_uncommitted(path)) and not output.is_begun():
            raise WrongInput(f"--out {path} exists and is not a routesae cache; give a new folder")
        made_folder = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            claim = claims.take(TOKENS)
        except FileNotFoundError:  # another harvester gave up, and took the empty folder with it
            continue
        if claim is None:
            if not is_waiting:
                log.info("%s tokenises; waiting for it", claims.owner(TOKENS) or "another harvester")
            is_waiting = True
            for folder in path.glob(STAGED_TOKENS):  # how far the other has come, by the size of its file
                with suppress(OSError):
                    done = arrays.data_file(folder / TOKENS / TOKENS, 2).stat().st_size // 4
                    report(Progress("tokenise elsewhere", min(done, settings.tokens), settings.tokens, "tokens", {}))
            time.sleep(POLL_SECONDS)
            continue
        try:
            if not output.is_begun() and not output.fetch_tokens():
                _begin(output, fields, settings, config, claim, report, prove)
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
    names = {**SETTINGS, "shard_rows": "rows of a shard (--shard-tokens / --context)"}
    if differing := [name for name, value in fields.items() if getattr(cache.manifest, name) != value]:
        changes = (f"{names.get(n, n)} is {getattr(cache.manifest, n)}, not {fields[n]}" for n in differing)
        raise WrongInput(
            f"{output.out} was begun with other settings: {'; '.join(changes)}. "
            "Give the settings it was begun with, or another --out"
        )
    return output.opened(cache)


def _begin(
    output: Output,
    fields: dict[str, Any],
    settings: HarvestSettings,
    config: Any,
    claim: Lock,
    report: Report,
    prove: Prove,
) -> None:
    """Tokenise and pack the corpus, and make a cache of it and the manifest."""
    width, layers = int(config.get_text_config().hidden_size), fields["layers"]
    a_token = token_bytes(len(layers), width, settings.dtype)
    log.info(
        f"layers {layer_list(layers)} ({len(layers)} x {width} x {settings.dtype}): {human_bytes(a_token)} a "
        f"token, up to {human_bytes(a_token * settings.tokens)} for {settings.tokens:,} tokens"
    )
    if settings.keep is not None and not settings.keep_roles:  # a corpus that a ring is for takes hours to tokenise
        context, rows = settings.context, settings.tokens // settings.context
        shard = fields["shard_rows"] * (context - settings.skip_positions) * a_token
        require_room(settings.keep, shard, int(rows * settings.held_out) // fields["shard_rows"])
    revision = getattr(config, "_commit_hash", None)
    tokenizer = lm.load_tokenizer(settings.model, revision)
    require_read(settings)  # before the LM is loaded
    proved = prove(tokenizer, layers)
    for left in output.folder.glob(STAGED_TOKENS):  # of harvesters that died: the claim is ours
        shutil.rmtree(left, ignore_errors=True)
    with staging(output.folder, TOKENS) as prepared:
        manifest = Manifest(
            **fields,
            **proved,
            **write_tokens(prepared, settings, tokenizer, report),
            revision=revision,
            tokenizer_hash=tokenizer_hash(tokenizer),
            model_layers=lm.model_layers(config),
            width=width,
            versions={"routesae": __version__, **{p: version(p) for p in ("torch", "transformers")}},
        )
        shards = manifest.shard_count
        if settings.keep is not None:
            shards = min(shards, settings.keep // max(1, manifest.shard_bytes))
        require_disk(output, manifest, shards)
        if claim.held():  # else another took over, while this process was suspended
            shutil.rmtree(output.folder / FOLLOWERS, ignore_errors=True)
            if settings.keep is not None:  # before the manifest, so that no trainer takes it for a cache that stays
                write_state(output.folder, manifest, RingState(keep=settings.keep))
            begin_cache(output.folder, manifest, prepared)


def require_disk(output: Output, manifest: Manifest, shards: int) -> None:
    """Raises WrongInput if the disk has no room for `shards` more shards, less what others have written of them."""
    if output.store is not None:
        log.info("the shards will take %s at %s", human_bytes(shards * manifest.shard_bytes), output.out)
        shards = min(shards, STAGED_SHARDS)
    needed, free = shards * manifest.shard_bytes, shutil.disk_usage(output.folder).free
    needed -= sum(map(folder_bytes, output.folder.glob(".shard-*.partial")))
    log.info("the shards will take %s; %s is free at %s", human_bytes(needed), human_bytes(free), output.folder)
    if needed > free:
        raise WrongInput(
            f"the shards need {human_bytes(needed)}, but {output.folder} has {human_bytes(free)} free; "
            f"ask for fewer than {manifest.tokens_asked:,} --tokens, fewer --layers, or another --out"
        )
