"""One Zarr v3 array that is one raw file: any zarr reads it, and so does np.memmap.

    <name>/zarr.json   ordinary Zarr v3 array metadata: one shard, inner chunks of `chunk_rows` whole rows,
                       codec "bytes" only, index at the end
    <name>/c/0/0       (or c/0 for one dimension)
        rows           little-endian, C order, n rounded up to whole inner chunks, padded with the fill value
        index          per inner chunk: uint64 offset, uint64 length, little-endian
        crc32c         uint32 of the index

So `np.memmap(file, dtype, "r", shape=shape)` is the array. The metadata is zarr's own; the payload is written
here, at the file system's rate, which zarr's sharded writer does not reach.
With `compress` zarr writes the payload as well, and the file is no longer raw.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CHUNK_ROWS = 256
_INDEX_ENTRY = struct.Struct("<QQ")
_EMPTY_CHUNK = (2**64 - 1, 2**64 - 1)  # what a Zarr shard index says of a chunk that was never written


class BadArray(Exception):
    """The array at a path is missing, truncated or altered; the message says how, without the path."""


def padded_rows(rows: int, chunk_rows: int) -> int:
    """`rows` rounded up to whole inner chunks; at least one."""
    return max(1, -(-rows // chunk_rows)) * chunk_rows


def file_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int = CHUNK_ROWS) -> int:
    """Size in bytes of the one data file of an uncompressed array."""
    rows = padded_rows(shape[0], chunk_rows)
    return rows * prod(shape[1:]) * np.dtype(dtype).itemsize + len(_index(shape, dtype, chunk_rows))


def _index(shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int) -> bytes:
    chunk_bytes = chunk_rows * prod(shape[1:]) * np.dtype(dtype).itemsize
    chunks = padded_rows(shape[0], chunk_rows) // chunk_rows
    index = b"".join(_INDEX_ENTRY.pack(i * chunk_bytes, chunk_bytes) for i in range(chunks))
    return index + struct.pack("<I", google_crc32c.value(index))


def data_file(folder: Path, ndim: int) -> Path:
    """The file that holds the rows of the array in `folder`."""
    return folder.joinpath("c", *["0"] * ndim)


class ArrayWriter:
    """Writes rows one after another; the number of rows need not be known before `close`.

    Nothing of it is a Zarr array until `close`, which pads and writes index and metadata. It is on the disk for
    good once `fsync_tree` has been over it.
    """

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int = CHUNK_ROWS):
        self.folder = folder
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.chunk_rows = chunk_rows
        self.rows = 0
        path = data_file(folder, 1 + len(row_shape))
        path.parent.mkdir(parents=True)
        self._file = path.open("wb", buffering=0)

    def write(self, rows: Array) -> None:
        """Append rows [n, *row_shape]."""
        assert rows.shape[1:] == self.row_shape, (rows.shape, self.row_shape)
        view = np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data
        while view:  # a raw write may take less than it is given
            view = view[self._file.write(view) :]
        self.rows += len(rows)

    def close(self) -> None:
        shape = (self.rows, *self.row_shape)
        padding = padded_rows(self.rows, self.chunk_rows) - self.rows
        fill = np.full((padding, *self.row_shape), _fill_value(self.dtype), self.dtype)
        self._file.write(fill.tobytes() + _index(shape, self.dtype, self.chunk_rows))
        self._file.close()
        (self.folder / "zarr.json").write_bytes(_metadata(shape, self.dtype, self.chunk_rows))

    def abandon(self) -> None:
        """Close the file without making an array of it."""
        self._file.close()


def write_array(folder: Path, array: Array, *, chunk_rows: int = CHUNK_ROWS, compress: bool = False) -> None:
    """Write `array` whole, without fsync. compress: zstd through zarr; the file is then no memmap.

    Raises OSError where the disk does not take it.
    """
    if compress and len(array):  # of no rows zarr would write no file
        _create(str(folder), array.shape, array.dtype, chunk_rows, compress=True)[:] = array
        return
    writer = ArrayWriter(folder, array.shape[1:], array.dtype, chunk_rows)
    try:
        writer.write(array)
        writer.close()
    finally:
        writer.abandon()


@lru_cache(maxsize=64)  # the layers of a shard share theirs, and zarr takes 4 ms over each
def _metadata(shape: tuple[int, ...], dtype: Any, chunk_rows: int) -> bytes:
    store: dict[str, Any] = {}
    _create(store, shape, dtype, chunk_rows, compress=False)
    return bytes(store["zarr.json"].to_bytes())


def _create(store: Any, shape: tuple[int, ...], dtype: Any, chunk_rows: int, *, compress: bool) -> Any:
    """An empty zarr array: its metadata, in a folder or a dict, and an object that takes its values."""
    import zarr
    from zarr.codecs import ZstdCodec

    return zarr.create_array(
        store,
        shape=shape,
        dtype=dtype,
        shards=(padded_rows(shape[0], chunk_rows), *shape[1:]),
        chunks=(chunk_rows, *shape[1:]),
        filters=None,
        compressors=ZstdCodec(level=3) if compress else None,
        fill_value=_fill_value(dtype),
        # zarr would otherwise leave out an all-zero chunk, and everything after it would shift.
        config={"write_empty_chunks": True},
        overwrite=False,
    )


def _fill_value(dtype: Any) -> float | int:
    return float("nan") if np.dtype(dtype).kind == "f" else 0


def fsync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def syncing() -> Iterator[Callable[[Path], None]]:
    """Gives a function that has a file reach the disk while others are written; by the end all have.

    Raises OSError at the end where one did not.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="fsync") as thread:
        pending: list[Future[None]] = []
        yield lambda path: pending.append(thread.submit(fsync, path))
        for one in pending:
            one.result()


def fsync_tree(folder: Path) -> None:
    """fsync `folder`, and every file and folder below it, so that they survive a power cut."""
    for path, _, files in os.walk(folder):
        for name in files:
            fsync(Path(path, name))
        fsync(Path(path))


def check_array(folder: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, *, compress: bool = False) -> None:
    """Size, index and its checksum are what `shape` says. Reads a few kilobytes. Raises BadArray.

    zarr 3.1 reads a missing or cut chunk as the fill value without a word, so this comes before any read.
    """
    chunk_rows = _chunk_rows(folder, shape, np.dtype(dtype))
    path = data_file(folder, len(shape))
    expected = _index(shape, dtype, chunk_rows)
    try:
        size = path.stat().st_size
        if not compress and size != (wanted := file_bytes(shape, dtype, chunk_rows)):
            raise BadArray(f"{size:,} bytes where {wanted:,} belong")
        with path.open("rb") as file:
            file.seek(max(0, size - len(expected)))
            index = file.read()
    except FileNotFoundError:
        raise BadArray("data file missing") from None
    if compress:
        _check_compressed_index(index, len(expected), size)
    elif index != expected:
        raise BadArray("chunk index altered")


def _check_compressed_index(index: bytes, expected_bytes: int, file_size: int) -> None:
    if len(index) != expected_bytes or struct.pack("<I", google_crc32c.value(index[:-4])) != index[-4:]:
        raise BadArray("chunk index altered or cut")
    chunks = list(_INDEX_ENTRY.iter_unpack(index[:-4]))
    if _EMPTY_CHUNK in chunks:
        raise BadArray("a chunk was never written")
    if max(offset + length for offset, length in chunks) != file_size - expected_bytes:
        raise BadArray("the chunks do not fill the file")


def _chunk_rows(folder: Path, shape: tuple[int, ...], dtype: Any) -> int:
    try:
        metadata = json.loads((folder / "zarr.json").read_bytes())
        if tuple(metadata["shape"]) != shape:
            raise BadArray(f"shape {metadata['shape']} where {list(shape)} belongs")
        if metadata["data_type"] != dtype.name:
            raise BadArray(f"data type {metadata['data_type']} where {dtype.name} belongs")
        return int(metadata["codecs"][0]["configuration"]["chunk_shape"][0])
    except FileNotFoundError:
        raise BadArray("zarr.json missing") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadArray(f"zarr.json unreadable: {error!r}") from None


def map_array(folder: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, *, compress: bool = False) -> Array:
    """The array [*shape], memory-mapped read-only; decompressed into memory where it is compressed."""
    if compress:
        return read_compressed(folder, 0, shape[0])
    if shape[0] == 0:
        return np.empty(shape, dtype)
    return np.memmap(data_file(folder, len(shape)), np.dtype(dtype).newbyteorder("<"), "r", shape=shape)


def read_compressed(folder: Path, first: int, after: int) -> Array:
    """Rows first … after-1 of a compressed array. Raises BadArray where they do not decompress."""
    import zarr

    try:
        array: Any = zarr.open_array(str(folder), mode="r")
        if not data_file(folder, array.ndim).exists():
            raise BadArray("data file missing")  # zarr would read the fill value without a word
        return np.asarray(array[first:after])
    except (RuntimeError, ValueError) as error:  # what zarr's codecs raise
        raise BadArray(f"a chunk does not decompress: {error}") from error
