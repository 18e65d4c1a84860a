"""The digest of what a cache holds, and `cache repair`; what verify finds is in test_inspect.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from routesae.harvest.cache.arrays import array_hash
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import repair, require_intact, verify
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import FailedRun, WrongInput
from routesae.tests.processes import Command
from routesae.tests.shards import change_attributes


@pytest.fixture
def folder(tiny_cache: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))


def data_of(array: Path) -> Path:
    (file,) = [path for path in (array / "c").rglob("*") if path.is_file()]
    return file


def flip(file: Path, at: int = 1000) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def change(path: Path, **fields: Any) -> None:
    change_attributes(path.parent, **fields)


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


# --------------------------------------------------------------------------------------------------- digest


def test_the_digest_is_of_content_and_not_of_how_the_cache_came_about(tiny_cache: Cache, folder: Path) -> None:
    expected = verify(str(tiny_cache.path)).digest
    change(folder / "zarr.json", versions={"torch": "9"}, model="/elsewhere/model", corpus="/elsewhere/texts.jsonl")
    change(folder / "shard-00002" / "zarr.json", batch_sequences=3)
    (folder / ".shard-00001.99-abc.partial").mkdir()
    (folder / "status.json").write_text("{}")
    assert verify(str(folder)) == ([], expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_the_digest_is_the_same_for_any_number_of_workers(
    workers: int, tiny_cache: Cache, tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    asked = tiny_settings(out=str(tmp_path / "shards"))
    flags = ["--model", asked.model, "--data", asked.data, "--tokens", "9000", "--context", "16", "--layers", "2-5"]
    flags += ["--shard-tokens", "2048", "--device", "cpu", "--out", asked.out, "--workers", str(workers)]
    running = [Command("harvest", *flags, "--worker", index, cwd=tmp_path) for index in range(workers)]
    assert [one.wait(timeout=200) for one in running] == [0] * workers
    assert verify(asked.out) == verify(str(tiny_cache.path))


ALTERATIONS: dict[str, Callable[[Path], object]] = {
    "a bit of a layer": lambda f: flip(data_of(f / "shard-00003" / "layer_02")),
    "a bit of a mean": lambda f: flip(data_of(f / "shard-00003" / "token_mean")),
    "a bit of an order": lambda f: flip(data_of(f / "shard-00003" / "order")),
    "a bit of tokens": lambda f: flip(data_of(f / "tokens")),
    "a bit of document_starts": lambda f: flip(data_of(f / "document_starts"), 100),
    "a shard less": lambda f: shutil.rmtree(f / "shard-00004"),
    "an array less": lambda f: shutil.rmtree(f / "shard-00000" / "layer_05"),
    "another seed": lambda f: change(f / "zarr.json", seed=1),
    "other special ids": lambda f: change(f / "zarr.json", special_ids=[0]),
    "another model's config": lambda f: change(f / "zarr.json", config_hash="x"),
}


@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS)
def test_the_digest_changes_with_anything_that_the_numbers_are(
    alter: Callable[[Path], object], tiny_cache: Cache, folder: Path
) -> None:
    alter(folder)
    assert verify(str(folder)).digest != verify(str(tiny_cache.path)).digest


def test_the_digest_is_of_what_is_read_and_not_of_what_is_recorded(tiny_cache: Cache, folder: Path) -> None:
    record = json.loads((folder / "shard-00001" / "zarr.json").read_text())["attributes"]
    change(folder / "shard-00001" / "zarr.json", hashes={**record["hashes"], "layer_02": "0" * 16})
    found = verify(str(folder))
    assert found.problems == ["shard-00001/layer_02: checksum differs from the one recorded"]
    assert found.digest == verify(str(tiny_cache.path)).digest


def test_a_bit_of_chunk_hashes_is_found_and_not_in_the_digest(tiny_cache: Cache, folder: Path) -> None:
    """They say again what the digest is of."""
    flip(data_of(folder / "shard-00003" / "chunk_hashes"), 40)
    found = verify(str(folder))
    assert found.problems == ["shard-00003/chunk_hashes: checksum differs from the one recorded"]
    assert found.digest == verify(str(tiny_cache.path)).digest


def test_chunk_hashes_that_are_as_recorded_and_not_of_the_rows_are_found(folder: Path) -> None:
    """Else a trainer refused what repair leaves."""
    array = folder / "shard-00003" / "chunk_hashes"
    flip(data_of(array), 8 * (6 + 1))  # the second chunk, layer 3
    record = json.loads((folder / "shard-00003" / "zarr.json").read_text())["attributes"]
    hashes_CA = zarr.open_array(str(array), mode="r")[:]
    change(folder / "shard-00003" / "zarr.json", hashes={**record["hashes"], "chunk_hashes": array_hash(hashes_CA)})
    assert verify(str(folder)).problems == ["shard-00003/chunk_hashes: not those of layer_03, from row 256 on"]
    assert repair(str(folder)).removed == ["shard-00003"]


# --------------------------------------------------------------------------------------------------- repair

DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda shard: flip(data_of(shard / "layer_02")),
    "cut layer": lambda shard: os.truncate(data_of(shard / "layer_03"), 5000),
    "no record": lambda shard: (shard / "zarr.json").unlink(),
    "no layer": lambda shard: shutil.rmtree(shard / "layer_04"),
    "a file of its name": lambda shard: (shutil.rmtree(shard), shard.write_text("x")),
    "a dead link of its name": lambda shard: (shutil.rmtree(shard), shard.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_repair_names_and_removes_just_the_bad_shard(
    damage: Callable[[Path], object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / "shard-00003")
    rest = {name: of for name, of in inodes(folder).items() if not name.startswith("shard-00003")}
    found = repair(str(folder))
    assert (found.removed, found.missing) == (["shard-00003"], 1)
    assert [record.message.split(":")[0].split("/")[0] for record in caplog.records] == ["shard-00003"]
    assert inodes(folder) == rest
    assert sorted(path.name for path in folder.glob("*shard*")) == [f"shard-0000{i}" for i in (0, 1, 2, 4)]


def test_harvest_then_writes_just_that_shard_and_the_cache_is_the_same_again(
    folder: Path, tiny_cache: Cache, tiny_settings: Callable[..., HarvestSettings]
) -> None:
    flip(data_of(folder / "shard-00003" / "layer_02"))
    repair(str(folder))
    before = inodes(folder)
    harvest(tiny_settings(out=str(folder)))
    assert {name: of for name, of in inodes(folder).items() if name in before} == before
    assert verify(str(folder)) == verify(str(tiny_cache.path))


def test_repair_leaves_a_good_cache_as_it_is(folder: Path) -> None:
    before = inodes(folder)
    assert repair(str(folder)) == ([], 0)
    assert inodes(folder) == before


@pytest.mark.parametrize(("name", "at"), [("tokens", 1000), ("document_starts", 9)])
def test_repair_removes_no_shard_where_the_tokens_are_what_is_wrong(name: str, at: int, folder: Path) -> None:
    flip(data_of(folder / name), at)
    assert verify(str(folder)).problems[0] == f"{name}: checksum differs from the one recorded"
    before = inodes(folder)
    with pytest.raises(FailedRun, match=rf"{name}: checksum differs.*cannot be repaired; harvest it again"):
        repair(str(folder))
    assert inodes(folder) == before


def test_a_repair_that_was_killed_leaves_no_half_shard_and_the_next_one_ends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(data_of(folder / "shard-00003" / "layer_02"))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda *given, **how: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            repair(str(folder))
    assert Cache(folder).missing() == [3]
    assert verify(str(folder)).problems == ["shard-00003: missing"]
    assert repair(str(folder)).removed == []
    assert not list(folder.glob(".shard*"))


def test_a_cache_is_refused_before_it_is_used_where_a_checksum_differs(folder: Path) -> None:
    require_intact(Cache(folder))
    flip(data_of(folder / "shard-00004" / "token_std"))
    with pytest.raises(WrongInput, match=r"shard-00004/token_std: checksum differs.*cache repair"):
        require_intact(Cache(folder))
