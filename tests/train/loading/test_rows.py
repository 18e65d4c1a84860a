"""Which reads hold the rows that are wanted, and that no chunk is taken that is not what was written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routesae.harvest.cache.arrays import CHUNK_ROWS, data_file, write_array
from routesae.harvest.cache.manifest import hashed_arrays
from routesae.harvest.cache.reader import Cache
from routesae.reporting import FailedRun
from routesae.train.loading.rows import Read, RowReader, reads_of_rows


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_reads_hold_the_wanted_rows_in_order_and_none_is_of_two_chunks(share: float, tiny_cache: Cache) -> None:
    rows = np.flatnonzero(np.random.default_rng(0).random(5000) < share)
    reads = reads_of_rows(tiny_cache.shard(0), rows, 7)
    picked = [read.first + read.picked for read in reads if read.picked is not None]
    np.testing.assert_array_equal(np.concatenate(picked), rows)
    places = [place for read in reads for place in range(read.rows.start, read.rows.stop)]
    assert places == list(range(7, 7 + len(rows)))
    chunks = [read.first // CHUNK_ROWS for read in reads]
    assert chunks == [(read.after - 1) // CHUNK_ROWS for read in reads]
    assert len(set(chunks)) == len(chunks)


def test_no_rows_are_no_reads(tiny_cache: Cache) -> None:
    assert reads_of_rows(tiny_cache.shard(0), np.empty(0, np.int64), 0) == []


# --------------------------------------------------------------------------------------------------- checked


@pytest.fixture(params=["float16", "int8"])
def folder(request: pytest.FixtureRequest, tiny_cache: Cache, int8_cache: Cache, tmp_path: Path) -> Path:
    whole = tiny_cache if request.param == "float16" else int8_cache
    return Path(shutil.copytree(whole.folder, tmp_path / "shards"))


def flip(array: Path, at: int) -> None:
    """A bit of a byte, in place: the file stays the one that others have open."""
    with data_file(array, 2).open("r+b") as file:
        old = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old[0] ^ 16]), at)


def read(cache: Cache, name: str, first: int, after: int, picked: Any = None) -> Any:
    shard = cache.shard(1)
    plain, wanted = next(iter(shard.array(name).pieces())), Read(shard, first, after, picked)
    rows = np.empty((wanted.rows.stop, plain.shape[1]), plain.dtype)
    RowReader(cache.manifest, cache.manifest.layers).read_array(name, wanted, rows)
    return rows


def bytes_a_row(cache: Cache, name: str) -> int:
    return next(iter(cache.shard(1).array(name).pieces()))[:1].nbytes


def names_of(cache: Cache) -> tuple[str, ...]:
    return hashed_arrays(cache.manifest)


def test_every_chunk_of_every_array_is_compared_the_last_of_fewer_rows_too(folder: Path) -> None:
    cache = Cache(folder)
    kept = cache.shard(1).record.kept
    assert kept % CHUNK_ROWS
    for name in names_of(cache):
        row_bytes = bytes_a_row(cache, name)
        for first in range(0, kept, CHUNK_ROWS):
            after = min(first + CHUNK_ROWS, kept)
            for at in (first * row_bytes, after * row_bytes - 1):
                flip(folder / "shard-00001" / name, at)
                with pytest.raises(
                    FailedRun,
                    match=f"shard-00001/{name} is damaged: rows {first} to {after - 1} are not what was written",
                ):
                    read(cache, name, first, after)
                flip(folder / "shard-00001" / name, at)
            read(cache, name, first, after)


def test_a_bit_of_the_padding_is_no_row_s(folder: Path) -> None:
    cache = Cache(folder)
    kept = cache.shard(1).record.kept
    for name in names_of(cache):
        flip(folder / "shard-00001" / name, kept * bytes_a_row(cache, name))
        read(cache, name, kept - 10, kept)


@pytest.mark.parametrize(
    ("span", "beside"),
    [
        ((300, 310, None), 511),
        ((500, 600, None), 256),
        ((256, 1000, None), 400),
        ((260, 700, np.array([0, 9])), 256),
        ((300, 512, np.array([0, 9])), 302),
    ],
)
def test_rows_within_chunks_are_those_of_the_array_and_their_whole_chunks_are_compared(
    folder: Path, span: Any, beside: int
) -> None:
    cache = Cache(folder)
    for name in names_of(cache):
        expected = cache.shard(1).read(name)[span[0] : span[1]]
        assert np.array_equal(read(cache, name, *span), expected if span[2] is None else expected[span[2]])
        flip(folder / "shard-00001" / name, beside * bytes_a_row(cache, name))
        with pytest.raises(FailedRun, match="rows 256 to 511 are not what was written"):
            read(cache, name, *span)


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda array: flip(array, 40), "checksum differs from the one recorded"),
        (shutil.rmtree, "zarr.json missing"),
        (lambda array: _replaced(array, lambda hashes_CA: hashes_CA[:-1]), "shape"),
        (lambda array: _replaced(array, lambda hashes_CA: hashes_CA[:, :-1]), "shape"),
        (lambda array: _replaced(array, lambda hashes_CA: hashes_CA.astype(np.int64)), "data_type"),
        (lambda array: _replaced(array, lambda hashes_CA: hashes_CA + np.uint64(1)), "checksum differs"),
    ],
)
def test_chunk_hashes_that_are_not_what_was_written_are_refused_by_name(
    folder: Path, alter: Callable[[Path], None], said: str
) -> None:
    alter(folder / "shard-00001" / "chunk_hashes")
    with pytest.raises(FailedRun, match=f"shard-00001/chunk_hashes is damaged: .*{said}.*cache repair") as refused:
        read(Cache(folder), "layer_03", 0, 10)
    assert "\n" not in str(refused.value)


def _replaced(array: Path, change: Callable[[Any], Any]) -> None:
    import zarr

    hashes_CA = zarr.open_array(str(array), mode="r")[:]
    shutil.rmtree(array)
    changed = change(hashes_CA)
    write_array(array, changed, chunk_rows=len(changed))
