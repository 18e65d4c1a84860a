"""Proves a cache whole: every problem it has, and one digest of what it holds; `repair` removes bad shards.

The digest is SHA-256 over what a cache's numbers are and mean, as one line of JSON:

    the fields of the manifest in CONTENT     not where model and corpus were found, nor which versions ran
    tokens, roles, document_starts            the hash of the values read, no matter what is recorded
    every shard that is there, by index       its index, and the hash of the values read of each of its arrays but
                                              chunk_hashes, which says the same again

So it does not depend on how many workers wrote the cache, in how many runs or on which machine, and it differs where
a bit or a shard does.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from routesae.harvest.cache.arrays import CHECKSUM_DIFFERS, CHUNK_ROWS, BadArray, ChunkHashes, fsync, hash_of
from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import CHUNK_HASHES, DOCUMENTS, STARTS, Manifest, hashed_arrays, shard_name
from routesae.harvest.cache.reader import Cache, Shard, documents_bytes, root_array
from routesae.harvest.cache.storage import Storage, StoredArray, chunk_hashes
from routesae.harvest.cache.writer import remove_partial_shards, staging
from routesae.reporting import FailedRun, Progress, Report, WrongInput, silent

log = logging.getLogger(__name__)

CONTENT = (
    *("format_version", "config_hash", "tokenizer_hash", "lm_dtype", "model_layers", "layers", "width", "context"),
    *("rows", "shard_rows", "kept_tokens", "dtype", "seed", "corpus_fingerprint", "documents", "held_out"),
    *("special_ids", "roles", "keep_roles", "keep_special", "skip_positions"),
)
Hashes = dict[str, str | None]  # by name of an array; None: it cannot be read


class Verified(NamedTuple):
    """problems: a line each, none where the cache is whole. digest: of what could be read."""

    problems: list[str]
    digest: str


class Repaired(NamedTuple):
    """removed: the shards that had a problem. missing: how many shards are missing now."""

    removed: list[str]
    missing: int


def verify(path: str | Path, report: Report = silent) -> Verified:
    """Problems and digest. Reads all of the cache. Raises WrongInput where `path` is not a cache."""
    cache = Cache(path)
    problems, root = verify_root(cache.storage, cache.manifest)
    shards = []
    for index, shard_problems, hashes in _verified(cache, "verify", report):
        problems += shard_problems
        if cache.has_shard(index):
            shards.append((index, {name: of for name, of in hashes.items() if name != CHUNK_HASHES}))
    manifest = cache.manifest.to_dict()
    content = {"manifest": {name: manifest[name] for name in CONTENT}, "root": root, "shards": shards}
    return Verified(problems, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


def repair(path: str, report: Report = silent) -> Repaired:
    """Remove every shard that has a problem, so that harvest writes just those again, and nothing else.

    Raises WrongInput where `path` is no cache, FailedRun where its tokens are damaged: no shard can be judged then.
    """
    cache = Cache(path)
    folder, removed = cache.folder, []
    remove_partial_shards(folder, Claims(folder))  # also what a repair that was killed had put aside
    if problems := verify_root(cache.storage, cache.manifest)[0]:
        raise FailedRun(f"{path}: {'; '.join(problems)}. It cannot be repaired; harvest it again, into a new folder")
    for index, shard_problems, _ in _verified(cache, "repair", report):
        if shard_problems and cache.has_shard(index):
            for problem in shard_problems:
                log.warning("%s", problem)
            name = shard_name(index)
            with staging(folder, name) as aside:  # out of the cache at once, then deleted; of a link, the link alone
                (folder / name).rename(aside / name)
                fsync(folder)
            removed.append(name)
    return Repaired(removed, len(cache.missing()))


def require_intact(cache: Cache, report: Report = silent) -> None:
    """Raises WrongInput naming the first thing whose checksum differs. Reads all of the cache."""
    if problems := verify(cache.path, report).problems:
        raise WrongInput(
            f"{cache.path}: {problems[0]}; `routesae cache repair` removes bad shards, and the same routesae "
            "harvest then writes those again"
        )


def _verified(cache: Cache, stage: str, report: Report) -> Iterator[tuple[int, list[str], Hashes]]:
    """Index, problems and hashes of every shard but those that a ring has deleted, perhaps just now."""
    for index in range(cache.manifest.shard_count):
        missing = [f"{shard_name(index)}: missing"], Hashes()
        problems, hashes = verify_shard(cache, index) if cache.has_shard(index) else missing
        if not (problems and (ring := cache.ring()) and index < ring.used):
            yield index, problems, hashes
        report(Progress(stage, index + 1, cache.manifest.shard_count, "shards", {}))


def verify_root(storage: Storage, manifest: Manifest) -> tuple[list[str], Hashes]:
    """What is wrong with the root's arrays and documents.parquet, a line each, and the hash of what each array really
    holds."""
    problems, hashes, _ = _compared(manifest.root_hashes, lambda name: root_array(storage, manifest, name))
    try:
        if hashes[STARTS] is not None:  # else their folder is not whole
            documents_bytes(storage, manifest)
    except (BadArray, FileNotFoundError) as bad:
        problems.append(f"{DOCUMENTS}: {bad}")
    if not problems and not (np.diff(root_array(storage, manifest, "document_starts").whole()) > 0).all():
        problems.append("document_starts: not ascending")
    return problems, hashes


def verify_shard(cache: Cache, index: int) -> tuple[list[str], Hashes]:
    """What is wrong with one shard (sizes, indexes, checksums, order, tokens), a line each; its arrays' hashes."""
    name = shard_name(index)
    try:
        shard = cache.shard(index)
    except BadArray as bad:
        return [f"{name}: {bad}"], {}
    problems, hashes = hash_shard(shard)
    if problems:
        return [f"{name}/{problem}" for problem in problems], hashes
    first, after = shard.record.rows
    try:
        if not np.array_equal(shard.read("token_ids"), cache.tokens()[first:after]):
            problems.append(f"{name}/token_ids: not rows {first} to {after - 1} of tokens")
        if not np.array_equal(np.sort(shard.read("order")), np.flatnonzero(cache.kept(first, after))):
            problems.append(f"{name}/order: not a permutation of the kept positions")
    except WrongInput:
        pass  # tokens or roles cannot be read, which verify_root says
    return problems, hashes


def hash_shard(shard: Shard) -> tuple[list[str], Hashes]:
    """The hash of what each array of the shard really holds, and a line for each that is not what was recorded."""
    problems, hashes, chunks = _compared(shard.record.hashes, shard.array)
    if not problems:  # a trainer would refuse rows that chunk_hashes, itself as recorded, does not agree with
        stored_CA = shard.read(CHUNK_HASHES)
        for column, name in enumerate(hashed_arrays(shard.manifest)):
            if len(wrong := np.flatnonzero(stored_CA[:, column] != chunks[name])):
                problems.append(f"{CHUNK_HASHES}: not those of {name}, from row {wrong[0] * CHUNK_ROWS} on")
    return problems, hashes


def _compared(
    recorded: Mapping[str, str], array: Callable[[str], StoredArray]
) -> tuple[list[str], Hashes, dict[str, ChunkHashes]]:
    """A line for each array that is not what was recorded, their hashes, and those of their chunks."""
    problems, hashes, chunks = list[str](), Hashes(), dict[str, ChunkHashes]()
    for name, expected in recorded.items():
        hashes[name] = None
        try:
            chunks[name] = chunk_hashes(array(name))
            hashes[name] = hash_of(chunks[name])
            if hashes[name] != expected:
                problems.append(f"{name}: {CHECKSUM_DIFFERS}")
        except (BadArray, OSError, ValueError) as bad:
            problems.append(f"{name}: {bad}")
    return problems, hashes, chunks
