"""One Zarr v3 array that is one raw file: any zarr reads it, and so does np.memmap.

    <name>/zarr.json   ordinary Zarr v3 array metadata: one shard, inner chunks of `chunk_rows` whole rows,
                       codec "bytes" only, index at the end
    <name>/c/0/0       (or c/0 for one dimension)
        rows           little-endian, C order, n rounded up to whole inner chunks, padded with the fill value
        index          per inner chunk: uint64 offset, uint64 length, little-endian
        crc32c         uint32 of the index

So `np.memmap(file, dtype, "r", shape=shape)` is the array. All bytes are those that zarr itself would write, but they
are written at the file system's rate, which zarr's sharded writer does not reach.

An array's hash is xxh3-64 of its chunk hashes, and a chunk hash is xxh3-64 of the bytes of CHUNK_ROWS rows, so that
every byte is hashed once. Padding and index are in neither. The attributes of a group, which hold those hashes, end
with one of themselves.
"""

import errno
import json
import os
import struct
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import xxhash

from routesae.machine.files import BadFile, parse_json

Array = npt.NDArray[Any]
ChunkHashes = npt.NDArray[np.uint64]

CHUNK_ROWS = 256
# Arrays of a shard to write at once, a thread each. A thread copies 1.6 to 2.2 GB/s into the page cache, and an NVMe
# disk takes 3 to 7; more threads would only take cores and, where there is a GPU, pinned memory of a layer each.
WRITERS = 4
GROUP = {"zarr_format": 3, "node_type": "group"}  # what a group's zarr.json says beside its attributes
CHECKSUM_DIFFERS = "checksum differs from the one recorded"
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)  # what file systems say that lack it for folders
_MOST_CHUNKS = 1 << 20  # of an array: an index of 16 MB, for 268 million rows


class BadArray(Exception):
    """The array at a path is missing, truncated or altered; the message says how, without the path."""


def padded_rows(rows: int, chunk_rows: int) -> int:
    """`rows` rounded up to whole inner chunks; at least one."""
    return max(1, -(-rows // chunk_rows)) * chunk_rows


def file_bytes(shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int = CHUNK_ROWS) -> int:
    """Size in bytes of the one data file of an array."""
    rows = padded_rows(shape[0], chunk_rows)
    return rows * prod(shape[1:]) * np.dtype(dtype).itemsize + index_bytes(shape[0], chunk_rows)


def index_bytes(rows: int, chunk_rows: int) -> int:
    """Size of the index, checksum included. Raises BadArray where there are more chunks than are read."""
    if (chunks := padded_rows(rows, chunk_rows) // chunk_rows) > _MOST_CHUNKS:
        raise BadArray(f"{chunks:,} chunks, more than the {_MOST_CHUNKS:,} that are read")
    return 16 * chunks + 4


def index_of(shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int) -> bytes:
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
    """Writes rows one after another; their number need not be known before.

    A context: its end writes padding, index and metadata. There is no Zarr array before that, or after an error. It
    survives a power cut once `fsync_tree` has been over it.
    """

    def __init__(
        self,
        folder: Path,
        row_shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        chunk_rows: int = CHUNK_ROWS,
        attributes: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.folder, self.row_shape, self.chunk_rows, self.attributes = folder, row_shape, chunk_rows, attributes
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.rows = 0
        path = data_file(folder, 1 + len(row_shape))
        folder.mkdir()  # not its parents: what was deleted under the writer must not come back as a part of itself
        path.parent.mkdir(parents=True)
        self._file = path.open("xb", buffering=0)

    def write(self, rows: Array) -> None:
        """Append rows [n, *row_shape]. Raises OSError where the disk does not take them."""
        assert rows.shape[1:] == self.row_shape, (rows.shape, self.row_shape)
        self._write(np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data)
        self.rows += len(rows)

    def _write(self, view: memoryview) -> None:
        while view:  # a raw write may take less than it is given; on a full disk the next one then fails
            view = view[self._file.write(view) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is not None:
                return
            shape = (self.rows, *self.row_shape)
            padding = padded_rows(self.rows, self.chunk_rows) - self.rows
            fill = np.full((padding, *self.row_shape), np.nan if self.dtype.kind == "f" else 0, self.dtype)
            self._write(memoryview(fill.tobytes() + index_of(shape, self.dtype, self.chunk_rows)))
        metadata = {**array_metadata(shape, self.dtype, self.chunk_rows), "attributes": dict(self.attributes)}
        (self.folder / "zarr.json").write_text(json.dumps(metadata, indent=2))


def write_array(
    folder: Path, array: Array, *, chunk_rows: int = CHUNK_ROWS, attributes: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write `array` whole, without fsync. Raises OSError where the disk does not take it."""
    with ArrayWriter(folder, array.shape[1:], array.dtype, chunk_rows, attributes) as writer:
        writer.write(array)


def array_metadata(shape: tuple[int, ...], dtype: npt.DTypeLike, chunk_rows: int) -> dict[str, Any]:
    """An array's zarr.json without its attributes, as zarr itself writes it."""
    dtype, little = np.dtype(dtype), {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [chunk_rows, *shape[1:]],
        "codecs": [little if dtype.itemsize > 1 else {"name": "bytes"}],  # a byte has no order
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    grid = {"chunk_shape": [padded_rows(shape[0], chunk_rows), *shape[1:]]}
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The zarr.json of a group. Its attributes get another, `checksum`, of all others."""
    signed = {**attributes, "checksum": _checksum(attributes)}
    return {"attributes": signed, **GROUP}


def write_group(folder: Path, attributes: Mapping[str, Any]) -> None:
    """Make the folder a Zarr group."""
    (folder / "zarr.json").write_text(json.dumps(group_metadata(attributes), indent=2))


def read_group(data: bytes, unsigned_formats: Container[int | None] = ()) -> dict[str, Any]:
    """The attributes that `write_group` was given, out of a zarr.json. Raises BadArray where they are not those.

    unsigned_formats: format versions that need no checksum.

    Plain JSON rather than zarr: a cache of 3,000 shards opens in the time of 3,000 small reads.
    """
    try:
        metadata = parse_json(data)
        attributes, kind = metadata["attributes"], {name: metadata[name] for name in GROUP}
    except (ValueError, KeyError, TypeError):
        attributes = kind = None
    if kind != GROUP or not isinstance(attributes, dict):
        raise BadArray("zarr.json missing or unreadable")
    checksum = attributes.pop("checksum", None)
    if checksum != _checksum(attributes) and attributes.get("format_version") not in unsigned_formats:
        raise BadArray(f"zarr.json: {CHECKSUM_DIFFERS}")
    return attributes


def _checksum(attributes: Mapping[str, Any]) -> str:
    """xxh3-64 of the attributes as JSON with sorted keys, which is the same however zarr.json is laid out."""
    return xxhash.xxh3_64_hexdigest(json.dumps(attributes, sort_keys=True).encode())


def fsync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, reach the disk. Not every file system has the second."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """fsync `folder`, and every file and folder below it, so that they survive a power cut."""
    paths = [path for top, _, files in os.walk(folder) for path in (Path(top), *(Path(top, name) for name in files))]
    with ThreadPoolExecutor(WRITERS, thread_name_prefix="fsync") as threads:  # one flush of the disk serves several
        list(threads.map(fsync, paths))


def chunk_rows_of(metadata: Any, shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
    """Rows an inner chunk, out of Zarr metadata that is otherwise exactly what is written here. Raises BadArray."""
    try:
        chunk_rows = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise BadArray(f"zarr.json unreadable: {error!r}") from None
    if type(chunk_rows) is not int or chunk_rows < 1:
        raise BadArray(f"inner chunks of {chunk_rows!r} rows")
    for name, expected in array_metadata(shape, dtype, chunk_rows).items():
        if name != "attributes" and metadata.get(name) != expected:
            raise BadArray(f"zarr.json says {name} is {str(metadata.get(name))[:80]}, not {str(expected)[:80]}")
    return chunk_rows


def checked(
    read: Callable[[str], bytes],
    tail: Callable[[str, int], tuple[int, bytes]],
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
) -> None:
    """Compare an array's metadata, file size and index with what `shape` says; reads a few kilobytes.

    read, tail: those of its folder (store/disk.py). zarr 3.1 reads a missing or cut chunk as the fill value without a
    word, so this comes before any read. Sizes are bounded before anything of that size is made: the metadata may be a
    stranger's. Raises BadArray.
    """
    try:
        metadata = parse_json(read("zarr.json"))
    except FileNotFoundError:
        raise BadArray("zarr.json missing") from None
    except BadFile as bad:
        raise BadArray(f"zarr.json unreadable: {bad!r}") from None
    chunk_rows = chunk_rows_of(metadata, shape, dtype)
    try:
        size, index = tail(data_name(len(shape)), index_bytes(shape[0], chunk_rows))
    except FileNotFoundError:
        raise BadArray("data file missing") from None
    if size != (expected := file_bytes(shape, dtype, chunk_rows)):
        raise BadArray(f"{size:,} bytes where {expected:,} belong")
    if index != index_of(shape, dtype, chunk_rows):
        raise BadArray("chunk index altered")
