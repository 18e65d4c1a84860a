"""Stored rows of a shard's arrays in; the same rows in memory that the caller gives, out.

Rows are read, not mapped. A pread copies from the page cache at nearly memcpy's rate (benchmarks/loader.py), leaves
nothing of the cache in this process's memory, and meets a file that was cut as a short read, where a mapping would
end the process with SIGBUS. Of a cache in an object store the blocks that hold them are fetched onto the disk first,
the announced ones many at a time, and read there (routesae.harvest.remote.blocks).

Dimension letters: m rows read, W numbers a row: D of a layer, L of token_mean and the like.
"""

from __future__ import annotations

import os
import resource
import threading
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from routesae.harvest import arrays
from routesae.harvest.cache import Cache, Shard
from routesae.harvest.remote.blocks import OpenFile, blocks
from routesae.harvest.remote.folder import RemoteFolder
from routesae.reporting import FailedRun, WrongInput

if TYPE_CHECKING:
    from routesae.harvest.remote.folder import Data

OPEN_FILES = 512  # held open at most; opening one anew costs about a twentieth of reading a block from it
GAP_ROWS = 16  # rows between two wanted ones that are read along rather than jumped over
FETCHED_BYTES = 1 << 16  # at least so much is fetched by one request, which takes as long for less


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
    """Few reads that together hold the stored rows `rows`, ascending, and at most GAP_ROWS others after each."""
    pieces = np.split(rows, np.flatnonzero(np.diff(rows) > GAP_ROWS) + 1) if len(rows) else []
    return [Span(int(piece[0]), int(piece[-1]) + 1, piece - piece[0]) for piece in pieces]


class Rows(ABC):
    """Reads stored rows; safe for several threads."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def read(self, shard: Shard, name: str, span: Span, out_mW: npt.NDArray[np.generic]) -> None:
        """Copy the span's wanted rows of array `name` into out_mW, C-contiguous and of the array's dtype.

        Raises BadArray where the file is not what the shard's record says or ends early, OSError where it cannot be
        read, FailedRun where an object store does not give it.
        """
        if span.picked is None:
            self._read_whole(shard, name, span.first, out_mW)
            return
        rows_W = self._scratch((span.after - span.first) * out_mW[0].nbytes).view(out_mW.dtype)
        rows_W = rows_W.reshape(-1, out_mW.shape[1])
        self._read_whole(shard, name, span.first, rows_W)
        np.take(rows_W, span.picked, axis=0, out=out_mW, mode="clip")  # "raise" would copy once more

    def _scratch(self, size: int) -> npt.NDArray[np.uint8]:
        """Memory of this thread, used again and again: fresh pages cost more than what is copied into them."""
        held: npt.NDArray[np.uint8] | None = getattr(self._of_thread, "held", None)
        if held is None or len(held) < size:
            held = self._of_thread.held = np.empty(size, np.uint8)
        return held[:size]

    @abstractmethod
    def _read_whole(self, shard: Shard, name: str, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        """Stored rows from `first` on."""

    @abstractmethod
    def advise(self, shard: Shard, name: str, span: Span) -> None:
        """Say that the span is wanted soon. Raises as `read`."""


def rows_of(cache: Cache) -> Rows:
    """What reads the rows of an uncompressed cache, wherever it is."""
    return FetchedRows() if isinstance(cache.path, RemoteFolder) else RowFiles()


class RowFiles(Rows):
    """The files of arrays on disk: those used last are held open, far fewer than the process may have."""

    def __init__(self) -> None:
        super().__init__()
        self._opened = lru_cache(maxsize=_open_file_limit())(_open_file)

    def _read_whole(self, shard: Shard, name: str, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        _read_into(self._opened(shard, name), first, out_mW)

    def advise(self, shard: Shard, name: str, span: Span) -> None:
        if hasattr(os, "posix_fadvise"):
            row_bytes = shard.row_bytes(name)
            length = (span.after - span.first) * row_bytes
            opened = self._opened(shard, name)
            os.posix_fadvise(opened.descriptor, span.first * row_bytes, length, os.POSIX_FADV_WILLNEED)


class FetchedRows(Rows):
    """The arrays of a cache in an object store, in blocks of rows that stay on the disk for a while."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks = blocks()

    def _read_whole(self, shard: Shard, name: str, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        at = 0
        for block in _blocks_of(shard, name, Span(first, first + len(out_mW))):
            opened = self._fetched(block)
            begin, after = max(first, block.first), min(first + len(out_mW), block.after)
            _read_into(opened, begin - block.first, out_mW[at : at + after - begin])
            at += after - begin

    def _fetched(self, block: _FetchedBlock) -> OpenFile:
        try:
            return self._blocks.open(block.key, block.bytes, block.read)
        except WrongInput as refused:  # in the middle of a run it is not the command that is wrong
            raise FailedRun(str(refused)) from refused

    def advise(self, shard: Shard, name: str, span: Span) -> None:
        for block in _blocks_of(shard, name, span):
            self._blocks.announce(block.key, block.bytes, block.read)


class _FetchedBlock(NamedTuple):
    """Stored rows first … after-1 of array `name`: as many whole chunks as FETCHED_BYTES asks for."""

    shard: Shard
    name: str
    first: int
    after: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return (self.after - self.first) * self.row_bytes

    @property
    def key(self) -> str:
        """Of these bytes alone: the record's hash is of what the array holds."""
        shard, name = self.shard, self.name
        holds = f"{shard.path}/{name} {shard.record.hashes[name]} {self.first} {self.after} {self.row_bytes}"
        return xxhash.xxh3_128_hexdigest(holds.encode())

    def read(self) -> Data:
        return self.shard.remote_array(self.name).rows(self.first, self.after)


def _blocks_of(shard: Shard, name: str, span: Span) -> list[_FetchedBlock]:
    """The blocks that hold the span's rows."""
    row_bytes = shard.row_bytes(name)
    rows = arrays.CHUNK_ROWS * max(1, FETCHED_BYTES // (arrays.CHUNK_ROWS * row_bytes))
    firsts = range(span.first // rows * rows, span.after, rows)
    return [_FetchedBlock(shard, name, at, min(at + rows, shard.rows(name)), row_bytes) for at in firsts]


def _read_into(opened: OpenFile, first: int, out_mW: npt.NDArray[np.generic]) -> None:
    assert out_mW.flags.c_contiguous  # a copy would be read into and thrown away
    view = out_mW.reshape(-1).view(np.uint8).data
    offset = first * (out_mW.nbytes // len(out_mW))
    while view:  # a read may give less than it is asked for
        read = os.preadv(opened.descriptor, [view], offset)
        if read == 0:
            raise arrays.BadArray(f"ends before byte {offset + len(view):,}, which is still of its rows")
        view, offset = view[read:], offset + read


def _open_file(shard: Shard, name: str) -> OpenFile:
    shard.check(name)
    assert isinstance(shard.path, Path)
    return OpenFile(os.open(arrays.data_file(shard.path / name, 2), os.O_RDONLY))


def _open_file_limit() -> int:
    """A quarter of what the process may open: the rest is for whoever else is in it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, soft // 4))
