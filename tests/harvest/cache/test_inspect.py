"""What `routesae cache info` and `routesae cache verify` find in good and damaged caches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routesae.harvest.cache.arrays import array_hash, data_file, read_group, write_array
from routesae.harvest.cache.inspect import describe
from routesae.harvest.cache.manifest import DOCUMENTS
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import verify
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import Progress, WrongInput
from routesae.tests.shards import change_attributes


@pytest.fixture
def folder(tiny_cache: Cache, tmp_path: Path) -> Path:
    """A copy of the finished cache, to damage."""
    shutil.copytree(tiny_cache.path, tmp_path / "shards")
    return tmp_path / "shards"


def the_file(array: Path) -> Path:
    (file,) = [path for path in (array / "c").rglob("*") if path.is_file()]
    return file


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def truncate(file: Path, to: int) -> None:
    file.write_bytes(file.read_bytes()[:to])


def replace_order(folder: Path, change: Callable[[Any], Any], *, with_hash: bool) -> None:
    """Write another `order` into shard 1; with_hash: its record agrees."""
    shard = folder / "shard-00001"
    order = change(np.array(np.memmap(data_file(shard / "order", 1), "<i4", "r", shape=read_kept(shard))))
    shutil.rmtree(shard / "order")
    write_array(shard / "order", order, chunk_rows=len(order))
    if with_hash:
        record_hash(shard, "order", order)


def read_kept(shard: Path) -> int:
    return int(json.loads((shard / "zarr.json").read_text())["attributes"]["kept"])


def record_hash(shard: Path, name: str, values: Any) -> None:
    record = read_group((shard / "zarr.json").read_bytes())
    change_attributes(shard, hashes={**record["hashes"], name: array_hash(values)})


def swap(order: Any) -> Any:
    order[[3, 4]] = order[[4, 3]]
    return order


def repeat(order: Any) -> Any:
    order[3] = order[4]
    return order


def other_tokens(folder: Path) -> None:
    """Token ids that are whole and hashed, but not those of the corpus."""
    shard = folder / "shard-00001"
    token_ids_sT = np.array(np.memmap(data_file(shard / "token_ids", 2), "<i4", "r", shape=(128, 16)))
    token_ids_sT[5, 5] += 1
    shutil.rmtree(shard / "token_ids")
    write_array(shard / "token_ids", token_ids_sT, chunk_rows=128)
    record_hash(shard, "token_ids", token_ids_sT)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated layer": (
        lambda f: truncate(the_file(f / "shard-00001/layer_03"), 5000),
        "shard-00001/layer_03",
        "bytes",
    ),
    "emptied layer": (lambda f: truncate(the_file(f / "shard-00004/layer_05"), 0), "shard-00004/layer_05", "bytes"),
    "flipped bit": (lambda f: flip(the_file(f / "shard-00003/layer_02"), 70_001), "shard-00003/layer_02", "checksum"),
    "altered index": (lambda f: flip(the_file(f / "shard-00003/layer_02"), -30), "shard-00003/layer_02", "index"),
    "missing layer": (lambda f: shutil.rmtree(f / "shard-00002/layer_04"), "shard-00002/layer_04", "missing"),
    "missing data": (lambda f: the_file(f / "shard-00002/layer_04").unlink(), "shard-00002/layer_04", "missing"),
    "missing shard": (lambda f: shutil.rmtree(f / "shard-00002"), "shard-00002", "missing"),
    "missing record": (lambda f: (f / "shard-00002/zarr.json").unlink(), "shard-00002", "zarr.json"),
    "other shard": (
        lambda f: (shutil.rmtree(f / "shard-00002"), shutil.copytree(f / "shard-00001", f / "shard-00002")),
        "shard-00002",
        "record is of shard 1",
    ),
    "swapped order": (lambda f: replace_order(f, swap, with_hash=False), "shard-00001/order", "checksum"),
    "repeated order": (lambda f: replace_order(f, repeat, with_hash=True), "shard-00001/order", "not a permutation"),
    "altered token ids": (
        lambda f: flip(the_file(f / "shard-00001/token_ids"), 100),
        "shard-00001/token_ids",
        "checksum",
    ),
    "other token ids": (other_tokens, "shard-00001/token_ids", "not rows 128 to 255"),
    "truncated tokens": (lambda f: truncate(the_file(f / "tokens"), 1000), "tokens", "bytes"),
    "missing tokens": (lambda f: shutil.rmtree(f / "tokens"), "tokens", "missing"),
    "truncated starts": (lambda f: truncate(the_file(f / "document_starts"), 100), "document_starts", "bytes"),
    "altered roles": (lambda f: flip(the_file(f / "roles"), 100), "roles", "checksum"),
    "altered documents": (lambda f: flip(f / DOCUMENTS, 100), DOCUMENTS, "checksum"),
    "missing documents": (lambda f: (f / DOCUMENTS).unlink(), DOCUMENTS, "missing"),
    "missing starts": (lambda f: shutil.rmtree(f / "document_starts"), "document_starts", "missing"),
}


@pytest.mark.parametrize(("damage", "where", "what"), DAMAGES.values(), ids=DAMAGES)
def test_verify_names_just_what_is_damaged(
    damage: Callable[[Path], object], where: str, what: str, folder: Path
) -> None:
    damage(folder)
    (problem,) = verify(str(folder)).problems
    place = problem.removeprefix(f"{folder}/").replace(" is damaged", "").split(": ")[0]
    assert place == where
    assert what in problem


@pytest.mark.parametrize(("name", "at"), [("tokens", 128 * 16 * 4 + 8), ("document_starts", 8 * 7)])
def test_verify_finds_what_is_altered_of_the_tokens_and_blames_no_shard(name: str, at: int, folder: Path) -> None:
    flip(the_file(folder / name), at)
    assert [problem.split(": ")[0] for problem in verify(str(folder)).problems] == [name]


def test_verify_names_every_bad_shard_at_once(folder: Path) -> None:
    shutil.rmtree(folder / "shard-00000")
    truncate(the_file(folder / "shard-00001/layer_03"), 5000)
    flip(the_file(folder / "shard-00001/layer_04"), 0)
    flip(the_file(folder / "shard-00004/order"), 0)
    assert [problem.split(": ")[0] for problem in verify(str(folder)).problems] == [
        "shard-00000",
        "shard-00001/layer_03",
        "shard-00001/layer_04",
        "shard-00004/order",
    ]


def test_verify_finds_nothing_in_a_good_cache_and_tells_how_far_it_is(tiny_cache: Cache) -> None:
    seen: list[Progress] = []
    assert verify(str(tiny_cache.path), seen.append).problems == []
    assert [(now.done, now.total, now.unit) for now in seen] == [(i, 5, "shards") for i in range(1, 6)]


def test_what_verify_names_is_mended_by_deleting_it_and_harvesting_again(
    folder: Path, tiny_cache: Cache, tiny_settings: Callable[..., HarvestSettings]
) -> None:
    flip(the_file(folder / "shard-00003/layer_02"), 500)
    (problem,) = verify(str(folder)).problems
    shutil.rmtree(folder / problem.split("/")[0])
    harvest(tiny_settings(out=str(folder)))
    assert verify(str(folder)).problems == []


def test_describe_names_missing_shards_bytes_and_counts(folder: Path) -> None:
    assert describe(str(folder)).facts["shards"] == "5 of 5"
    shutil.rmtree(folder / "shard-00002")
    shutil.rmtree(folder / "shard-00004")
    facts = describe(str(folder)).facts
    assert facts["shards"] == "3 of 5; missing 2, 4"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert facts["on disk"] == f"{size / 1e6:.1f} MB, 288 B a token"
    manifest = Cache(folder).manifest
    assert facts["tokens"] == "562 rows of 16; the last 29 rows held out"
    assert facts["kept"].startswith(f"{manifest.kept_tokens:,} tokens; {562 * 16 - manifest.kept_tokens:,} ")
    assert f"{manifest.documents:,} used" in facts["documents"]


def test_describe_gives_statistics_of_every_layer_over_the_shards_present(folder: Path) -> None:
    shutil.rmtree(folder / "shard-00001")
    rows = describe(str(folder)).layers
    assert [row["layer"] for row in rows] == [2, 3, 4, 5]
    for row in rows:
        stored = [shard.read(f"layer_{row['layer']:02d}") for shard in Cache(folder).shards()]
        values = np.concatenate([part.ravel() for part in stored]).astype(np.float64)
        assert row["mean"] == pytest.approx(values.mean(), abs=1e-4 * values.std())
        assert row["mean square"] == pytest.approx((values**2).mean(), rel=1e-3)  # stored numbers are rounded
        assert row["max abs"] == pytest.approx(np.abs(values).max(), rel=1e-3)
        assert row["clipped"] == 0


def test_describe_of_a_cache_without_shards_has_no_statistics(folder: Path) -> None:
    for shard in folder.glob("shard-*"):
        shutil.rmtree(shard)
    found = describe(str(folder))
    assert found.facts["shards"] == "0 of 5; missing 0, 1, 2, 3, 4"
    assert found.layers == []


@pytest.mark.parametrize("look", [describe, verify])
def test_a_folder_that_is_no_cache_is_wrong_input(look: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="is not a cache folder"):
        look(str(tmp_path))
