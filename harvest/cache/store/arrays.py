"""One array of a cache in an object store: its folder and shape in; checked once, then any of its bytes, out.

The same Zarr array as routesae.harvest.cache.arrays has on disk, read by ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from routesae.harvest.cache import arrays
from routesae.harvest.cache.arrays import Array, BadArray, ChunkHasher, Hashed
from routesae.harvest.cache.store.blocks import blocks
from routesae.harvest.cache.store.folder import RemoteFolder, Stored
from routesae.machine.files import LARGEST_BYTES, BadFile, parse_json

if TYPE_CHECKING:
    from routesae.harvest.cache.store.folder import Data


class RemoteArray:
    """An uncompressed array that was what it should be when it was opened; every read is of that same version."""

    def __init__(self, folder: RemoteFolder, shape: tuple[int, ...], dtype: npt.DTypeLike, stored: Stored):
        self.folder = folder
        self.shape = shape
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.stored = stored
        self.row_bytes = prod(shape[1:]) * self.dtype.itemsize
        self.nbytes = shape[0] * self.row_bytes

    def rows(self, first: int, after: int) -> Data:
        """The bytes of rows first … after-1. Raises as every request (.folder)."""
        return self.folder.range(
            object_name(len(self.shape)), first * self.row_bytes, after * self.row_bytes, self.stored
        )

    def pieces(self) -> Iterator[Data]:
        """The bytes of all rows, in order, some megabytes at a time."""
        return self.folder.pieces(object_name(len(self.shape)), self.stored, self.nbytes)

    def hashes(self) -> Hashed:
        """As routesae.harvest.cache.arrays.array_hashes of the same array on disk."""
        hasher = ChunkHasher(self.row_bytes)
        for piece in self.pieces():
            hasher.update(memoryview(piece))
        return hasher.finish()

    def read(self) -> Array:
        """All of it, in memory: for arrays of a few bytes a token."""
        values = np.empty(self.shape, self.dtype)
        view, at = values.reshape(-1).view(np.uint8), 0
        for piece in self.pieces():
            taken = np.frombuffer(memoryview(piece), np.uint8)
            view[at : at + len(taken)] = taken
            at += len(taken)
        return values

    def map(self) -> Array:
        """All of it, memory-mapped from a copy among the blocks (.blocks): fetched once, and kept."""
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self._file(), self.dtype, "r", shape=self.shape)

    def _file(self) -> Path:
        key = xxhash.xxh3_128_hexdigest(f"{self.folder} {self.stored.etag} {self.nbytes}".encode())
        return blocks().whole(key, self.nbytes, self.pieces)


def object_name(ndim: int) -> str:
    """The data object of an array, below its folder."""
    return arrays.data_file(Path(), ndim).as_posix()


def open_array(folder: RemoteFolder, shape: tuple[int, ...], dtype: npt.DTypeLike) -> RemoteArray:
    """Check metadata, size and index, by two small requests. Raises BadArray, and as every request."""
    try:
        metadata = parse_json(folder.read("zarr.json", LARGEST_BYTES))
    except FileNotFoundError:
        raise BadArray("zarr.json missing") from None
    except BadFile as bad:
        raise BadArray(f"zarr.json unreadable: {bad!r}") from None
    chunk_rows = arrays.chunk_rows_of(metadata, shape, np.dtype(dtype), compress=False)
    try:
        stored, index = folder.tail(object_name(len(shape)), arrays.index_size(shape, chunk_rows))
    except FileNotFoundError:
        raise BadArray("data object missing") from None
    if stored.size != (wanted := arrays.file_bytes(shape, dtype, chunk_rows)):
        raise BadArray(f"{stored.size:,} bytes where {wanted:,} belong")
    arrays.check_index(index, shape, dtype, chunk_rows)
    return RemoteArray(folder, shape, dtype, stored)
