"""`cache merge`: parts of one cache, harvested apart, become the cache that one harvest would have written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.copying import copy as merge
from routesae.harvest.cache.manifest import shard_arrays
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.store.disk import DiskFolder
from routesae.harvest.cache.verify import verify
from routesae.reporting import Progress, WrongInput
from routesae.tests.shards import change_attributes


def part(cache: Cache, path: Path, *shards: int) -> Path:
    """A copy of the cache with just those shards, as another node would have it."""
    shutil.copytree(cache.path, path)
    for index in set(range(5)) - set(shards):
        shutil.rmtree(path / f"shard-0000{index}")
    change(path / "zarr.json", versions={"torch": path.name})
    return path


def change(path: Path, **fields: Any) -> None:
    change_attributes(path.parent, **fields)


def flip(cache: Path, array: str) -> None:
    file = cache / array / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.unlink()  # not through a hard link
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("link", [False, True])
def test_parts_make_the_cache_of_one_harvest(tiny_cache: Cache, tmp_path: Path, link: bool) -> None:
    parts = [part(tiny_cache, tmp_path / "a", 0, 3), part(tiny_cache, tmp_path / "b", 1, 3, 4)]
    before = [contents(each) for each in parts]
    seen: list[Progress] = []
    found = merge(parts, tmp_path / "whole", link=link, report=seen.append)
    assert (found.copied, found.missing) == (4, 1)
    assert [(now.done, now.total) for now in seen] == [(i, 4) for i in range(1, 5)]
    assert merge([part(tiny_cache, tmp_path / "c", 2)], tmp_path / "whole", link=link) == (1, 0)
    assert verify(str(tmp_path / "whole")) == verify(str(tiny_cache.path))
    assert [contents(each) for each in parts] == before
    links = (tmp_path / "whole" / "shard-00001" / "layer_02" / "c" / "0" / "0").stat().st_nlink
    assert links == (2 if link else 1)
    names = ["document_starts", "roles", *(f"shard-0000{i}" for i in range(5)), "tokens", "zarr.json"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == names


def test_a_merge_that_was_stopped_goes_on_and_copies_nothing_twice(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    fetch = DiskFolder.fetch
    third = 2 * (2 + 2 * len(shard_arrays(tiny_cache.manifest)) + 2)  # of the root, of two shards, into the third one

    def stopped(self: DiskFolder, name: str, target: Path, *, link: bool = False) -> None:
        copied.append(f"{self.path.name}/{name}")
        if len(copied) == third:
            raise KeyboardInterrupt
        fetch(self, name, target, link=link)

    monkeypatch.setattr(DiskFolder, "fetch", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge([tiny_cache.path], tmp_path / "whole")
    there = [path.name for path in (tmp_path / "whole").glob("shard-*")]
    assert there == ["shard-00000", "shard-00001"] or sorted(there) == ["shard-00000", "shard-00001"]
    copied.clear()
    copied.extend([""] * third)
    assert merge([tiny_cache.path], tmp_path / "whole").copied == 3
    assert {name.split("/")[0] for name in copied[third:]} == {"shard-00002", "shard-00003", "shard-00004"}
    assert verify(str(tmp_path / "whole")) == verify(str(tiny_cache.path))
    assert not list((tmp_path / "whole").glob(".*"))


def test_a_shard_that_another_is_writing_is_left_to_it(tiny_cache: Cache, tmp_path: Path) -> None:
    merge([part(tiny_cache, tmp_path / "a", 0)], tmp_path / "whole")
    with Claims(tmp_path / "whole") as claims:
        assert claims.take("shard-00002") is not None
        assert merge([tiny_cache.path], tmp_path / "whole").missing == 1
    assert Cache(tmp_path / "whole").missing() == [2]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"seed": 7}, "seed is 0 in the first, 7 in the second"),
        ({"tokens_hash": "0" * 16}, "tokens_hash is .* in the second"),
        ({"config_hash": "x"}, "config_hash is .*, x in the second"),
        ({"tokens_asked": 8999}, "tokens_asked is 9000 in the first, 8999 in the second"),
    ],
)
def test_parts_of_different_caches_are_refused_and_the_difference_named(
    fields: dict[str, Any], named: str, tiny_cache: Cache, tmp_path: Path
) -> None:
    other = part(tiny_cache, tmp_path / "b", 1)
    change(other / "zarr.json", **fields)
    with pytest.raises(WrongInput, match=f"not parts of one cache: {named}"):
        merge([tiny_cache.path, other], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_damaged_part_is_named_and_what_came_before_it_stays(tiny_cache: Cache, tmp_path: Path) -> None:
    source = part(tiny_cache, tmp_path / "a", 0, 1, 2)
    flip(source, "shard-00001/layer_04")
    with pytest.raises(WrongInput, match=r"a/shard-00001 is damaged: layer_04: checksum differs.*cache repair"):
        merge([source], tmp_path / "whole")
    assert Cache(tmp_path / "whole").missing() == [1, 2, 3, 4]
    assert not list((tmp_path / "whole").glob(".shard*.partial"))


def test_a_part_whose_tokens_are_damaged_is_refused(tiny_cache: Cache, tmp_path: Path) -> None:
    source = part(tiny_cache, tmp_path / "a", 0)
    flip(source, "tokens")
    with pytest.raises(WrongInput, match="a: tokens: checksum differs"):
        merge([source], tmp_path / "whole")


def test_a_shard_that_two_parts_have_differently_is_refused(tiny_cache: Cache, tmp_path: Path) -> None:
    other = part(tiny_cache, tmp_path / "b", 1)
    record = json.loads((other / "shard-00001" / "zarr.json").read_text())["attributes"]
    change(other / "shard-00001" / "zarr.json", hashes={**record["hashes"], "layer_02": "0" * 16})
    with pytest.raises(WrongInput, match=r"shard-00001 and .*b/shard-00001 differ, though they are the same shard"):
        merge([tiny_cache.path, other], tmp_path / "whole")


def test_parts_by_language_models_of_other_weights_are_refused(tiny_cache: Cache, tmp_path: Path) -> None:
    one, other = part(tiny_cache, tmp_path / "a", 0), part(tiny_cache, tmp_path / "b", 1)
    change(other / "zarr.json", weights_hash="x")
    with pytest.raises(WrongInput, match=r"weights_hash is .* in the first, x in the second"):
        merge([one, other], tmp_path / "whole")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: (path.mkdir(), (path / "mine").write_text("x")), "exists and is not a routesae cache"),
        (lambda path: path.write_text("x"), "exists and is not a routesae cache"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(
    prepare: Callable[[Path], object], message: str, tiny_cache: Cache, tmp_path: Path
) -> None:
    prepare(tmp_path / "whole")
    with pytest.raises(WrongInput, match=message):
        merge([tiny_cache.path], tmp_path / "whole")
    assert [path.name for path in tmp_path.rglob("*")] in (["whole"], ["whole", "mine"])


def test_a_cache_is_not_merged_into_itself(tiny_cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_cache.path)
    with pytest.raises(WrongInput, match="is both read and written"):
        merge([tiny_cache.path], tmp_path / "link")
