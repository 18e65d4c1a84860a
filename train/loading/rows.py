"""Spans of stored rows in; those rows in memory that the caller gives, each chunk compared with its checksum, out.

Where a shard has chunk_hashes (harvest/cache/reader.py), a chunk of CHUNK_ROWS rows is hashed in the thread that read
it, right after that, while the core's cache still has it. What is wanted of a chunk only in part is read whole for
that, into memory of the thread's own, so spans are of whole chunks wherever they can be (train/loading/batches.py).

Dimension letters: m rows read, W numbers a row: D of a layer, L of token_mean and the like, C chunks of a shard, A
arrays that are hashed by chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from routesae.harvest.cache.arrays import CHECKSUM_DIFFERS, CHUNK_ROWS, BadArray, ChunkHashes
from routesae.harvest.cache.manifest import CHUNK_HASHES, Manifest, hashed_arrays
from routesae.harvest.cache.reader import Cache, Shard, damaged
from routesae.reporting import FailedRun
from routesae.train.loading.row_files import RowFiles, row_files

HASHES_BYTES = 1 << 26  # of chunk_hashes, kept for the shards read last


class Span(NamedTuple):
    """Stored rows first … after-1 of a shard, of which `picked` (counted from `first`) are wanted; None: all."""

    first: int
    after: int
    picked: npt.NDArray[np.int64] | None = None

    @property
    def wanted(self) -> int:
        """m, rows of it that are wanted."""
        return self.after - self.first if self.picked is None else len(self.picked)


def spans_of(rows: npt.NDArray[np.int64]) -> list[Span]:
    """One span for each chunk that holds some of the stored rows `rows`, ascending."""
    pieces = np.split(rows, np.flatnonzero(np.diff(rows // CHUNK_ROWS)) + 1) if len(rows) else []
    return [Span(int(piece[0]), int(piece[-1]) + 1, piece - piece[0]) for piece in pieces]


@contextmanager
def reading(shard: Shard, name: str) -> Iterator[None]:
    """Raises FailedRun, naming the array and a remedy, where reading it fails."""
    try:
        yield
    except (BadArray, OSError, ValueError) as bad:
        raise FailedRun(str(damaged(shard.path / name, BadArray(str(bad))))) from bad


def rows_of(cache: Cache) -> Rows:
    """What reads the rows of a cache, wherever it is."""
    return Rows(cache.manifest, row_files(cache))


class Rows:
    """Reads stored rows out of `files`; safe for several threads."""

    def __init__(self, manifest: Manifest, files: RowFiles):
        self.files = files
        hashed = hashed_arrays(manifest) if manifest.chunk_hashes else ()
        self._columns = {name: column for column, name in enumerate(hashed)}
        of_a_shard = 8 * max(1, len(hashed)) * -(-manifest.shard_rows * manifest.context // CHUNK_ROWS)
        # Not a method: a cycle would hold the files open for as long as the collector pleases.
        read = partial(_read_hashes, files, len(hashed))
        self._hashes = lru_cache(maxsize=max(1, HASHES_BYTES // of_a_shard))(read)
        self._announced: set[Shard] = set()  # whose chunk_hashes were
        self._of_thread = threading.local()

    def read(self, shard: Shard, name: str, span: Span, out_mW: npt.NDArray[np.generic]) -> None:
        """Copy the span's wanted rows of array `name` into out_mW, C-contiguous and of the array's dtype.

        Raises BadArray where the file is not what the shard's record says or ends early, or a chunk is not what was
        written, OSError where it cannot be read, FailedRun where an object store does not give it.
        """
        first, after = self._read_range(shard, name, span)
        if span.picked is None and (first, after) == span[:2]:
            self._fill(shard, name, first, out_mW)
            return
        rows_W = self._scratch((after - first) * out_mW[:1].nbytes).view(out_mW.dtype).reshape(-1, out_mW.shape[1])
        self._fill(shard, name, first, rows_W)
        wanted_W = rows_W[span.first - first : span.after - first]
        if span.picked is None:
            out_mW[:] = wanted_W
        else:
            np.take(wanted_W, span.picked, axis=0, out=out_mW, mode="clip")  # "raise" would copy once more

    def advise(self, shard: Shard, name: str, span: Span) -> None:
        """Say that the span is wanted soon. Raises as `read`."""
        if name in self._columns and shard not in self._announced:
            self._announced.add(shard)
            self.files.advise(shard, CHUNK_HASHES, 0, shard.rows(CHUNK_HASHES))
        self.files.advise(shard, name, *self._read_range(shard, name, span))

    def _read_range(self, shard: Shard, name: str, span: Span) -> tuple[int, int]:
        """First of the rows that are read for a span, and the one after the last."""
        if name not in self._columns:
            return span.first, span.after
        chunks = span.first // CHUNK_ROWS, -(-span.after // CHUNK_ROWS)
        return chunks[0] * CHUNK_ROWS, min(chunks[1] * CHUNK_ROWS, shard.record.kept)

    def _fill(self, shard: Shard, name: str, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        """Stored rows from `first` on, which is a chunk's first row where the array is hashed by chunk."""
        self.files.read(shard, name, first, out_mW)
        if (column := self._columns.get(name)) is not None:
            hashes_C = self._hashes(shard)[column]
            if _wrong_chunk(hashes_C, first, out_mW):
                _read_again(self.files, shard, name, first, out_mW, lambda: _wrong_chunk(hashes_C, first, out_mW))

    def _scratch(self, size: int) -> npt.NDArray[np.uint8]:
        """Memory of this thread, used again and again: fresh pages cost more than what is copied into them."""
        held: npt.NDArray[np.uint8] | None = getattr(self._of_thread, "held", None)
        if held is None or len(held) < size:
            held = self._of_thread.held = np.empty(size, np.uint8)
        return held[:size]


def read_small(files: RowFiles, shard: Shard, name: str, out_mW: npt.NDArray[np.generic]) -> None:
    """Copy all rows of a small array, compared with the checksum in the shard's record. Raises as Rows.read."""

    def wrong() -> str | None:
        return None if xxhash.xxh3_64_hexdigest(out_mW.data) == shard.record.hashes[name] else CHECKSUM_DIFFERS

    files.read(shard, name, 0, out_mW)
    if wrong():
        _read_again(files, shard, name, 0, out_mW, wrong)


def _read_again(
    files: RowFiles,
    shard: Shard,
    name: str,
    first: int,
    out_mW: npt.NDArray[np.generic],
    wrong: Callable[[], str | None],
) -> None:
    """Rows of which `wrong` says what is wrong with them (None: nothing), anew where it was a copy that was read.

    Raises BadArray where they are still wrong.
    """
    if files.drop(shard, name, first, first + len(out_mW)):
        files.read(shard, name, first, out_mW)
    if said := wrong():
        raise BadArray(said)


def _wrong_chunk(hashes_C: ChunkHashes, first: int, rows_mW: npt.NDArray[np.generic]) -> str | None:
    for at in range(0, len(rows_mW), CHUNK_ROWS):
        chunk_W = rows_mW[at : at + CHUNK_ROWS]
        if xxhash.xxh3_64_intdigest(chunk_W.data) != hashes_C[(first + at) // CHUNK_ROWS]:
            return f"rows {first + at} to {first + at + len(chunk_W) - 1} are not what was written (checksum differs)"
    return None


def _read_hashes(files: RowFiles, arrays: int, shard: Shard) -> ChunkHashes:
    """uint64 [A, C]. Raises FailedRun where they are damaged."""
    hashes_CA = np.empty((shard.rows(CHUNK_HASHES), arrays), np.uint64)
    with reading(shard, CHUNK_HASHES):
        read_small(files, shard, CHUNK_HASHES, hashes_CA)
    return np.ascontiguousarray(hashes_CA.T)
