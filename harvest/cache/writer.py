"""Puts a cache on disk: its root first, then shard by shard, each whole or absent (layout: cache/reader.py).

Dimension letters: T context, s rows of a shard, n kept positions of a shard, L layers, D width.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import (
    CHUNK_HASHES,
    Manifest,
    ShardRecord,
    hashed_arrays,
    layer_name,
    shard_name,
)
from routesae.harvest.corpus.tokens import Ids

log = logging.getLogger(__name__)

TOKENS = "tokens"
STAGED_MANIFEST, STAGED_TOKENS = ".manifest", ".tokens*.partial"  # the second a pattern: each harvester has its own


def partial_folder(path: Path, name: str) -> Path:
    """A new folder of this process's own below `path`, to make `name` in: two may be making the same."""
    folder = path / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    folder.mkdir()
    return folder


def begin_cache(path: Path, manifest: Manifest, prepared: Path) -> None:
    """Make `path` a cache: move the arrays below `prepared` into it, then the manifest, last.

    The manifest is staged first, so that what a kill leaves behind can be told from a stranger's folder.
    """
    import zarr

    staging = path / STAGED_MANIFEST
    shutil.rmtree(staging, ignore_errors=True)
    zarr.open_group(str(staging), mode="w", zarr_format=3, attributes=_plain(manifest.to_dict())).store.close()
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
    token_ids_sT: Ids,
    order: npt.NDArray[np.int32],
    hidden: Iterable[tuple[int, arrays.Array]],
    record: Callable[[Mapping[str, str]], ShardRecord],
    index: int,
    others: Callable[[], Mapping[str, arrays.Array]] | None = None,
) -> ShardRecord:
    """Write one shard and commit it by a rename; a kill at any moment leaves a whole shard or none.

    Where another harvester has committed the same shard meanwhile, that one stays.

    hidden: (layer, [n, D] in the cache's dtype, rows in `order`), each taken when it is its turn.
    record: makes the shard's attributes once the hashes are known.
    others: gives, once the layers are taken, the arrays that follow them by name; None has token_mean and token_std
        worked out here.
    """
    import zarr

    partial = partial_folder(path, shard_name(index))
    try:
        written = record(_write_arrays(partial, manifest, token_ids_sT, order, hidden, others))
        # The group's own zarr.json comes last: until then no zarr reader takes the dot-folder for a group.
        zarr.open_group(str(partial), mode="a", zarr_format=3, attributes=_plain(written.to_dict())).store.close()
        _require_arrays(partial, written.hashes)
        arrays.fsync_tree(partial)
        commit_shard(partial, path / shard_name(index))
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # a disk that is full gets back what did not fit
    arrays.fsync(path)
    return written


def _require_arrays(partial: Path, names: Iterable[str]) -> None:
    """A folder deleted under the writer is made anew by the next array, without those before."""
    for name in names:
        (partial / name / "zarr.json").stat()


def commit_shard(partial: Path, shard: Path) -> None:
    """Rename a finished dot-folder to the shard; where another was quicker, that one stays."""
    try:
        partial.rename(shard)
    except OSError:
        if not shard.is_dir():
            raise
        log.info("%s is there already, by another harvester", shard)


def _write_arrays(
    partial: Path,
    manifest: Manifest,
    token_ids_sT: Ids,
    order: npt.NDArray[np.int32],
    hidden: Iterable[tuple[int, arrays.Array]],
    others: Callable[[], Mapping[str, arrays.Array]] | None,
) -> dict[str, str]:
    """All arrays of a shard into its dot-folder; their hashes. One reaches the disk while the next is written."""
    # Both bring torch, which `cache info` and `--help` can do without.
    from routesae.harvest.cache.quantise import FORMULA
    from routesae.harvest.cache.statistics import TokenStatistics, stored_statistics

    hashes: dict[str, str] = {}
    chunks: dict[str, arrays.ChunkHashes] = {}
    by_row = hashed_arrays(manifest)
    with arrays.syncing() as sync:

        def write(name: str, array: arrays.Array, compress: bool = False, attributes: arrays.Attributes = ()) -> None:
            folder = partial / name
            # What is read at once is one chunk.
            chunk_rows = arrays.CHUNK_ROWS if name in by_row else max(1, len(array))
            arrays.write_array(folder, array, chunk_rows=chunk_rows, compress=compress, attributes=attributes)
            sync(arrays.data_file(folder, array.ndim))
            hashes[name], chunks[name] = arrays.array_hashes(array)

        write("token_ids", token_ids_sT)
        write("order", order)
        found = []
        for layer, hidden_nD in hidden:
            meaning = (("hidden_state", FORMULA),) if hidden_nD.dtype == np.int8 else ()
            write(layer_name(layer), hidden_nD, manifest.compress != "none", meaning)
            if others is None:
                found.append(stored_statistics(hidden_nD))
        if others is None:
            means, stds = zip(*found, strict=True)
            others = TokenStatistics(np.stack(means, axis=1), np.stack(stds, axis=1)).named
        for name, array in others().items():
            write(name, array)
        if manifest.chunk_hashes:
            columns = np.stack([chunks[name] for name in by_row], axis=1)
            write(CHUNK_HASHES, columns, attributes=(("columns", by_row),))
    return hashes


def remove_partial_shards(path: Path, is_claimed: Callable[[str], bool]) -> None:
    """Delete what killed harvesters left under dot-names, and nothing of one that lives.

    is_claimed: whether a harvester that lives has a claim on a name such as "shard-00003".
    """
    for partial in list(path.glob(".shard-*.partial")):  # listed first: whoever made one had claimed it by then
        if not is_claimed(partial.name[1:].partition(".")[0]):
            shutil.rmtree(partial, ignore_errors=True)


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain
