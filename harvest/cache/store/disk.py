"""Caches on a disk: files mapped to be looked at, and read with pread where there are many.

A pread copies from the page cache at nearly memcpy's rate (benchmarks/loader.py), leaves nothing of the cache in this
process's memory, and meets a file that was cut as a short read, where a mapping would end the process with SIGBUS.

What the classes here do, those of store/bucket.py do in an object store. There each request may also raise WrongInput
if the bucket is missing or closed, BadArray if an object changed, and FailedRun if the store does not answer.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from routesae.harvest.cache.arrays import CHECKSUM_DIFFERS, Array, BadArray, array_hash, checked, data_file
from routesae.machine.files import LARGEST_BYTES, BadFile, open_regular, read_bytes

NO_MMAP = (errno.ENODEV, errno.ENOSYS, errno.ENOTSUP, errno.EACCES, errno.EINVAL)


class OpenFile:
    """A regular file's rows, for several threads. It is closed once nobody holds this object, in whichever thread.

    Raises BadFile where it is no regular file, and OSError.
    """

    def __init__(self, path: Path, row_bytes: int = 1):
        with open_regular(path) as file:
            self.descriptor = os.dup(file.fileno())
        self._row_bytes = row_bytes

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # as the process ends `os` may be gone
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def read(self, first: int, out_mW: npt.NDArray[np.generic]) -> None:
        """Copy stored rows from `first` on into out_mW, C-contiguous and of the array's dtype.

        Raises BadArray where the file ends early, OSError where it cannot be read.
        """
        assert out_mW.flags.c_contiguous  # a copy would be read into and thrown away
        view, offset = out_mW.reshape(-1).view(np.uint8).data, first * self._row_bytes
        while view:  # a read may give less than it is asked for
            read = os.preadv(self.descriptor, [view], offset)
            if read == 0:
                raise BadArray(f"ends before byte {offset + len(view):,}, which is still of its rows")
            view, offset = view[read:], offset + read

    def advise(self, first: int, after: int) -> None:
        """Announce that rows first … after-1 will be read soon."""
        if hasattr(os, "posix_fadvise"):
            offset, length = first * self._row_bytes, (after - first) * self._row_bytes
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def drop(self, first: int, after: int) -> bool:
        """Delete local copies of those rows; returns whether there were any, so that another read may help."""
        return False


def map_file(file: Path | IO[bytes], dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
    """An array at the beginning of a file, memory-mapped; in memory where the file system has no mappings."""
    if prod(shape) == 0:
        return np.empty(shape, dtype)
    try:
        return np.memmap(file, dtype, "r", shape=shape)
    except OSError as error:
        if error.errno not in NO_MMAP:
            raise
        return np.fromfile(file, dtype, prod(shape)).reshape(shape)


def folder_bytes(folder: Path) -> int:
    """Of all files below, but those that somebody deletes meanwhile."""
    found = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found += Path(path, name).stat().st_size
    return found


class DiskArray:
    """An array in a folder, whose metadata, size and index are right. content: its recorded hash."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, content: str):
        self._path, self._shape, self._content = data_file(path, len(shape)), shape, content
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def whole(self) -> Array:
        """The array, compared with its hash: memory-mapped; out of an object store from a local copy, which stays."""
        values = map_file(self._path, self._dtype, self._shape)
        if array_hash(values) != self._content:
            raise BadArray(CHECKSUM_DIFFERS)
        return values

    def pieces(self) -> Iterator[Array]:
        """All rows in order, in pieces of whole chunks, as they are now, never from a local copy."""
        yield map_file(self._path, self._dtype, self._shape)

    def open(self) -> OpenFile:
        return OpenFile(self._path, prod(self._shape[1:]) * self._dtype.itemsize)


class DiskFolder:
    """The folder of a cache, of a shard or of an array. root: that of the cache, out of which no link may lead."""

    def __init__(self, path: Path, root: Path | None = None):
        self.path = path
        self._root = root or path

    @property
    def address(self) -> str:
        return str(self.path.resolve())

    def __truediv__(self, name: str) -> DiskFolder:
        return DiskFolder(self.path / name, self._root)

    def folder(self) -> Path:
        """Raises WrongInput where it is not on a disk."""
        return self.path

    def read(self, name: str, largest: int = LARGEST_BYTES) -> bytes:
        """A whole small file. Raises FileNotFoundError, and BadArray where it is too large or unreadable."""
        try:
            return read_bytes(self.path / name, largest)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self.path / name} is missing") from None
        except (BadFile, OSError) as bad:
            raise BadArray(f"{name} unreadable: {getattr(bad, 'strerror', None) or bad}") from None

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """A file's size and its last `length` bytes (all, where it has fewer). Raises as `read`."""
        try:
            with open_regular(self.path / name) as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - length))
                return size, file.read(length)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self.path / name} is missing") from None
        except (BadFile, OSError) as bad:
            raise BadArray(f"data file unreadable: {getattr(bad, 'strerror', None) or bad}") from None

    def fetch(self, name: str, target: Path, *, link: bool = False) -> None:
        """Copy a file to the new path `target`; `link` makes a hard link where that is possible. Raises as `read`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            with suppress(OSError):  # another file system, or one without hard links
                os.link(self.path / name, target, follow_symlinks=True)
                return
        shutil.copyfile(self.path / name, target)

    def size(self) -> int:
        return folder_bytes(self.path)

    def shard_names(self) -> set[str]:
        """The shards that are committed: here, whatever has a shard's name."""
        with os.scandir(self.path) as entries:  # one listing, not a look for each of thousands
            return {entry.name for entry in entries if entry.name.startswith("shard-")}

    def has_shard(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def record(self, name: str) -> bytes:
        return (self / name).read("zarr.json")

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike, content: str) -> DiskArray:
        """The array in this folder. content: its recorded hash. Raises BadArray."""
        file, root = os.path.realpath(data_file(self.path, len(shape))), os.path.realpath(self._root)
        if not file.startswith(root + os.sep):
            raise BadArray("a symbolic link leads out of the cache; put the file itself there")
        checked(self.read, self.tail, shape, dtype)
        return DiskArray(self.path, shape, dtype, content)
