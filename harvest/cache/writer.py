"""Writes a cache onto a disk: its root first, then shard by shard, each whole or absent (layout: cache/reader.py)."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import (
    CHUNK_HASHES,
    FORMULA,
    Manifest,
    ShardRecord,
    hashed_arrays,
    shard_name,
)

log = logging.getLogger(__name__)

TOKENS = "tokens"
STAGED_MANIFEST, STAGED_TOKENS = ".manifest", ".tokens*.partial"  # the second a pattern: each harvester has its own


def partial_folder(path: Path, name: str) -> Path:
    """Make a new folder below `path` to write `name` in, which no other process has: two may be writing the same."""
    folder = path / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    folder.mkdir()
    return folder


def begin_cache(path: Path, manifest: Manifest, prepared: Path) -> None:
    """Make `path` a cache: move the arrays below `prepared` into it, then the manifest, last.

    The manifest is staged first, so that what a kill leaves behind can be told from a stranger's folder.
    """
    staging = path / STAGED_MANIFEST
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    arrays.write_group(staging, manifest.to_dict())
    for array in sorted(prepared.iterdir()):
        shutil.rmtree(path / array.name, ignore_errors=True)
        array.rename(path / array.name)
    prepared.rmdir()
    arrays.fsync_tree(path)
    (staging / "zarr.json").rename(path / "zarr.json")
    staging.rmdir()
    arrays.fsync(path)


def is_uncommitted(path: Path) -> bool:
    """Whether the folder holds nothing but what a run killed before its manifest was in place can leave."""
    names = {entry.name for entry in path.iterdir()}
    moved = ["tokens", "document_starts"] if STAGED_MANIFEST in names else []
    known = [STAGED_MANIFEST, STAGED_TOKENS, f".{TOKENS}.claim*", *moved]
    return all(any(fnmatch(name, pattern) for pattern in known) for name in names)


def write_shard(
    path: Path,
    manifest: Manifest,
    index: int,
    values: Iterable[tuple[str, arrays.Array]],
    record: Callable[[Mapping[str, str]], ShardRecord],
) -> ShardRecord:
    """Write shard `index` and commit it by a rename; a kill at any moment leaves a whole shard or none.

    Where another harvester has committed the same shard meanwhile, that one stays.

    values: every array of the shard but chunk_hashes, by name, each taken when it is its turn.
    record: makes the shard's attributes once the hashes are known.
    """
    partial = partial_folder(path, shard_name(index))
    try:
        written = record(_write_arrays(partial, manifest, values))
        # The group's own zarr.json comes last: until then no zarr reader takes the dot-folder for a group.
        arrays.write_group(partial, written.to_dict())
        for name in written.hashes:  # a folder deleted under the writer is made anew by the next array
            (partial / name / "zarr.json").stat()
        arrays.fsync_tree(partial)
        commit_shard(partial, path / shard_name(index))
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a disk that is full gets back what did not fit
    arrays.fsync(path)
    return written


def commit_shard(partial: Path, shard: Path) -> None:
    """Rename a finished dot-folder to the shard; where another was quicker, that one stays."""
    try:
        partial.rename(shard)
    except OSError:
        if not shard.is_dir():
            raise
        log.info("%s is there already, by another harvester", shard)


def _write_arrays(partial: Path, manifest: Manifest, values: Iterable[tuple[str, arrays.Array]]) -> dict[str, str]:
    """Write the arrays into a shard's dot-folder, each while the last reaches the disk; returns their hashes."""
    chunks: dict[str, arrays.ChunkHashes] = {}
    by_row = hashed_arrays(manifest)
    with arrays.syncing() as sync:

        def write(name: str, array: arrays.Array, attributes: Mapping[str, Any]) -> None:
            folder = partial / name
            # What is read at once is one chunk.
            chunk_rows = arrays.CHUNK_ROWS if name in by_row else max(1, len(array))
            arrays.write_array(folder, array, chunk_rows=chunk_rows, attributes=attributes)
            sync(arrays.data_file(folder, array.ndim))
            chunks[name] = arrays.chunk_hashes(array)

        for name, array in values:
            write(name, array, {"hidden_state": FORMULA} if array.dtype == np.int8 else {})
        columns = np.stack([chunks[name] for name in by_row], axis=1)
        write(CHUNK_HASHES, columns, {"columns": by_row})
    return {name: arrays.hash_of(of) for name, of in chunks.items()}


def remove_partial_shards(path: Path, is_claimed: Callable[[str], bool]) -> None:
    """Delete what killed harvesters left under dot-names, and nothing of one that lives.

    is_claimed: whether a harvester that lives has a claim on a name such as "shard-00003".
    """
    for partial in list(path.glob(".shard-*.partial")):  # listed first: whoever made one had claimed it by then
        if not is_claimed(partial.name[1:].partition(".")[0]):
            shutil.rmtree(partial, ignore_errors=True)
