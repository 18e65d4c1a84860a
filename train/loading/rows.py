"""Reads stored rows into memory that the caller gives, and compares every chunk with its checksum.

A chunk of CHUNK_ROWS rows is hashed in the thread that read it, right after that, while the core's cache still has it
(chunk_hashes, harvest/cache/reader.py). If only part of a chunk is wanted, all of it is read into memory of the
thread, so reads are of whole chunks wherever they can be (train/loading/batches.py). What a cache holds as int8 is
decoded (harvest/cache/quantise.py) in the same thread, unless a GPU is to do it, some rows at a time, so that it goes
from the page cache to float16 without leaving the core's own cache.

Dimension letters: N tokens a batch, n of them read at once, m rows of a read, L layers of the selection, M layers of
the cache, D width, W numbers a row (D of a layer, M of token_mean and the like), C chunks, A arrays hashed by chunk.
"""

import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from routesae.harvest.cache.arrays import CHUNK_ROWS, BadArray, ChunkHashes
from routesae.harvest.cache.manifest import (
    CHANNEL_ARRAYS,
    CHUNK_HASHES,
    SCALE,
    STATISTICS,
    Manifest,
    hashed_arrays,
    layer_name,
)
from routesae.harvest.cache.quantise import Channels, decode, piece_rows
from routesae.harvest.cache.reader import Shard, damaged
from routesae.harvest.cache.store.bucket import BucketArray
from routesae.harvest.cache.store.disk import OpenFile
from routesae.reporting import FailedRun

OPEN_FILES = 512  # held open at most; opening one anew costs about a twentieth of reading a block from it
HASHES_BYTES = 1 << 26  # of chunk_hashes, kept for the shards read last
CHANNELS_BYTES = 1 << 26  # of means and deviations of channels, likewise

Rows = npt.NDArray[np.generic]
Open = Callable[[Shard, str], OpenFile | BucketArray]


class Read(NamedTuple):
    """Stored rows first … after-1 of a shard, of which `picked` (counted from `first`; None: all) are wanted for a
    batch, where they stand from row `at` on."""

    shard: Shard
    first: int
    after: int
    picked: npt.NDArray[np.int64] | None = None
    at: int = 0

    @property
    def rows(self) -> slice:
        """Where they stand in the batch."""
        return slice(self.at, self.at + (self.after - self.first if self.picked is None else len(self.picked)))

    def chunks(self) -> tuple[int, int]:
        """First row of the whole chunks that hold them, and the one after their last."""
        first, after = self.first // CHUNK_ROWS, -(-self.after // CHUNK_ROWS)
        return first * CHUNK_ROWS, min(after * CHUNK_ROWS, self.shard.record.kept)


def reads_of_rows(shard: Shard, rows: npt.NDArray[np.int64], at: int) -> list[Read]:
    """One read for each chunk that holds some of the stored rows `rows`, ascending."""
    reads: list[Read] = []
    for piece in np.split(rows, np.flatnonzero(np.diff(rows // CHUNK_ROWS)) + 1) if len(rows) else ():
        reads.append(Read(shard, int(piece[0]), int(piece[-1]) + 1, piece - piece[0], at))
        at += len(piece)
    return reads


class RowReader:
    """Reads rows of `layers` out of the shards of a cache; safe for several threads.

    decoding: int8 is read as float16, else as it is, and what it takes to decode it too.
    """

    def __init__(self, manifest: Manifest, layers: Sequence[int], *, decoding: bool = True):
        self._names = [layer_name(layer) for layer in layers]
        self._columns = [manifest.layers.index(layer) for layer in layers]
        self._cache_layers = len(manifest.layers)
        self._quantised = manifest.dtype == "int8"
        self._decodes = self._quantised and decoding
        self._by_row = (*STATISTICS, *((SCALE,) if self._quantised and not decoding else ()))
        hashed = hashed_arrays(manifest)
        self._hash_columns = {name: column for column, name in enumerate(hashed)}
        # Plain functions, not methods: a cycle would hold files open for as long as the collector pleases.
        # Of the files that the process may open a quarter: the rest is for whoever else is in it.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, soft // 4))
        self._opened: Open = lru_cache(most)(lambda shard, name: shard.array(name).open())
        chunks = -(-manifest.shard_rows * manifest.context // CHUNK_ROWS)
        self._hashes = lru_cache(max(1, HASHES_BYTES // (8 * len(hashed) * chunks)))(_chunk_hashes)
        channels = partial(_channels, self._columns)
        self.channels = lru_cache(max(1, CHANNELS_BYTES // (8 * len(self._names) * manifest.width)))(channels)
        self._announced: set[Shard] = set()  # whose small arrays were
        self._scratch = threading.local()

    def advise(self, reads: Sequence[Read]) -> None:
        """Announce what will be read soon. What is wrong with its files is left to the reading to name."""
        by_row = (*self._names, *STATISTICS, *((SCALE,) if self._quantised else ()))
        for read in reads:
            wanted = [(name, *read.chunks()) for name in by_row]
            if read.shard not in self._announced:
                self._announced.add(read.shard)
                small = (CHUNK_HASHES, *(CHANNEL_ARRAYS if self._quantised else ()))
                wanted += [(name, 0, read.shard.form(name)[0][0]) for name in small]
            for name, first, after in wanted:
                with suppress(BadArray, OSError):
                    self._opened(read.shard, name).advise(first, after)

    def read(self, reads: Sequence[Read], hidden_LND: Rows, *by_row_LN1: Rows) -> None:
        """Copy what `reads` names, neighbours in the batch; and what STATISTICS names of it, and SCALE of int8.

        Raises FailedRun where a file is gone, cut or altered, or an object store does not answer.
        """
        if not reads:
            return
        begin, end = reads[0].rows.start, reads[-1].rows.stop
        by_row_nM = [np.empty((end - begin, self._cache_layers), np.float32) for _ in self._by_row]
        for read in reads:
            if self._decodes:
                self._read_quantised(read, hidden_LND[:, read.rows])
            else:
                for name, out_ND in zip(self._names, hidden_LND, strict=True):
                    self.read_array(name, read, out_ND[read.rows])
            for name, values_nM in zip(self._by_row, by_row_nM, strict=True):
                self.read_array(name, read, values_nM[read.rows.start - begin : read.rows.stop - begin])
        for values_nM, out_LN1 in zip(by_row_nM, by_row_LN1, strict=True):
            out_LN1[:, begin:end, 0] = values_nM[:, self._columns].T

    def _read_quantised(self, read: Read, out_LmD: Rows) -> None:
        m, width = out_LmD.shape[1:]
        scale_mM = self._memory("scale", (m, self._cache_layers), np.float32)
        self.read_array(SCALE, read, scale_mM)
        q_mD = self._memory("q", (m, width), np.int8)
        rows = piece_rows(width, torch.device("cpu"))
        x_mD = torch.from_numpy(self._memory("x", (rows, width), np.float32))
        for at, channels in enumerate(map(Channels, *self.channels(read.shard))):
            self.read_array(self._names[at], read, q_mD)
            scale_m = torch.from_numpy(scale_mM[:, self._columns[at]])
            stored_mD, decoded_mD = torch.from_numpy(q_mD), torch.from_numpy(out_LmD[at])
            for start in range(0, m, rows):
                piece = slice(start, min(m, start + rows))
                decode(stored_mD[piece], scale_m[piece], channels, x_mD[: piece.stop - start], decoded_mD[piece])

    def read_array(self, name: str, read: Read, out_mW: Rows) -> None:
        """Copy the wanted rows of one array into out_mW, C-contiguous and of the array's dtype."""
        with _reading(read.shard, name):
            first, after = read.chunks()
            if read.picked is None and (first, after) == (read.first, read.after):
                self._read_chunks(read.shard, name, first, out_mW)
                return
            rows_mW = self._memory("rows", (after - first, out_mW.shape[1]), out_mW.dtype)
            self._read_chunks(read.shard, name, first, rows_mW)
            wanted_mW = rows_mW[read.first - first : read.after - first]
            if read.picked is None:
                out_mW[:] = wanted_mW
            else:
                np.take(wanted_mW, read.picked, axis=0, out=out_mW, mode="clip")  # "raise" would copy once more

    def _read_chunks(self, shard: Shard, name: str, first: int, out_mW: Rows) -> None:
        hashes_C = self._hashes(shard)[self._hash_columns[name]]
        rows = self._opened(shard, name)
        rows.read(first, out_mW)
        wrong = _wrong_chunk(hashes_C, first, out_mW)
        if wrong is not None and rows.drop(first, first + len(out_mW)):  # a local copy: perhaps it alone is wrong
            rows.read(first, out_mW)
            wrong = _wrong_chunk(hashes_C, first, out_mW)
        if wrong is not None:
            raise BadArray(wrong)

    def _memory(self, name: str, shape: tuple[int, int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Memory of this thread, used again and again: fresh pages cost more than what is copied into them."""
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        memory: npt.NDArray[np.uint8] | None = getattr(self._scratch, name, None)
        if memory is None or len(memory) < size:
            memory = np.empty(size, np.uint8)
            setattr(self._scratch, name, memory)
        return memory[:size].view(dtype).reshape(shape)


@contextmanager
def _reading(shard: Shard, name: str) -> Iterator[None]:
    """Raises FailedRun, naming the array and a remedy, where reading it fails."""
    try:
        yield
    except (BadArray, OSError, ValueError) as bad:
        raise FailedRun(str(damaged(f"{shard.path}/{name}", BadArray(str(bad))))) from bad


def _wrong_chunk(hashes_C: ChunkHashes, first: int, rows_mW: Rows) -> str | None:
    for at in range(0, len(rows_mW), CHUNK_ROWS):
        chunk_mW = rows_mW[at : at + CHUNK_ROWS]
        if xxhash.xxh3_64_intdigest(chunk_mW.data) != hashes_C[(first + at) // CHUNK_ROWS]:
            return (
                f"rows {first + at} to {first + at + len(chunk_mW) - 1} are not what was written (checksum differs)"
            )
    return None


def _chunk_hashes(shard: Shard) -> ChunkHashes:
    """uint64 [A, C]. Raises FailedRun where they are damaged."""
    with _reading(shard, CHUNK_HASHES):
        return np.array(shard.read(CHUNK_HASHES).T, order="C")  # not a view of the mapped file


def _channels(columns: list[int], shard: Shard) -> torch.Tensor:
    """[2, L, D]: means and deviations of the channels of a selection's layers. Raises FailedRun where damaged."""
    read = []
    for name in CHANNEL_ARRAYS:
        with _reading(shard, name):
            read.append(torch.from_numpy(shard.read(name)[columns]))
    return torch.stack(read)
