"""What a cache asks of the place it lies in: a folder on a disk (store/disk.py) or below a URL (store/bucket.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from routesae.harvest.cache import arrays
from routesae.harvest.cache.arrays import Array, BadArray, ChunkHashes
from routesae.machine.files import LARGEST_BYTES, BadFile, parse_json


class Stored(NamedTuple):
    """size: in bytes. etag: the object store's name for this version of an object; None on a disk."""

    size: int
    etag: str | None = None


class OpenRows(Protocol):
    """An array's rows, opened for many reads by several threads."""

    def read(self, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        """Copy stored rows from `first` on into out_mW, C-contiguous and of the array's dtype.

        Raises BadArray where the array ends early, OSError where it cannot be read, FailedRun where an object store
        does not answer.
        """

    def advise(self, first: int, after: int) -> None:
        """Announce that rows first … after-1 will be read soon."""

    def drop(self, first: int, after: int) -> bool:
        """Delete local copies of those rows; returns whether there were any, so that another read may help."""


class StoredArray(Protocol):
    """An array. Its metadata, size and index are checked before the first read: every read may raise BadArray."""

    def whole(self) -> Array:
        """The array, compared with its hash: memory-mapped; out of an object store from a local copy, which stays."""

    def pieces(self) -> Iterator[Array]:
        """All rows in order, in pieces of whole chunks, as they are now."""

    def open(self) -> OpenRows: ...


class Storage(Protocol):
    """The folder of a cache, of a shard or of an array, wherever it is.

    Every request to an object store may raise WrongInput where the bucket is missing or closed, BadArray where an
    object changed or is short, and FailedRun where the store does not answer.
    """

    @property
    def path(self) -> Path | str:
        """A path or a URL, for messages and settings."""

    @property
    def address(self) -> str:
        """An absolute path or a URL."""

    def __truediv__(self, name: str) -> Storage: ...

    def folder(self) -> Path:
        """Raises WrongInput where it is not on a disk."""

    def read(self, name: str, largest: int = LARGEST_BYTES) -> bytes:
        """A whole small file. Raises FileNotFoundError, and BadArray where it is too large or unreadable."""

    def tail(self, name: str, length: int) -> tuple[Stored, bytes]:
        """A file's size and its last `length` bytes (all, where it has fewer). Raises as `read`."""

    def fetch(self, name: str, target: Path, *, link: bool = False) -> None:
        """Copy a file to the new path `target`; `link` makes a hard link where that is possible. Raises as `read`."""

    def size(self) -> int:
        """Bytes of all files below."""

    def shard_names(self) -> set[str]:
        """The shards that are committed; on a disk, whatever has a shard's name."""

    def has_shard(self, name: str) -> bool: ...

    def record(self, name: str) -> bytes:
        """The zarr.json of a shard. Raises as `read`."""

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike, content: str) -> StoredArray:
        """The array in this folder. content: its recorded hash. Raises BadArray, or its reads do."""


def is_url(text: object) -> bool:
    """Whether it names a place in an object store, or tries to, rather than a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


def chunk_hashes(array: StoredArray) -> ChunkHashes:
    """uint64 [C]: of the array as it is now, read in pieces, and never from a local copy."""
    return np.concatenate([np.empty(0, np.uint64), *map(arrays.chunk_hashes, array.pieces())])


def checked(folder: Storage, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Stored:
    """Compare an array's metadata, file size and index with what `shape` says; reads a few kilobytes.

    zarr 3.1 reads a missing or cut chunk as the fill value without a word, so this comes before any read. Sizes are
    bounded before anything of that size is made: the metadata may be a stranger's. Raises BadArray.
    """
    try:
        metadata = parse_json(folder.read("zarr.json"))
    except FileNotFoundError:
        raise BadArray("zarr.json missing") from None
    except BadFile as bad:
        raise BadArray(f"zarr.json unreadable: {bad!r}") from None
    chunk_rows = arrays.chunk_rows_of(metadata, shape, dtype)
    try:
        stored, index = folder.tail(arrays.data_name(len(shape)), arrays.index_bytes(shape[0], chunk_rows))
    except FileNotFoundError:
        raise BadArray("data file missing") from None
    if stored.size != (expected := arrays.file_bytes(shape, dtype, chunk_rows)):
        raise BadArray(f"{stored.size:,} bytes where {expected:,} belong")
    if index != arrays.index_of(shape, dtype, chunk_rows):
        raise BadArray("chunk index altered")
    return stored
