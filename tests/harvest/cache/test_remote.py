"""A cache in an object store: harvested into it, copied, verified, refused. Against moto's S3 on loopback."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from routesae.cli import main
from routesae.harvest.cache.arrays import hash_of
from routesae.harvest.cache.copying import copy
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.settings import BlockOptions
from routesae.harvest.cache.storage import chunk_hashes
from routesae.harvest.cache.store import blocks
from routesae.harvest.cache.store.blocks import Block, BlockCache
from routesae.harvest.cache.store.bucket import BucketFolder
from routesae.harvest.cache.verify import verify
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import FailedRun, WrongInput
from routesae.tests.object_store import Proxy, Request, put_folder

Settings = Callable[..., HarvestSettings]


@pytest.fixture(scope="session")
def small_settings(tiny_settings: Settings) -> Settings:
    """Of a harvest of 3 shards and one layer: few requests, each of which takes the server here milliseconds."""
    return lambda **changes: tiny_settings(**{"tokens": 4500, "layers": "3", **changes})


@pytest.fixture(scope="session")
def small_cache(small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return harvest(small_settings(out=str(tmp_path_factory.mktemp("small") / "shards")))


def left_of_shards(folder: Path) -> list[Path]:
    """What is on this disk of shards that went to the store."""
    return [path for path in folder.rglob("*") if path.name.lstrip(".").startswith("shard-0")]


def objects(url: str) -> dict[str, bytes]:
    folder = BucketFolder.at(url)
    return {name: folder.read(name, 1 << 30) for name in folder.sizes()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def puts(proxy: Proxy) -> list[str]:
    """The objects that were put, in order, counted from the cache."""
    return [one.path.rpartition("/shards/")[2] for one in proxy.requests if one.method == "PUT"]


@pytest.fixture
def small_remote(small_cache: Cache, s3: Proxy, s3_url: str) -> Cache:
    """The tiny cache, in the store."""
    put_folder(small_cache.folder, s3_url)
    s3.requests.clear()
    return Cache(s3_url)


# ------------------------------------------------------------------------------------------------------- harvest


def test_a_harvest_into_a_store_puts_what_a_harvest_onto_disk_writes(
    small_cache: Cache, small_settings: Settings, s3: Proxy, s3_url: str, tmp_path: Path
) -> None:
    cache = harvest(small_settings(out=s3_url))
    assert str(cache.path) == s3_url
    assert cache.missing() == []
    assert objects(s3_url) == files(small_cache.folder)
    assert left_of_shards(tmp_path / "kept") == []  # nothing is left of them on this disk
    order = puts(s3)
    for group in ["", *(f"shard-{index:05d}/" for index in range(3))]:
        own = [name for name in order if name.startswith(group) and (group or not name.startswith("shard-"))]
        assert own[-1] == f"{group}zarr.json"  # what makes it exist comes last
    before = len(order)
    assert harvest(small_settings(out=s3_url)).missing() == []
    assert len(puts(s3)) == before


def test_zarr_reads_what_is_in_the_store(small_remote: Cache, small_cache: Cache, s3: Proxy) -> None:
    import zarr
    from obstore.store import from_url

    store = from_url(str(small_remote.path), client_options={"allow_http": True})
    group = zarr.open_group(zarr.storage.ObjectStore(store, read_only=True), mode="r")
    layer_nD: Any = group["shard-00001/layer_03"]
    assert np.array_equal(layer_nD[:], small_cache.shard(1).read("layer_03"))


def test_a_shard_without_its_metadata_does_not_exist_and_is_harvested_again(
    small_remote: Cache, small_cache: Cache, small_settings: Settings, s3: Proxy, s3_url: str
) -> None:
    import obstore

    folder = BucketFolder.at(s3_url)
    obstore.delete(folder._store(), folder._key("shard-00001/zarr.json"))
    cut = Cache(s3_url)
    assert cut.missing() == [1]
    assert not cut.has_shard(1)
    s3.requests.clear()
    harvest(small_settings(out=s3_url))
    assert {name.partition("/")[0] for name in puts(s3)} == {"shard-00001"}
    assert objects(s3_url) == files(small_cache.folder)


def test_a_shard_that_was_not_sent_is_sent_by_the_next_harvest_without_the_lm(
    small_cache: Cache,
    small_settings: Settings,
    s3: Proxy,
    s3_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def last_shard_is_refused(request: Request) -> str | None:
        return "break" if request.method != "GET" and "shard-00002/layer_03" in request.path else None

    s3.fault = last_shard_is_refused
    said = r"shard-00002/layer_03.*does not answer as it should.*the same command goes on"
    with pytest.raises(FailedRun, match=said):
        harvest(small_settings(out=s3_url))
    assert Cache(s3_url).missing() == [2]
    assert [path.name for path in (tmp_path / "kept").glob("staged/*/shard-*")] == ["shard-00002"]
    s3.fault = lambda request: None
    monkeypatch.setattr(
        "routesae.harvest.lm.model.load_lm", lambda *args, **options: pytest.fail("the LM was loaded")
    )
    harvest(small_settings(out=s3_url))
    assert objects(s3_url) == files(small_cache.folder)
    assert left_of_shards(tmp_path / "kept") == []


def test_another_machine_goes_on_with_the_tokens_in_the_store(
    small_remote: Cache,
    small_cache: Cache,
    small_settings: Settings,
    s3_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import obstore

    folder = BucketFolder.at(s3_url)
    for name in folder.sizes():
        if name.startswith("shard-00002"):
            obstore.delete(folder._store(), folder._key(name))
    monkeypatch.setattr(blocks, "options", BlockOptions(cache_dir=tmp_path / "elsewhere"))
    text = Path(small_cache.manifest.corpus)
    hidden = text.rename(text.with_suffix(".away"))
    try:
        harvest(small_settings(out=s3_url))  # without the corpus
    finally:
        hidden.rename(text)
    assert objects(s3_url) == files(small_cache.folder)
    with pytest.raises(WrongInput, match=f"{s3_url} was begun with other settings: seed is 0, not 1"):
        harvest(small_settings(out=s3_url, seed=1))


def test_a_place_that_holds_something_else_is_refused(small_settings: Settings, s3: Proxy, s3_url: str) -> None:
    BucketFolder.at(s3_url).put("photos/cat.jpg", b"cat")
    with pytest.raises(WrongInput, match="holds photos and is not a routesae cache"):
        harvest(small_settings(out=s3_url))
    assert objects(s3_url) == {"photos/cat.jpg": b"cat"}


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://bucket/shards", "ftp://bucket/shards is not a place in an object store that is known"),
        ("s3://name:hunter2@bucket/shards", "came with credentials"),
        ("s3://bucket/shards?sig=hunter2", "came with credentials or a query"),
        ("s3://bucket/../other", "has a .. in it"),
        ("s3://no-such-bucket/shards", "there is no bucket no-such-bucket"),
        ("s3://bucket/nothing-here", "s3://bucket/nothing-here is not a cache folder"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line_and_exit_2(s3: Proxy, url: str, said: str) -> None:
    result = CliRunner().invoke(main, ["cache", "info", url])
    assert result.exit_code == 2
    assert said in result.output
    assert result.output.count("\n") == 1
    assert "hunter2" not in result.output


def test_a_store_that_refuses_is_named_without_the_secret(small_remote: Cache, s3: Proxy, s3_url: str) -> None:
    s3.fault = lambda request: "refuse"
    result = CliRunner().invoke(main, ["cache", "info", s3_url])
    assert result.exit_code == 2
    assert f"{s3_url}/zarr.json: the store refuses access" in result.output
    assert "AWS_ACCESS_KEY_ID" in result.output
    assert result.output.count("\n") == 1
    assert "secret-never-shown" not in result.output


def test_without_the_extra_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(WrongInput, match=r"pip install 'routesae\[remote\]'"):
        BucketFolder.at("s3://bucket-of-nobody/shards")


# --------------------------------------------------------------------------------------------- copy, info, verify


def test_a_copy_there_and_back_is_the_same_cache(small_cache: Cache, s3: Proxy, s3_url: str, tmp_path: Path) -> None:
    there = CliRunner().invoke(main, ["cache", "copy", str(small_cache.path), s3_url])
    assert there.exit_code == 0, there.output
    assert there.stdout == f"{s3_url}: 3 shards copied\n"
    assert objects(s3_url) == files(small_cache.folder)
    copy([s3_url], str(tmp_path / "back"))
    assert files(tmp_path / "back") == files(small_cache.folder)
    assert verify(s3_url) == verify(str(small_cache.path))
    again = CliRunner().invoke(main, ["cache", "copy", str(small_cache.path), s3_url])
    assert again.stdout == f"{s3_url}: 0 shards copied\n"


def test_a_copy_from_store_to_store_is_the_same_cache(small_remote: Cache, small_cache: Cache, s3_url: str) -> None:
    copy([s3_url], s3_url + "-again")
    assert objects(s3_url + "-again") == files(small_cache.folder)


def test_a_stopped_copy_goes_on_where_it_stood(small_cache: Cache, s3: Proxy, s3_url: str) -> None:
    s3.fault = lambda request: "break" if "shard-00001/layer_03" in request.path else None
    with pytest.raises(FailedRun, match="shard-00001/layer_03"):
        copy([str(small_cache.path)], s3_url)
    assert Cache(s3_url).missing() == [1, 2]
    s3.fault = lambda request: None
    s3.requests.clear()
    assert copy([str(small_cache.path)], s3_url).copied == 2
    assert {name.partition("/")[0] for name in puts(s3)} == {"shard-00001", "shard-00002"}
    assert objects(s3_url) == files(small_cache.folder)


def test_a_bit_that_flips_on_the_way_is_found(
    small_cache: Cache, small_remote: Cache, s3: Proxy, s3_url: str, tmp_path: Path
) -> None:
    def flipped(request: Request) -> str | None:
        data = request.method == "GET" and "shard-00001/layer_03/c" in request.path and "=-" not in request.range
        return "flip" if data else None

    s3.fault = flipped
    with pytest.raises(WrongInput, match=r"shard-00001 is damaged: layer_03.*checksum differs"):
        copy([s3_url], str(tmp_path / "back"))
    assert Cache(tmp_path / "back").missing() == [1, 2]
    with pytest.raises(FailedRun, match=r"shard-00001.*layer_03.*checksum differs.*after it was sent"):
        copy([str(small_cache.path)], s3_url + "-other")
    assert Cache(s3_url + "-other").missing() == [1, 2]
    assert verify(s3_url).problems == ["shard-00001/layer_03: checksum differs from the one recorded"]


def test_info_of_a_url_says_what_info_of_the_folder_says(
    small_remote: Cache, small_cache: Cache, s3_url: str
) -> None:
    outputs = [CliRunner().invoke(main, ["cache", "info", place]).output for place in (s3_url, str(small_cache.path))]
    assert outputs[0] == outputs[1]
    assert "3 of 3" in outputs[0]


# ------------------------------------------------------------------------------------------------------- reading


def test_an_object_that_is_short_changed_or_gone_is_named(small_remote: Cache, s3: Proxy, s3_url: str) -> None:
    import obstore

    for fault in ("short", "short and says so"):
        s3.fault = lambda request, fault=fault: fault if request.range and "/layer_03/c" in request.path else None
        with pytest.raises((FailedRun, Exception), match=r"bytes|does not answer") as raised:
            chunk_hashes(Cache(s3_url).shard(0).array("layer_03"))
        assert type(raised.value).__name__ in ("FailedRun", "BadArray")
    s3.fault = lambda request: None
    shard = Cache(s3_url).shard(0)
    array = shard.array("layer_03")
    list(array.pieces())
    folder = BucketFolder.at(s3_url) / "shard-00000"
    data = folder.read("layer_03/c/0/0", 1 << 30)
    folder.put("layer_03/c/0/0", data[::-1])
    assert hash_of(chunk_hashes(array)) != shard.record.hashes["layer_03"]  # which whoever reads it compares
    with pytest.raises(Exception, match="chunk index altered"):
        chunk_hashes(Cache(s3_url).shard(0).array("layer_03"))
    folder.put("layer_03/c/0/0", data[:-1])
    with pytest.raises(Exception, match=f"{len(data) - 1:,} bytes where {len(data):,} belong"):
        chunk_hashes(Cache(s3_url).shard(0).array("layer_03"))
    obstore.delete(folder._store(), folder._key("layer_03/c/0/0"))
    with pytest.raises(Exception, match="data file missing"):
        chunk_hashes(Cache(s3_url).shard(0).array("layer_03"))


# ------------------------------------------------------------------------------------------------------ the blocks


def fill(cache: BlockCache, key: str, data: bytes) -> bytes:
    """What the cache has under the key, `data` where it has to fetch it."""
    opened = cache.open(Block(key, len(data), lambda: [data]))
    return os.pread(opened.descriptor, len(data), 0)


def on_disk(cache: BlockCache) -> set[str]:
    return {path.name for path in cache.folder.glob("??/*")}


def test_blocks_used_longest_ago_make_room(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100)
    for key in ("aa1", "bb2", "cc3"):
        fill(cache, key, bytes(30))
    assert on_disk(cache) == {"aa1", "bb2", "cc3"}
    assert fill(cache, "aa1", b"x" * 30) == bytes(30)  # kept, so not fetched, and used last
    fill(cache, "dd4", bytes(30))
    assert on_disk(cache) == {"aa1", "dd4"}  # a block more than is needed goes at once
    with pytest.raises(WrongInput, match="--cache-bytes 100 is too little"):
        fill(cache, "ee5", bytes(101))


def test_an_array_that_is_mapped_stays_readable_when_it_made_room(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100)
    block = Block("aa1", 40, lambda: [bytes(25), b"y" * 15])
    mapped = cache.mapped(block, "u1", (40,))
    for number in range(5):
        fill(cache, f"bb{number}", bytes(30))
    assert "aa1" not in on_disk(cache)
    assert mapped.tobytes() == bytes(25) + b"y" * 15


def test_tokens_that_are_kept_are_compared_with_their_checksum_by_the_next_process(
    small_remote: Cache, small_cache: Cache, s3: Proxy, s3_url: str, tmp_path: Path
) -> None:
    for damage, requests in ((None, True), (None, False), (3, True), (3, True)):
        blocks._blocks_with.cache_clear()
        for kept in tmp_path.glob("kept/blocks/??/*") if damage else ():
            data = bytearray(kept.read_bytes())
            data[damage] ^= 1
            kept.write_bytes(data)
        s3.requests.clear()
        assert np.array_equal(Cache(s3_url).tokens(), small_cache.tokens())
        assert any("/tokens/c" in one.path and "=-" not in one.range for one in s3.requests) == requests


def test_another_process_finds_the_blocks_and_takes_none_that_was_cut(tmp_path: Path) -> None:
    first = BlockCache(tmp_path, 100)
    fill(first, "aa1", b"a" * 30)
    fill(first, "bb2", b"b" * 30)
    damaged = tmp_path / "bb" / "bb2"
    damaged.write_bytes(damaged.read_bytes()[1:])
    (tmp_path / "aa" / ".cc3.12ab.partial").write_bytes(b"cut")  # by one that was killed
    beside = BlockCache(tmp_path, 100)
    assert fill(beside, "aa1", b"z" * 30) == b"a" * 30
    assert fill(beside, "bb2", b"b" * 30) == b"b" * 30
    assert on_disk(beside) == {"aa1", "bb2"}


def test_two_processes_that_write_one_block_both_read_it_and_one_is_kept(tmp_path: Path) -> None:
    caches = [BlockCache(tmp_path, 100) for _ in range(2)]
    at_once = threading.Barrier(2)

    def pieces() -> Iterator[bytes]:
        yield b"a" * 10
        at_once.wait(10)  # both are writing now
        yield b"b" * 20

    with ThreadPoolExecutor(2) as both:
        opened = list(both.map(lambda cache: cache.open(Block("aa1", 30, pieces)), caches))
    assert [os.pread(file.descriptor, 99, 0) for file in opened] == [b"a" * 10 + b"b" * 20] * 2
    assert on_disk(caches[0]) == {"aa1"}


def test_no_block_is_written_through_a_link(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.write_bytes(b"mine")
    cache = BlockCache(tmp_path / "blocks", 100)
    (tmp_path / "blocks" / "aa").mkdir()
    for name in ("aa1", "aa1.partial"):
        (tmp_path / "blocks" / "aa" / name).symlink_to(stranger)
    assert fill(cache, "aa1", b"a" * 30) == b"a" * 30
    assert stranger.read_bytes() == b"mine"


def test_a_full_disk_names_the_options(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100)
    shutil.rmtree(cache.folder)
    with pytest.raises(FailedRun, match=r"does not take a block.*--cache-dir or fewer --cache-bytes"):
        fill(cache, "aa1", bytes(10))


def test_the_options_hold_for_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(blocks, "options", BlockOptions())
    missing = ["train", "--cache", str(tmp_path / "none")]
    given = ["--cache-dir", str(tmp_path / "here"), "--cache-bytes", "2B"]
    assert CliRunner().invoke(main, missing + given).exit_code == 2  # no such cache
    assert blocks.options == BlockOptions(cache_dir=tmp_path / "here", cache_bytes=2_000_000_000)
    wrong = CliRunner().invoke(main, [*missing, "--cache-bytes", "0"])
    assert wrong.exit_code == 2
    assert "--cache-bytes 0 is below 1" in wrong.output
