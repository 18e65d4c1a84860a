"""A shard's arrays, wherever they are, in; some of their rows, as stored, in memory that the caller gives, out.

Rows are read, not mapped. A pread copies from the page cache at nearly memcpy's rate (benchmarks/loader.py), leaves
nothing of the cache in this process's memory, and meets a file that was cut as a short read, where a mapping would
end the process with SIGBUS. Of a cache in an object store the blocks that hold them are fetched onto the disk first,
the announced ones many at a time, and read there (routesae.harvest.cache.store.blocks).

Dimension letters: m rows read, W numbers a row: D of a layer, L of token_mean and the like.
"""

from __future__ import annotations

import os
import resource
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from routesae.harvest.cache import arrays
from routesae.harvest.cache.reader import Cache, Shard
from routesae.harvest.cache.store.blocks import OpenFile, blocks
from routesae.harvest.cache.store.folder import RemoteFolder
from routesae.reporting import FailedRun, WrongInput

if TYPE_CHECKING:
    from routesae.harvest.cache.store.folder import Data

OPEN_FILES = 512  # held open at most; opening one anew costs about a twentieth of reading a block from it
FETCHED_BYTES = 1 << 16  # at least so much is fetched by one request, which takes as long for less


class RowFiles(ABC):
    """Where rows are read from; safe for several threads."""

    @abstractmethod
    def read(self, shard: Shard, name: str, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        """Copy stored rows `first` and on of array `name` into out_mW, C-contiguous and of the array's dtype.

        Raises BadArray where the file is not what the shard's record says or ends early, OSError where it cannot be
        read, FailedRun where an object store does not give it.
        """

    @abstractmethod
    def advise(self, shard: Shard, name: str, first: int, after: int) -> None:
        """Say that rows first … after-1 are wanted soon. Raises as `read`."""

    @abstractmethod
    def drop(self, shard: Shard, name: str, first: int, after: int) -> bool:
        """Let go of copies of those rows, which are bad; whether there are any, so that reading anew may help."""


def row_files(cache: Cache) -> RowFiles:
    """What reads the rows of a cache, wherever it is."""
    return FetchedRowFiles() if isinstance(cache.path, RemoteFolder) else LocalRowFiles()


class LocalRowFiles(RowFiles):
    """The files of arrays on disk: those used last are held open, far fewer than the process may have."""

    def __init__(self) -> None:
        self._opened = lru_cache(maxsize=_open_file_limit())(_open_file)

    def read(self, shard: Shard, name: str, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        if shard.compressed(name):
            out_mW[:] = shard.read_rows(name, first, first + len(out_mW))
        else:
            _read_into(self._opened(shard, name), first, out_mW)

    def advise(self, shard: Shard, name: str, first: int, after: int) -> None:
        if hasattr(os, "posix_fadvise") and not shard.compressed(name):
            row_bytes = shard.row_bytes(name)
            opened, length = self._opened(shard, name), (after - first) * row_bytes
            os.posix_fadvise(opened.descriptor, first * row_bytes, length, os.POSIX_FADV_WILLNEED)

    def drop(self, shard: Shard, name: str, first: int, after: int) -> bool:
        return False


class FetchedRowFiles(RowFiles):
    """The arrays of a cache in an object store, in blocks of rows that stay on the disk for a while."""

    def __init__(self) -> None:
        self._blocks = blocks()

    def read(self, shard: Shard, name: str, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        at = 0
        for block in _blocks_of(shard, name, first, first + len(out_mW)):
            opened = self._fetched(block)
            begin, after = max(first, block.first), min(first + len(out_mW), block.after)
            _read_into(opened, begin - block.first, out_mW[at : at + after - begin])
            at += after - begin

    def _fetched(self, block: _FetchedBlock) -> OpenFile:
        try:
            return self._blocks.open(block.key, block.bytes, block.read)
        except WrongInput as refused:  # in the middle of a run it is not the command that is wrong
            raise FailedRun(str(refused)) from refused

    def advise(self, shard: Shard, name: str, first: int, after: int) -> None:
        for block in _blocks_of(shard, name, first, after):
            self._blocks.announce(block.key, block.bytes, block.read)

    def drop(self, shard: Shard, name: str, first: int, after: int) -> bool:
        for block in _blocks_of(shard, name, first, after):
            self._blocks.drop(block.key)
        return True


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


def _blocks_of(shard: Shard, name: str, first: int, after: int) -> list[_FetchedBlock]:
    """The blocks that hold the rows."""
    row_bytes = shard.row_bytes(name)
    rows = arrays.CHUNK_ROWS * max(1, FETCHED_BYTES // (arrays.CHUNK_ROWS * row_bytes))
    firsts = range(first // rows * rows, after, rows)
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
