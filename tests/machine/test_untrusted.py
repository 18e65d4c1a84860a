"""Files that a stranger wrote: refused in one line, with little memory, and nothing outside their folder touched."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routesae.harvest.cache.arrays import BadArray, data_file, write_array
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.store.disk import DiskFolder
from routesae.harvest.cache.verify import repair, verify
from routesae.machine.files import LARGEST_BYTES, BadFile, parse_json, read_json, refuse_link, write_json
from routesae.reporting import WrongInput
from routesae.tests.shards import change_attributes


@contextmanager
def within(limit_bytes: int) -> Iterator[None]:
    """Fails where more is allocated at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


@pytest.fixture
def folder(tiny_cache: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))


def change(path: Path, **fields: Any) -> None:
    change_attributes(path.parent, **fields)


# ---------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
        (b'{"a": 1, "b": "x:y", "a" : 2}', "the key 'a' stands twice"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": -Infinity}', "not JSON"),
        (b'{"a": 1e999}', "not JSON: 1e999 is not a finite number"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"{", "not JSON"),
    ],
)
def test_json_that_two_readers_could_take_differently_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadFile, match=why):
        parse_json(data)


def test_plain_json_is_read_as_python_reads_it() -> None:
    text = '{"a": [1, 2.5, -0.0, null, true, "\\u00e9"], "b": {"a": ' + "[" * 60 + "]" * 60 + "}}"
    assert parse_json(text.encode()) == json.loads(text)


def test_only_regular_files_of_a_few_megabytes_are_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b" " * (LARGEST_BYTES + 1))
    os.truncate(tmp_path / "large", 1 << 40)  # a terabyte, none of it on the disk
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, why in {"large": "at most", "pipe": "regular", "zero": "regular", ".": "regular"}.items():
        with within(10_000_000), pytest.raises(BadFile, match=why):
            read_json(tmp_path / name)


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "target")
    with pytest.raises(WrongInput, match=r"metrics\.jsonl is a symbolic link"):
        refuse_link(tmp_path / "metrics.jsonl")
    refuse_link(tmp_path / "target")
    refuse_link(tmp_path / "absent")


# ------------------------------------------------------------------------------------------------ manifests

MANIFESTS: dict[str, dict[str, Any]] = {
    "rows beyond any disk": {"rows": 10**18},
    "more shards than names": {"rows": 10**9, "shard_rows": 1},
    "shards beyond int32": {"rows": 2**30, "shard_rows": 2**30},
    "no rows": {"rows": 0},
    "rows below none": {"rows": -5},
    "half a row": {"rows": 562.5},
    "rows as text": {"rows": "562"},
    "rows as a truth": {"rows": True},
    "width beyond any model": {"width": 10**18},
    "no layers": {"layers": []},
    "layers as text": {"layers": "2345"},
    "half a layer": {"layers": [2, 2.5, 3, 4]},
    "a layer for ever": {"layers": [2, 10**18], "model_layers": 10**18},
    "layers twice": {"layers": [2, 2, 3, 4]},
    "documents below none": {"documents": -1},
    "seed below none": {"seed": -1},
    "special ids as text": {"special_ids": ["../.."]},
    "special ids beyond int32": {"special_ids": [2**40]},
    "a dtype of its own": {"dtype": "object"},
    "a codec of its own": {"compress": "pickle"},
    "chunk hashes or not": {"chunk_hashes": False},
    "versions in a list": {"versions": ["x"]},
    "versions of versions": {"versions": {"torch": {"a": 1}}},
    "a model in a list": {"model": ["x"]},
    "a revision by number": {"revision": 3},
    "an unknown field": {"surprise": 1},
}


@pytest.mark.parametrize("fields", MANIFESTS.values(), ids=MANIFESTS)
def test_a_hostile_manifest_is_refused_in_one_line(fields: dict[str, Any], folder: Path) -> None:
    change(folder / "zarr.json", **fields)
    with within(20_000_000), pytest.raises(WrongInput) as refused:
        Cache(folder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("fields", [{"rows": 10**9, "shard_rows": 2**20}, {"documents": 10**12}, {"width": 10**6}])
def test_a_manifest_of_other_sizes_than_the_files_is_found_before_they_are_read(
    fields: dict[str, Any], folder: Path
) -> None:
    change(folder / "zarr.json", **fields)
    with within(20_000_000):
        problems = verify(str(folder)).problems
    assert problems
    assert not any("\n" in problem for problem in problems)


# -------------------------------------------------------------------------------------------------- records

RECORDS: dict[str, dict[str, Any]] = {
    "rows below none": {"rows": [-128, 0]},
    "rows as numbers with a point": {"rows": [128.0, 256.0]},
    "three rows": {"rows": [128, 256, 300]},
    "more kept than there is": {"kept": 10**18},
    "half a position": {"kept": 1920.0},
    "kept below none": {"kept": -1},
    "hashes in a list": {"hashes": []},
    "no hashes": {"hashes": {}},
    "a hash by number": {"hashes": {"layer_02": 3}},
    "statistics without end": {"statistics": {"2": {"mean": 1e999, "mean_square": 1, "max_abs": 1, "clipped": 0}}},
    "statistics as a list": {"statistics": []},
    "weights by number": {"weights_hash": 3},
    "statistics as text": {"statistics": {"2": {"mean": "x", "mean_square": 1, "max_abs": 1, "clipped": 0}}},
    "statistics in a list": {"statistics": {"2": [1, 1, 1]}},
    "statistics of another kind": {"statistics": {"2": {"median": 1}}},
    "no statistics": {"statistics": {}},
    "statistics of no layer": {"statistics": {"9": {"mean": 1.0, "mean_square": 1, "max_abs": 1, "clipped": 0}}},
    "half a value clipped": {"statistics": {"2": {"mean": 1, "mean_square": 1, "max_abs": 1, "clipped": 0.5}}},
}


@pytest.mark.parametrize("fields", RECORDS.values(), ids=RECORDS)
def test_a_hostile_record_is_refused_and_the_shard_named(fields: dict[str, Any], folder: Path) -> None:
    change(folder / "shard-00001" / "zarr.json", **fields)
    with within(20_000_000), pytest.raises(WrongInput, match="shard-00001 is damaged") as refused:
        list(Cache(folder).shards())
    assert "\n" not in str(refused.value)


# --------------------------------------------------------------------------------------------------- arrays


def set_metadata(array: Path, change: Callable[[dict[str, Any]], object]) -> None:
    metadata = json.loads((array / "zarr.json").read_text())
    change(metadata)
    (array / "zarr.json").write_text(json.dumps(metadata))


def inner(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata["codecs"][0]["configuration"]


METADATA: dict[str, Callable[[dict[str, Any]], object]] = {
    "chunks of nothing": lambda m: inner(m)["chunk_shape"].__setitem__(0, 0),
    "chunks below nothing": lambda m: inner(m)["chunk_shape"].__setitem__(0, -256),
    "chunks beyond any memory": lambda m: inner(m)["chunk_shape"].__setitem__(0, 10**18),
    "half a chunk": lambda m: inner(m)["chunk_shape"].__setitem__(0, 2.5),
    "chunks as text": lambda m: inner(m).__setitem__("chunk_shape", "ab"),
    "another codec": lambda m: inner(m)["codecs"].append({"name": "numcodecs.pickle"}),
    "big endian": lambda m: inner(m)["codecs"][0]["configuration"].__setitem__("endian", "big"),
    "an index elsewhere": lambda m: inner(m).__setitem__("index_location", "start"),
    "no codec": lambda m: m.__setitem__("codecs", []),
    "codecs by name": lambda m: m.__setitem__("codecs", {"a": 1}),
    "other keys": lambda m: m["chunk_key_encoding"].__setitem__("name", "v2"),
    "a grid of many files": lambda m: m["chunk_grid"]["configuration"].__setitem__("chunk_shape", [256, 4]),
}


@pytest.mark.parametrize("alter", METADATA.values(), ids=METADATA)
def test_metadata_of_another_array_than_is_written_here_is_refused(
    alter: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    write_array(tmp_path / "a", np.zeros((600, 4), np.float16))
    DiskFolder(tmp_path / "a").array((600, 4), "<f2", "")
    set_metadata(tmp_path / "a", alter)
    with within(20_000_000), pytest.raises(BadArray):
        DiskFolder(tmp_path / "a").array((600, 4), "<f2", "")


def test_an_index_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    write_array(tmp_path / "a", np.zeros((512, 1), np.int32), chunk_rows=1)
    shape = (2**36, 1)
    set_metadata(tmp_path / "a", lambda m: m.update(shape=list(shape)))
    set_metadata(tmp_path / "a", lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=list(shape)))
    os.truncate(data_file(tmp_path / "a", 2), 2**36 * 20 + 4)
    with within(20_000_000), pytest.raises(BadArray, match="chunks, more than"):
        DiskFolder(tmp_path / "a").array(shape, "<i4", "")


def test_a_pipe_in_place_of_the_data_is_not_opened(tmp_path: Path) -> None:
    write_array(tmp_path / "a", np.zeros((600, 4), np.float16))
    data_file(tmp_path / "a", 2).unlink()
    os.mkfifo(data_file(tmp_path / "a", 2))
    with pytest.raises(BadArray, match="not a regular file"):
        DiskFolder(tmp_path / "a").array((600, 4), "<f2", "")


# ---------------------------------------------------------------------------------------------------- links


def elsewhere(folder: Path, path: Path) -> Path:
    """Move what is at `path` out of the cache, and leave a link to it."""
    target = folder.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)
    return target


@pytest.mark.parametrize("path", ["shard-00001", "shard-00001/layer_03", "shard-00001/layer_03/c/0/0"])
def test_a_link_out_of_the_cache_is_no_part_of_it_and_repair_deletes_the_link_alone(path: str, folder: Path) -> None:
    target = elsewhere(folder, folder / path)
    kept = {file: file.read_bytes() for file in [target, *target.rglob("*")] if file.is_file()}
    with pytest.raises(BadArray, match="a symbolic link leads out of the cache"):
        Cache(folder).shard(1).read("layer_03")
    assert all("shard-00001" in problem for problem in verify(str(folder)).problems)
    assert repair(str(folder)).removed == ["shard-00001"]
    assert not (folder / "shard-00001").exists()
    assert not (folder / "shard-00001").is_symlink()
    assert {file: file.read_bytes() for file in kept} == kept


def test_tokens_behind_a_link_out_of_the_cache_are_refused(folder: Path) -> None:
    elsewhere(folder, folder / "tokens")
    with pytest.raises(WrongInput, match="tokens is damaged: a symbolic link leads out of the cache"):
        Cache(folder).tokens()


def test_a_cache_that_is_itself_behind_a_link_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert verify(str(tmp_path / "link")).problems == []


def test_what_is_written_is_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    """JSON has no NaN and no infinity; other readers than Python's refuse a file that holds one."""
    file, nan, inf = tmp_path / "scores.json", float("nan"), float("inf")
    write_json(file, {"saes": [{"NormMSE": nan, "interval": (nan, 1.5), "n": 3}], "deep": {"a": [[inf, -inf]]}})
    assert read_json(file) == {
        "saes": [{"NormMSE": None, "interval": [None, 1.5], "n": 3}],
        "deep": {"a": [[None, None]]},
    }
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file)["saes"][0]["n"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
