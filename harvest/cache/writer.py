"""Writes a cache onto a disk: its root first, then shard by shard, each whole or absent (layout: cache/reader.py).

What is being written lies in a dot-folder of a random name, one level down, so that Zarr readers of the cache do not
see it:

    shards/.shard-00003.8f2c….partial/shard-00003/
"""

import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from routesae.harvest.cache import arrays
from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import (
    CHUNK_HASHES,
    FOLLOWERS,
    FORMULA,
    ROLES,
    STARTS,
    TOKENS,
    Manifest,
    ShardRecord,
    hashed_arrays,
    shard_name,
)

log = logging.getLogger(__name__)

ROOT_ARRAYS = (TOKENS, ROLES, STARTS)
STAGED_TOKENS = f".{TOKENS}.*.partial"


@contextmanager
def staging(path: Path, name: str) -> Iterator[Path]:
    """A new folder `name` to write in, which no other process has. What is left of it at the end is deleted."""
    outer = path / f".{name}.{secrets.token_hex(8)}.partial"
    outer.mkdir()
    try:
        (inner := outer / name).mkdir()
        yield inner
    finally:
        shutil.rmtree(outer, ignore_errors=True)  # a disk that is full gets back what did not fit


def begin_cache(path: Path, manifest: Manifest, prepared: Path) -> None:
    """Make `path` a cache: move the root's arrays, which lie in the staged folder `prepared`, into it, then the
    manifest. What a kill leaves behind can be told from a stranger's folder by what is staged beside it."""
    arrays.write_group(prepared, manifest.to_dict())
    arrays.fsync_tree(prepared)
    for name in ROOT_ARRAYS:
        shutil.rmtree(path / name, ignore_errors=True)
        (prepared / name).rename(path / name)
    arrays.fsync(path)
    (prepared / "zarr.json").rename(path / "zarr.json")
    arrays.fsync(path)


def is_uncommitted(path: Path) -> bool:
    """Whether the folder holds nothing but what a run killed before its manifest was in place can leave."""
    names = {entry.name for entry in path.iterdir()}
    staged = {name for name in names if fnmatch(name, STAGED_TOKENS)}
    moved = (*ROOT_ARRAYS, FOLLOWERS) if staged else ()
    return all(name in moved or fnmatch(name, f".{TOKENS}.claim*") for name in names - staged)


@contextmanager
def writing_shard(path: Path, name: str) -> Iterator[Path]:
    """A folder to write shard `name` in, which is committed by a rename when the block ends: a kill at any moment
    leaves a whole shard or none. Where another harvester was quicker, its shard stays."""
    with staging(path, name) as partial:
        yield partial
        arrays.fsync_tree(partial)
        try:
            partial.rename(path / name)
        except OSError:
            if not (path / name).is_dir():
                raise
            log.info("%s is there already, by another harvester", path / name)
    arrays.fsync(path)


def write_shard(
    path: Path,
    manifest: Manifest,
    index: int,
    values: Iterable[tuple[str, arrays.Array]],
    record: Callable[[Mapping[str, str]], ShardRecord],
) -> ShardRecord:
    """Write shard `index`.

    values: every array of the shard but chunk_hashes, by name. One is taken when the one arrays.WRITERS before it is
    written, so that its memory may be used again.
    record: makes the shard's attributes once the hashes are known.
    """
    with writing_shard(path, shard_name(index)) as partial:
        written = record(_write_arrays(partial, manifest, values))
        arrays.write_group(partial, written.to_dict())
        for name in written.hashes:  # somebody may be deleting the folder under the writer
            (partial / name / "zarr.json").stat()
    return written


def _write_arrays(partial: Path, manifest: Manifest, values: Iterable[tuple[str, arrays.Array]]) -> dict[str, str]:
    """Write the arrays into a shard's folder, arrays.WRITERS at once; return their hashes."""
    by_row = hashed_arrays(manifest)

    def write(name: str, array: arrays.Array, attributes: Mapping[str, Any]) -> arrays.ChunkHashes:
        folder = partial / name
        # What is read at once is one chunk.
        chunk_rows = arrays.CHUNK_ROWS if name in by_row else max(1, len(array))
        arrays.write_array(folder, array, chunk_rows=chunk_rows, attributes=attributes)
        arrays.fsync(arrays.data_file(folder, array.ndim))  # while others are written
        return arrays.chunk_hashes(array)

    with ThreadPoolExecutor(arrays.WRITERS, thread_name_prefix="array-writer") as threads:
        written: dict[str, Future[arrays.ChunkHashes]] = {}
        for name, array in values:
            attributes = {"hidden_state": FORMULA} if array.dtype == np.int8 else {}
            written[name] = threads.submit(write, name, array, attributes)
            if len(written) >= arrays.WRITERS:
                list(written.values())[-arrays.WRITERS].result()
        chunks = {name: one.result() for name, one in written.items()}
    columns = np.stack([chunks[name] for name in by_row], axis=1)
    chunks[CHUNK_HASHES] = write(CHUNK_HASHES, columns, {"columns": by_row})
    return {name: arrays.hash_of(of) for name, of in chunks.items()}


def remove_partial_shards(path: Path, claims: Claims) -> None:
    """Delete what killed harvesters left under dot-names, and nothing of one that lives and has claimed its shard."""
    for partial in list(path.glob(".shard-*.partial")):  # listed first: whoever made one had claimed it by then
        if claims.owner(partial.name[1:].partition(".")[0]) is None:
            shutil.rmtree(partial, ignore_errors=True)
