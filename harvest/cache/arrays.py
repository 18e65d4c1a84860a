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

import os
import stat
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import xxhash

from routesae.machine.files import read_json

Array = npt.NDArray[Any]
ChunkHashes = npt.NDArray[np.uint64]
Attributes = tuple[tuple[str, str | tuple[str, ...]], ...]  # what an array's metadata says of it besides, by name

CHUNK_ROWS = 256
CHECKSUM_DIFFERS = "checksum differs from the one recorded"
_HASH_PIECE_BYTES = 1 << 24
_ZSTD_OVERHEAD_BYTES = 1 << 16  # beyond a chunk that does not compress at all; zstd adds 1 in 256
_MOST_CHUNKS = 1 << 20  # of an array: an index of 16 MB, for 268 million rows
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


def data_file(folder: Path, ndim: int) -> Path:
    """The file that holds the rows of the array in `folder`."""
    return folder.joinpath("c", *["0"] * ndim)


def array_hash(array: Array) -> str:
    """xxh3-64 over the little-endian bytes of `array`, read in pieces so that a memmap stays one."""
    hasher = xxhash.xxh3_64()
    rows = max(1, _HASH_PIECE_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        hasher.update(np.ascontiguousarray(array[start : start + rows]).data.cast("B"))
    return hasher.hexdigest()


class Hashed(NamedTuple):
    """whole: as array_hash. chunks: uint64, xxh3-64 of the bytes of each CHUNK_ROWS rows, the last perhaps of fewer.

    Padding is in neither.
    """

    whole: str
    chunks: ChunkHashes


class ChunkHasher:
    """Hashes the rows of one array, given as bytes in order and cut anywhere, whole and by chunk in one pass."""

    def __init__(self, row_bytes: int):
        self._chunk_bytes = CHUNK_ROWS * row_bytes
        self._whole, self._chunk = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._filled = 0  # bytes of the chunk under way
        self._chunks: list[int] = []

    def update(self, rows: memoryview) -> None:
        view = rows.cast("B")
        while view:
            piece = view[: self._chunk_bytes - self._filled]
            self._chunk.update(piece)
            self._whole.update(piece)  # while the core's cache still has it
            self._filled += len(piece)
            if self._filled == self._chunk_bytes:
                self._end_chunk()
            view = view[len(piece) :]

    def finish(self) -> Hashed:
        if self._filled:
            self._end_chunk()
        return Hashed(self._whole.hexdigest(), np.array(self._chunks, np.uint64))

    def _end_chunk(self) -> None:
        self._chunks.append(self._chunk.intdigest())
        self._chunk.reset()
        self._filled = 0


def array_hashes(array: Array) -> Hashed:
    """Both hashes of `array`, read in pieces so that a memmap stays one."""
    row_bytes = prod(array.shape[1:]) * array.itemsize
    hasher = ChunkHasher(row_bytes)
    for start in range(0, len(array), CHUNK_ROWS):
        hasher.update(np.ascontiguousarray(array[start : start + CHUNK_ROWS]).data)
    return hasher.finish()


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


def write_array(
    folder: Path,
    array: Array,
    *,
    chunk_rows: int = CHUNK_ROWS,
    compress: bool = False,
    attributes: Attributes = (),
) -> None:
    """Write `array` whole, without fsync. compress: zstd through zarr; the file is then no memmap.

    Raises OSError where the disk does not take it.
    """
    if compress and len(array):  # of no rows zarr would write no file
        _create(str(folder), array.shape, array.dtype, chunk_rows, attributes, compress=True)[:] = array
        return
    writer = ArrayWriter(folder, array.shape[1:], array.dtype, chunk_rows, attributes)
    try:
        writer.write(array)
        writer.close()
    finally:
        writer.abandon()


@lru_cache(maxsize=64)  # the layers of a shard share theirs, and zarr takes 4 ms over each
def _metadata(shape: tuple[int, ...], dtype: Any, chunk_rows: int, attributes: Attributes) -> bytes:
    store: dict[str, Any] = {}
    _create(store, shape, dtype, chunk_rows, attributes, compress=False)
    return bytes(store["zarr.json"].to_bytes())


def _create(
    store: Any, shape: tuple[int, ...], dtype: Any, chunk_rows: int, attributes: Attributes, *, compress: bool
) -> Any:
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
        attributes=dict(attributes),
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
    """Metadata, size, index and its checksum are what `shape` says. Reads a few kilobytes. Raises BadArray.

    zarr 3.1 reads a missing or cut chunk as the fill value without a word, so this comes before any read. Sizes are
    compared before anything of that size is made: the metadata may be a stranger's.
    """
    chunk_rows = _chunk_rows(folder, shape, np.dtype(dtype), compress=compress)
    path, index_bytes = data_file(folder, len(shape)), index_size(shape, chunk_rows)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadArray("the data is not a regular file")
        if not compress and status.st_size != (wanted := file_bytes(shape, dtype, chunk_rows)):
            raise BadArray(f"{status.st_size:,} bytes where {wanted:,} belong")
        with path.open("rb") as file:
            file.seek(max(0, status.st_size - index_bytes))
            index = file.read(index_bytes)
    except (FileNotFoundError, NotADirectoryError):
        raise BadArray("data file missing") from None
    except OSError as error:
        raise BadArray(f"data file unreadable: {error.strerror}") from None
    if compress:
        _check_compressed_index(index, index_bytes, status.st_size)
    else:
        check_index(index, shape, dtype, chunk_rows)


def index_size(shape: tuple[int, ...], chunk_rows: int) -> int:
    """Bytes of the index at the end of the data. Raises BadArray where there are more chunks than are read."""
    chunks = padded_rows(shape[0], chunk_rows) // chunk_rows
    if chunks > _MOST_CHUNKS:
        raise BadArray(f"{chunks:,} chunks, more than the {_MOST_CHUNKS:,} that are read")
    return _index_bytes(chunks)


def check_index(index: bytes, shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int) -> None:
    """Raises BadArray where an uncompressed array's index is not the one that belongs there."""
    if index != _index(shape, dtype, chunk_rows):
        raise BadArray("chunk index altered")


def _check_compressed_index(index: bytes, expected_bytes: int, file_size: int) -> None:
    if len(index) != expected_bytes or struct.pack("<I", google_crc32c.value(index[:-4])) != index[-4:]:
        raise BadArray("chunk index altered or cut")
    chunks = list(_INDEX_ENTRY.iter_unpack(index[:-4]))
    if _EMPTY_CHUNK in chunks:
        raise BadArray("a chunk was never written")
    if max(offset + length for offset, length in chunks) != file_size - expected_bytes:
        raise BadArray("the chunks do not fill the file")


def _chunk_rows(folder: Path, shape: tuple[int, ...], dtype: Any, *, compress: bool) -> int:
    try:
        metadata = read_json(folder / "zarr.json")
    except (FileNotFoundError, NotADirectoryError):
        raise BadArray("zarr.json missing") from None
    except OSError as error:
        raise BadArray(f"zarr.json unreadable: {error.strerror}") from None
    except ValueError as error:
        raise BadArray(f"zarr.json unreadable: {error!r}") from None
    return chunk_rows_of(metadata, shape, dtype, compress=compress)


def chunk_rows_of(metadata: Any, shape: tuple[int, ...], dtype: Any, *, compress: bool) -> int:
    """Rows an inner chunk, out of metadata that is otherwise exactly what is written here. Raises BadArray."""
    try:
        (codec,) = metadata["codecs"]
        inner = codec["configuration"]
        chunk_rows = inner["chunk_shape"][0]
        found = {
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
    codecs = [name for name in found["codecs"] if not (compress and _is_zstd(name))]
    expected = {
        "shape": list(shape),
        "data type": dtype.name,
        "grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [padded_rows(shape[0], chunk_rows), *shape[1:]]},
        },
        "keys": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": ["sharding_indexed", numbers, little, crc32c, "end"],
        "inner chunk": [chunk_rows, *shape[1:]],
    }
    for name, value in {**found, "codecs": codecs}.items():
        if value != expected[name]:
            raise BadArray(f"{name} {str(value)[:80]} where {expected[name]} belongs")
    return chunk_rows


def _is_zstd(codec: object) -> bool:
    return isinstance(codec, dict) and codec.get("name") == "zstd"


def map_array(folder: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, *, compress: bool = False) -> Array:
    """The array [*shape], memory-mapped read-only; decompressed into memory where it is compressed."""
    if shape[0] == 0:
        return np.empty(shape, dtype)
    if compress:
        return read_compressed(folder, 0, shape[0], shape, dtype)
    return np.memmap(data_file(folder, len(shape)), np.dtype(dtype).newbyteorder("<"), "r", shape=shape)


def read_compressed(folder: Path, first: int, after: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Rows first … after-1 of a compressed array. Raises BadArray where they do not decompress to just those.

    Not through zarr, whose decoder takes whatever memory a chunk's own header asks for.
    """
    import pyarrow as pa

    chunk_rows = _chunk_rows(folder, shape, np.dtype(dtype), compress=True)
    chunks = padded_rows(shape[0], chunk_rows) // chunk_rows
    rows = np.empty((after - first, *shape[1:]), np.dtype(dtype).newbyteorder("<"))
    chunk_bytes = chunk_rows * prod(shape[1:]) * rows.dtype.itemsize
    try:
        with data_file(folder, len(shape)).open("rb") as file:
            file.seek(-_index_bytes(chunks), os.SEEK_END)
            index = list(_INDEX_ENTRY.iter_unpack(file.read(_index_bytes(chunks))[:-4]))
            for chunk in range(first // chunk_rows, -(-after // chunk_rows)):
                offset, length = index[chunk]
                file.seek(offset)
                packed = pa.BufferReader(file.read(min(length, chunk_bytes + _ZSTD_OVERHEAD_BYTES)))
                with pa.CompressedInputStream(packed, "zstd") as stream:
                    plain = np.frombuffer(stream.read(chunk_bytes + 1), np.uint8)
                plain = plain.view(rows.dtype).reshape(chunk_rows, *shape[1:])
                start = chunk * chunk_rows
                piece = slice(max(first, start), min(after, start + chunk_rows))
                rows[piece.start - first : piece.stop - first] = plain[piece.start - start : piece.stop - start]
    except FileNotFoundError:
        raise BadArray("data file missing") from None
    except (OSError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise BadArray(f"a chunk does not decompress: {error}") from error
    return rows
