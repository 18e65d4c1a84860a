"""One Zarr array that is one raw file: its bytes, its readers, and what is wrong with a damaged one."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import xxhash
import zarr

from routesae.harvest.cache import arrays
from routesae.harvest.cache.arrays import (
    ArrayWriter,
    BadArray,
    chunk_hashes,
    data_file,
    file_bytes,
    write_array,
    write_group,
)
from routesae.harvest.cache.store.disk import DiskArray, DiskFolder

Array = npt.NDArray[Any]
CASES = [
    ((5, 3), "<f2", 2),
    ((256, 4), "<f2", 256),
    ((257, 4), "<f4", 256),
    ((600, 7), "<i4", 256),
    ((9,), "<i4", 9),
    ((1000,), "<i8", 256),
    ((300, 3), "|i1", 256),
    ((2, 3), "<u8", 2),
]


def example(shape: tuple[int, ...], dtype: str) -> Array:
    return (np.random.default_rng(0).standard_normal(shape) * 100).astype(dtype)


def opened(folder: Path, shape: tuple[int, ...], dtype: str) -> DiskArray:
    return DiskFolder(folder).array(shape, dtype, "")


def raw(folder: Path) -> bytes:
    (path,) = [p for p in folder.rglob("*") if p.is_file() and p.name != "zarr.json"]
    return path.read_bytes()


def test_golden_bytes_of_float16(tmp_path: Path) -> None:
    array = np.array([[1.0, -2.0], [0.5, 65504.0], [0.0, -0.0]], "<f2")
    write_array(tmp_path / "a", array, chunk_rows=2)
    assert data_file(tmp_path / "a", 2) == tmp_path / "a" / "c" / "0" / "0"
    assert raw(tmp_path / "a") == bytes.fromhex(
        "003c 00c0"  # row 0
        "0038 ff7b"  # row 1
        "0000 0080"  # row 2
        "007e 007e"  # NaN up to the end of the second chunk
        "0000000000000000 0800000000000000"  # chunk 0: offset 0, 8 bytes
        "0800000000000000 0800000000000000"  # chunk 1: offset 8, 8 bytes
        "12a46c81"  # crc32c of the index
    )


def test_golden_bytes_of_int32(tmp_path: Path) -> None:
    write_array(tmp_path / "a", np.array([1, -1, 258], "<i4"), chunk_rows=4)
    assert data_file(tmp_path / "a", 1) == tmp_path / "a" / "c" / "0"
    assert raw(tmp_path / "a") == bytes.fromhex(
        "01000000 ffffffff 02010000"
        "00000000"  # fill
        "0000000000000000 1000000000000000"  # one chunk: offset 0, 16 bytes
        "5e9306c6"
    )


def test_metadata_is_plain_zarr_v3_with_bytes_only(tmp_path: Path) -> None:
    write_array(tmp_path / "a", example((300, 4), "<f2"))
    metadata = json.loads((tmp_path / "a" / "zarr.json").read_text())
    assert (metadata["zarr_format"], metadata["node_type"], metadata["shape"]) == (3, "array", [300, 4])
    assert metadata["data_type"] == "float16"
    assert metadata["fill_value"] == "NaN"
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [512, 4]
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert sharding["configuration"]["chunk_shape"] == [256, 4]
    assert sharding["configuration"]["index_location"] == "end"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes"]
    assert sharding["configuration"]["codecs"][0]["configuration"]["endian"] == "little"
    assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]


@pytest.mark.parametrize(("shape", "dtype", "chunk_rows"), CASES)
def test_zarr_and_memmap_read_exactly_what_was_written(
    shape: tuple[int, ...], dtype: str, chunk_rows: int, tmp_path: Path
) -> None:
    array = example(shape, dtype)
    write_array(tmp_path / "a", array, chunk_rows=chunk_rows)
    read = zarr.open_array(str(tmp_path / "a"), mode="r")
    assert read.dtype == np.dtype(dtype)
    assert np.array_equal(read[:], array)
    memmap = np.memmap(data_file(tmp_path / "a", len(shape)), dtype, "r", shape=shape)
    assert np.array_equal(memmap, array)
    mapped = next(opened(tmp_path / "a", shape, dtype).pieces())
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, array)
    opened(tmp_path / "a", shape, dtype)
    assert len(raw(tmp_path / "a")) == file_bytes(shape, dtype, chunk_rows)


@pytest.mark.parametrize(("shape", "dtype", "chunk_rows"), CASES)
def test_the_file_is_byte_for_byte_what_zarr_itself_writes(
    shape: tuple[int, ...], dtype: str, chunk_rows: int, tmp_path: Path
) -> None:
    array = example(shape, dtype)
    write_array(tmp_path / "ours", array, chunk_rows=chunk_rows)
    shard_rows = -(-shape[0] // chunk_rows) * chunk_rows
    theirs = zarr.create_array(
        str(tmp_path / "theirs"),
        shape=shape,
        dtype=dtype,
        shards=(shard_rows, *shape[1:]),
        chunks=(chunk_rows, *shape[1:]),
        compressors=None,
        fill_value=np.nan if dtype[1] == "f" else 0,
        config={"write_empty_chunks": True},
    )
    theirs[:] = array
    assert raw(tmp_path / "ours") == raw(tmp_path / "theirs")
    assert (tmp_path / "ours" / "zarr.json").read_bytes() == (tmp_path / "theirs" / "zarr.json").read_bytes()


def test_the_metadata_of_a_group_is_what_zarr_itself_writes(tmp_path: Path) -> None:
    attributes = {"layers": [1, 2], "model": "ü", "revision": None, "mean": 0.1}
    (tmp_path / "ours").mkdir()
    write_group(tmp_path / "ours", attributes)
    checksum = xxhash.xxh3_64_hexdigest(json.dumps(attributes, sort_keys=True).encode())
    signed = {**attributes, "checksum": checksum}
    zarr.open_group(str(tmp_path / "theirs"), mode="w", zarr_format=3, attributes=signed)
    assert (tmp_path / "ours" / "zarr.json").read_bytes() == (tmp_path / "theirs" / "zarr.json").read_bytes()


@pytest.mark.parametrize("value", [0, np.nan])
def test_a_chunk_of_nothing_but_zeros_or_fill_is_still_there(value: float, tmp_path: Path) -> None:
    array = example((30, 4), "<f2")
    array[10:20] = value
    write_array(tmp_path / "a", array, chunk_rows=10)
    opened(tmp_path / "a", (30, 4), "<f2")
    assert np.array_equal(zarr.open_array(str(tmp_path / "a"), mode="r")[:], array, equal_nan=True)
    assert raw(tmp_path / "a")[: array.nbytes] == array.tobytes()


@pytest.mark.parametrize(("shape", "dtype", "chunk_rows"), CASES)
def test_rows_written_piece_by_piece_give_the_same_files(
    shape: tuple[int, ...], dtype: str, chunk_rows: int, tmp_path: Path
) -> None:
    array = example(shape, dtype)
    write_array(tmp_path / "whole", array, chunk_rows=chunk_rows)
    with ArrayWriter(tmp_path / "pieces", shape[1:], dtype, chunk_rows) as writer:
        for start in range(0, len(array), 3):
            writer.write(array[start : start + 3])
        assert not (tmp_path / "pieces" / "zarr.json").exists()  # no array until it ends
    assert raw(tmp_path / "pieces") == raw(tmp_path / "whole")
    assert (tmp_path / "pieces" / "zarr.json").read_bytes() == (tmp_path / "whole" / "zarr.json").read_bytes()


def test_rows_of_another_byte_order_or_stride_are_written_as_the_same_numbers(tmp_path: Path) -> None:
    array = example((40, 6), "<f4")
    write_array(tmp_path / "a", np.asfortranarray(array)[::2, ::-1].astype(">f4"))
    assert np.array_equal(next(opened(tmp_path / "a", (20, 6), "<f4").pieces()), array[::2, ::-1])


def test_an_array_of_no_rows_is_an_array(tmp_path: Path) -> None:
    write_array(tmp_path / "a", np.empty((0, 4), "<f2"))
    opened(tmp_path / "a", (0, 4), "<f2")
    assert next(opened(tmp_path / "a", (0, 4), "<f2").pieces()).shape == (0, 4)
    assert zarr.open_array(str(tmp_path / "a"), mode="r")[:].shape == (0, 4)


def test_an_array_is_not_written_over_another(tmp_path: Path) -> None:
    write_array(tmp_path / "a", example((5, 3), "<f2"))
    before = raw(tmp_path / "a")
    with pytest.raises(FileExistsError):
        write_array(tmp_path / "a", np.zeros((5, 3), "<f2"))
    assert raw(tmp_path / "a") == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def extend_front(path: Path) -> None:
    path.write_bytes(b"\0" * 16 + path.read_bytes())


def alter_index(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def alter_checksum(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def forget_a_chunk(path: Path) -> None:
    """As zarr writes it without write_empty_chunks: an index with a hole, its checksum right."""
    data = path.read_bytes()
    index = struct.pack("<QQ", 2**64 - 1, 2**64 - 1) + data[-4 - 32 : -4][16:]
    path.write_bytes(data[:-36] + index + struct.pack("<I", google_crc32c.value(index)))


def point_outside(path: Path) -> None:
    data = path.read_bytes()
    index = data[-36:-20] + struct.pack("<QQ", len(data), 8)
    path.write_bytes(data[:-36] + index + struct.pack("<I", google_crc32c.value(index)))


DAMAGES = [cut, cut_half, empty, extend, alter_index, alter_checksum, forget_a_chunk, point_outside, Path.unlink]


@pytest.mark.parametrize("damage", [*DAMAGES, extend_front])
def test_check_finds_a_damaged_data_file(damage: Callable[[Path], None], tmp_path: Path) -> None:
    write_array(tmp_path / "a", example((20, 4), "<f2"), chunk_rows=10)
    opened(tmp_path / "a", (20, 4), "<f2")
    damage(data_file(tmp_path / "a", 2))
    with pytest.raises(BadArray):
        opened(tmp_path / "a", (20, 4), "<f2")


@pytest.mark.parametrize("shape", [(19, 4), (20, 5), (20,), (20, 4, 1)])
def test_check_finds_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_array(tmp_path / "a", example((20, 4), "<f2"), chunk_rows=10)
    with pytest.raises(BadArray, match="shape"):
        opened(tmp_path / "a", shape, "<f2")


def test_check_finds_another_width_of_number(tmp_path: Path) -> None:
    write_array(tmp_path / "a", example((20, 4), "<f2"))
    with pytest.raises(BadArray, match="data_type"):
        opened(tmp_path / "a", (20, 4), "<f4")


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[]", b"null", b'{"shape": 3}', b'{"shape": [20, 4]}', b"\xff"]
)
def test_check_finds_missing_or_unreadable_metadata(content: bytes | None, tmp_path: Path) -> None:
    write_array(tmp_path / "a", example((20, 4), "<f2"), chunk_rows=10)
    metadata = tmp_path / "a" / "zarr.json"
    metadata.unlink()
    if content is not None:
        metadata.write_bytes(content)
    with pytest.raises(BadArray, match=r"zarr\.json"):
        opened(tmp_path / "a", (20, 4), "<f2")


@pytest.mark.parametrize(("shape", "dtype"), [((600, 7), "<f2"), ((512, 3), "|i1"), ((1, 9), "<f4"), ((300,), "<i4")])
def test_chunk_hashes_are_xxh3_of_each_256_rows(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    array = example(shape, dtype)
    expected = [xxhash.xxh3_64_intdigest(array[at : at + 256].tobytes()) for at in range(0, len(array), 256)]
    write_array(tmp_path / "a", array)
    for same in (array, next(opened(tmp_path / "a", shape, dtype).pieces()), np.asfortranarray(array)):
        assert (chunk_hashes(same).dtype, chunk_hashes(same).tolist()) == (np.uint64, expected)


def test_no_rows_have_no_chunks() -> None:
    assert chunk_hashes(np.empty((0, 5), np.float16)).tolist() == []


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_without_fsync_of_folders_takes_a_cache(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    synced = []

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    arrays.fsync_tree(tmp_path)
    assert len(synced) == 1


def test_an_fsync_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")

    def full(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", full)
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OSError, match="Input/output"):
            arrays.fsync(path)


@pytest.mark.parametrize("error", [errno.ENODEV, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_mappings_is_read_into_memory(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = example((600, 7), "<f2")
    write_array(tmp_path / "a", array)

    def refused(*args: Any, **options: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(np, "memmap", refused)
    assert np.array_equal(next(opened(tmp_path / "a", (600, 7), "<f2").pieces()), array)
