"""One Zarr v3 array that is one raw file: any zarr reads it, and so does np.memmap.

    <name>/zarr.json   ordinary Zarr v3 array metadata: one shard, inner chunks of `chunk_rows` whole rows,
                       codec "bytes" only, index at the end
    <name>/c/0/0       (or c/0 for one dimension)
        rows           little-endian, C order, n rounded up to whole inner chunks, padded with the fill value
        index          per inner chunk: uint64 offset, uint64 length, little-endian
        crc32c         uint32 of the index

So `np.memmap(file, dtype, "r", shape=shape)` is the array. The metadata is zarr's own; the payload is written
here, at the file system's rate, which zarr's sharded writer does not reach.

An array's hash is xxh3-64 of its chunk hashes, and a chunk hash is xxh3-64 of the bytes of CHUNK_ROWS rows, so that
every byte is hashed once. Padding and index are in neither.
"""

from __future__ import annotations

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
import xxhash

Array = npt.NDArray[Any]
ChunkHashes = npt.NDArray[np.uint64]
Attributes = tuple[tuple[str, str | tuple[str, ...]], ...]  # what an array's metadata says of it besides, by name

CHUNK_ROWS = 256
CHECKSUM_DIFFERS = "checksum differs from the one recorded"
_MOST_CHUNKS = 1 << 20  # of an array: an index of 16 MB, for 268 million rows
_INDEX_ENTRY = struct.Struct("<QQ")


class BadArray(Exception):
    """The array at a path is missing, truncated or altered; the message says how, without the path."""


def padded_rows(rows: int, chunk_rows: int) -> int:
    """`rows` rounded up to whole inner chunks; at least one."""
    return max(1, -(-rows // chunk_rows)) * chunk_rows


def file_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int = CHUNK_ROWS) -> int:
    """Size in bytes of the one data file of an array."""
    rows = padded_rows(shape[0], chunk_rows)
    return rows * prod(shape[1:]) * np.dtype(dtype).itemsize + _index_bytes(rows // chunk_rows)


def _index_bytes(chunks: int) -> int:
    return _INDEX_ENTRY.size * chunks + 4  # and the checksum


def _index(shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int) -> bytes:
    chunk_bytes = chunk_rows * prod(shape[1:]) * np.dtype(dtype).itemsize
    chunks = padded_rows(shape[0], chunk_rows) // chunk_rows
    entries = np.empty((chunks, 2), "<u8")
    entries[:, 0], entries[:, 1] = np.arange(chunks, dtype=np.uint64) * np.uint64(chunk_bytes), chunk_bytes
    index = entries.tobytes()
    return index + struct.pack("<I", google_crc32c.value(index))


def data_name(ndim: int) -> str:
    """The name of the file, below an array's folder, that holds its rows."""
    return "c" + "/0" * ndim


def data_file(folder: Path, ndim: int) -> Path:
    return folder / data_name(ndim)


def chunk_hashes(array: Array) -> ChunkHashes:
    """uint64 [C]: xxh3-64 of the little-endian bytes of each CHUNK_ROWS rows, the last chunk perhaps of fewer.

    A memmap is read chunk by chunk and stays one.
    """
    pieces = (array[start : start + CHUNK_ROWS] for start in range(0, len(array), CHUNK_ROWS))
    hashes = [xxhash.xxh3_64_intdigest(np.ascontiguousarray(piece).data.cast("B")) for piece in pieces]
    return np.array(hashes, np.uint64)


def hash_of(chunks: ChunkHashes) -> str:
    """The hash of an array: xxh3-64 of its chunk hashes as little-endian uint64."""
    return xxhash.xxh3_64_hexdigest(chunks.astype("<u8").tobytes())


def array_hash(array: Array) -> str:
    return hash_of(chunk_hashes(array))


class ArrayWriter:
    """Writes rows one after another; the number of rows need not be known before `close`.

    Nothing of it is a Zarr array until `close`, which pads and writes index and metadata. It is on the disk for
    good once `fsync_tree` has been over it.
    """

    def __init__(
        self,
        folder: Path,
        row_shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        chunk_rows: int = CHUNK_ROWS,
        attributes: Attributes = (),
    ):
        self.folder = folder
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.chunk_rows = chunk_rows
        self.attributes = attributes
        self.rows = 0
        path = data_file(folder, 1 + len(row_shape))
        path.parent.mkdir(parents=True)
        self._file = path.open("wb", buffering=0)

    def write(self, rows: Array) -> None:
        """Append rows [n, *row_shape]."""
        assert rows.shape[1:] == self.row_shape, (rows.shape, self.row_shape)
        self._write(np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data)
        self.rows += len(rows)

    def _write(self, view: memoryview) -> None:
        while view:  # a raw write may take less than it is given; on a full disk the next one then fails
            view = view[self._file.write(view) :]

    def close(self) -> None:
        shape = (self.rows, *self.row_shape)
        padding = padded_rows(self.rows, self.chunk_rows) - self.rows
        fill = np.full((padding, *self.row_shape), _fill_value(self.dtype), self.dtype)
        self._write(memoryview(fill.tobytes() + _index(shape, self.dtype, self.chunk_rows)))
        self._file.close()
        (self.folder / "zarr.json").write_bytes(_metadata(shape, self.dtype, self.chunk_rows, self.attributes))

    def abandon(self) -> None:
        """Close the file without making an array of it."""
        self._file.close()


def write_array(folder: Path, array: Array, *, chunk_rows: int = CHUNK_ROWS, attributes: Attributes = ()) -> None:
    """Write `array` whole, without fsync. Raises OSError where the disk does not take it."""
    writer = ArrayWriter(folder, array.shape[1:], array.dtype, chunk_rows, attributes)
    try:
        writer.write(array)
        writer.close()
    finally:
        writer.abandon()


@lru_cache(maxsize=64)  # the layers of a shard share theirs, and zarr takes 4 ms over each
def _metadata(shape: tuple[int, ...], dtype: Any, chunk_rows: int, attributes: Attributes) -> bytes:
    import zarr

    store: dict[str, Any] = {}
    zarr.create_array(
        store,
        shape=shape,
        dtype=dtype,
        shards=(padded_rows(shape[0], chunk_rows), *shape[1:]),
        chunks=(chunk_rows, *shape[1:]),
        filters=None,
        compressors=None,
        fill_value=_fill_value(dtype),
        attributes=dict(attributes),
    )
    return bytes(store["zarr.json"].to_bytes())


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


def index_size(shape: tuple[int, ...], chunk_rows: int) -> int:
    """Bytes of the index at the end of the data. Raises BadArray where there are more chunks than are read."""
    chunks = padded_rows(shape[0], chunk_rows) // chunk_rows
    if chunks > _MOST_CHUNKS:
        raise BadArray(f"{chunks:,} chunks, more than the {_MOST_CHUNKS:,} that are read")
    return _index_bytes(chunks)


def check_index(index: bytes, shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int) -> None:
    """Raises BadArray where an array's index is not the one that belongs there."""
    if index != _index(shape, dtype, chunk_rows):
        raise BadArray("chunk index altered")


def chunk_rows_of(metadata: Any, shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """Rows an inner chunk, out of Zarr metadata that is otherwise exactly what is written here. Raises BadArray."""
    dtype = np.dtype(dtype)
    try:
        (codec,) = metadata["codecs"]
        inner = codec["configuration"]
        chunk_rows = inner["chunk_shape"][0]
        actual = {
            "shape": metadata["shape"],
            "data type": metadata["data_type"],
            "grid": metadata["chunk_grid"],
            "keys": metadata["chunk_key_encoding"],
            "codecs": [codec["name"], *inner["codecs"], *inner["index_codecs"], inner["index_location"]],
            "inner chunk": inner["chunk_shape"],
        }
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadArray(f"zarr.json unreadable: {error!r}") from None
    if type(chunk_rows) is not int or chunk_rows < 1:
        raise BadArray(f"inner chunks of {chunk_rows!r} rows")
    little, crc32c = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    numbers = little if dtype.itemsize > 1 else {"name": "bytes"}  # a byte has no order
    grid = {"chunk_shape": [padded_rows(shape[0], chunk_rows), *shape[1:]]}
    expected = {
        "shape": list(shape),
        "data type": dtype.name,
        "grid": {"name": "regular", "configuration": grid},
        "keys": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": ["sharding_indexed", numbers, little, crc32c, "end"],
        "inner chunk": [chunk_rows, *shape[1:]],
    }
    for name, value in actual.items():
        if value != expected[name]:
            raise BadArray(f"{name} is {str(value)[:80]}, not {expected[name]}")
    return chunk_rows
