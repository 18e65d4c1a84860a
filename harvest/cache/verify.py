"""A cache in; every problem it has, and one digest of what it holds, out; bad shards taken away.

The digest is SHA-256 over what a cache's numbers are and mean, as one line of JSON:

    the fields of the manifest in CONTENT     not where model and corpus were found, which versions ran, or --compress
    tokens, document_starts                   xxh3-64 of the values read, no matter what is recorded
    every shard that is there, by index       its index, and xxh3-64 of the values read of each of its arrays but
                                              chunk_hashes, which says the same again and older caches have not

So it does not depend on how many workers wrote the cache, in how many goes or on which machine, and differs where a
bit or a shard does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from routesae.harvest.cache.arrays import CHECKSUM_DIFFERS, CHUNK_ROWS, BadArray, ChunkHashes, array_hash, fsync
from routesae.harvest.cache.manifest import CHUNK_HASHES, hashed_arrays, kept_flat, shard_arrays, shard_name
from routesae.harvest.cache.reader import Cache, Shard, statistics_problem
from routesae.harvest.cache.store.folder import RemoteFolder
from routesae.reporting import FailedRun, Progress, Report, WrongInput, silent

log = logging.getLogger(__name__)

CONTENT = (
    "format_version",
    "config_hash",
    "tokenizer_hash",
    "lm_dtype",
    "model_layers",
    "layers",
    "width",
    "context",
    "rows",
    "shard_rows",
    "kept_tokens",
    "dtype",
    "seed",
    "corpus_fingerprint",
    "documents",
    "special_ids",
    "keep_special",
    "skip_positions",
)
Hashes = dict[str, str | None]  # by name of an array; None: it cannot be read


class Verified(NamedTuple):
    """problems: a line each, none where the cache is whole. digest: of what could be read."""

    problems: list[str]
    digest: str


class Repaired(NamedTuple):
    """problems: a line each. removed: the shards taken away for them. missing: how many are not there now."""

    problems: list[str]
    removed: list[str]
    missing: int


def verify(path: str, report: Report = silent) -> list[str]:
    """Every problem of the cache, a line each; none where it is whole. Reads all of it."""
    return examine(path, report).problems


def examine(path: str, report: Report = silent) -> Verified:
    """Problems and digest. Reads all of the cache. Raises WrongInput where `path` is none."""
    cache = Cache(path)
    problems, root = verify_root(cache)
    shards = []
    for index in range(cache.manifest.shard_count):
        if _exists(cache, index):
            found, hashes = verify_shard(cache, index)
            problems += found
            shards.append((index, {name: of for name, of in hashes.items() if name != CHUNK_HASHES}))
        else:
            problems.append(f"{shard_name(index)}: missing")
        report(Progress("verify", index + 1, cache.manifest.shard_count, "shards", {}))
    manifest = cache.manifest.to_dict()
    content = {"manifest": {name: manifest[name] for name in CONTENT}, "root": root, "shards": shards}
    return Verified(problems, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


def repair(path: str, report: Report = silent) -> Repaired:
    """Takes away every shard that has a problem, so that harvest writes just those again, and nothing else.

    Raises WrongInput where `path` is no cache, FailedRun where its tokens are damaged: no shard can be judged then.
    """
    cache = Cache(path)
    for left in cache.folder.glob(".shard-*.damaged"):  # of a repair that was killed
        _delete(left)
    if problems := verify_root(cache)[0]:
        raise FailedRun(f"{path}: {'; '.join(problems)}. Only harvesting anew, into a new folder, mends that")
    removed = []
    for index in range(cache.manifest.shard_count):
        if _exists(cache, index) and (found := verify_shard(cache, index)[0]):
            problems += found
            for problem in found:
                log.warning("%s", problem)
            _remove(cache.folder, shard_name(index))
            removed.append(shard_name(index))
        report(Progress("repair", index + 1, cache.manifest.shard_count, "shards", {}))
    return Repaired(problems, removed, len(cache.missing()))


def require_intact(cache: Cache, report: Report = silent) -> None:
    """Raises WrongInput naming the first thing whose checksum differs. Reads all of the cache."""
    problems = verify_root(cache)[0]
    for index in range(cache.manifest.shard_count):
        if problems := problems or verify_shard(cache, index)[0]:
            raise WrongInput(
                f"{cache.path}: {problems[0]}; `routesae cache repair` removes bad shards, and the same routesae "
                "harvest then writes those again"
            )
        report(Progress("verify", index + 1, cache.manifest.shard_count, "shards", {}))


def _exists(cache: Cache, index: int) -> bool:
    """Whether something has the shard's name, be it a folder, a file or a link that leads nowhere."""
    if isinstance(cache.path, RemoteFolder):
        return cache.has_shard(index)
    path = cache.path / shard_name(index)
    return path.exists() or path.is_symlink()


def _remove(cache: Path, name: str) -> None:
    """Take a shard out of the cache at once, then delete it; of a link, the link alone."""
    path, aside = cache / name, cache / f".{name}.damaged"
    path.rename(aside)
    fsync(cache)
    _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def verify_root(cache: Cache) -> tuple[list[str], Hashes]:
    """What is wrong with tokens and document_starts, a line each; and the hash of what each really holds."""
    problems = []
    hashes: Hashes = {"tokens": None, "document_starts": None}
    try:
        hashes["tokens"] = array_hash(cache.tokens())
        if hashes["tokens"] != cache.manifest.tokens_hash:
            problems.append(f"tokens: {CHECKSUM_DIFFERS}")
    except WrongInput as bad:
        problems.append(f"tokens: {bad}")
    try:
        starts = cache.document_starts()
        hashes["document_starts"] = array_hash(starts)
        if not (np.diff(starts) > 0).all():
            problems.append("document_starts: not ascending")
    except WrongInput as bad:
        problems.append(f"document_starts: {bad}")
    return problems, hashes


def verify_shard(cache: Cache, index: int) -> tuple[list[str], Hashes]:
    """Everything wrong with one shard, a line each: sizes, indexes, checksums, order, tokens; and its hashes."""
    name = shard_name(index)
    try:
        shard = cache.shard(index)
    except BadArray as bad:
        return [f"{name}: {bad}"], {}
    problems, hashes = hash_shard(shard)
    if wrong := statistics_problem(shard):
        problems.append(f"zarr.json: {wrong}")
    if problems:
        return [f"{name}/{problem}" for problem in problems], hashes
    token_ids_sT = shard.read("token_ids")
    first, after = shard.record.rows
    try:
        if not np.array_equal(token_ids_sT, cache.tokens()[first:after]):
            problems.append(f"{name}/token_ids: not rows {first} to {after - 1} of tokens")
    except WrongInput:
        pass  # tokens itself cannot be read, which verify_root says
    if not np.array_equal(np.sort(shard.read("order")), kept_flat(token_ids_sT, cache.manifest)):
        problems.append(f"{name}/order: not a permutation of the kept positions")
    return problems, hashes


def hash_shard(shard: Shard) -> tuple[list[str], Hashes]:
    """The hash of what each array of the shard really holds, and where it is not the one recorded, a line each."""
    problems = []
    hashes: Hashes = {}
    chunks: dict[str, ChunkHashes] = {}
    for name in shard_arrays(shard.manifest):
        try:
            hashes[name], chunks[name] = shard.hashes(name)
            if hashes[name] != shard.record.hashes[name]:
                problems.append(f"{name}: {CHECKSUM_DIFFERS}")
        except (BadArray, OSError, ValueError) as bad:
            hashes[name] = None
            problems.append(f"{name}: {bad}")
    if shard.manifest.chunk_hashes and not problems:
        problems = _wrong_chunk_hashes(shard, chunks)
    return problems, hashes


def _wrong_chunk_hashes(shard: Shard, chunks: dict[str, ChunkHashes]) -> list[str]:
    """Where chunk_hashes, itself as recorded, is not of the shard's arrays: a trainer would refuse those rows."""
    stored_CA = shard.read(CHUNK_HASHES)
    problems = []
    for column, name in enumerate(hashed_arrays(shard.manifest)):
        if len(wrong := np.flatnonzero(stored_CA[:, column] != chunks[name])):
            problems.append(f"{CHUNK_HASHES}: not those of {name}, from row {wrong[0] * CHUNK_ROWS} on")
    return problems
