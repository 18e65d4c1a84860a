"""A cache damaged before or under a training run: named and refused, repaired, and the same SAE in the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import repair, verify
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import FailedRun, Progress, WrongInput
from routesae.tests.object_store import Proxy, Request, put_folder
from routesae.train.run import train
from routesae.train.settings import TrainSettings

WEIGHTS = "sae_weights.safetensors"
Settings = Callable[..., TrainSettings]


@pytest.fixture
def folder(tiny_cache: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_cache.path, tmp_path / "shards"))


@pytest.fixture(scope="module")
def expected(tiny_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that `run_of` gives over an undamaged cache."""
    (result,) = train(run_of(tiny_cache.path, tmp_path_factory.mktemp("saes")))
    return (result.folder / WEIGHTS).read_bytes()


def run_of(cache: Path | str, out: Path, **changes: Any) -> TrainSettings:
    from routesae.train.settings import settings_of

    given = {"cache": str(cache), "out": str(out), "sae": "topk", "layer": 3, "latents": 64, "k": 8, "lr": 3e-3}
    given |= {"batch_tokens": 500, "epochs": 2, "checkpoint_every_steps": 1, "log_every_steps": 1, "device": "cpu"}
    return settings_of({**given, **changes})


def data_of(shard: Path) -> Path:
    return shard / "layer_03" / "c" / "0" / "0"


def flip(file: Path, at: int) -> None:
    """A bit of a byte, counted from the end where `at` is negative; in place, as a disk would."""
    with file.open("r+b") as opened:
        at %= os.fstat(opened.fileno()).st_size
        old = os.pread(opened.fileno(), 1, at)
        os.pwrite(opened.fileno(), bytes([old[0] ^ 1]), at)


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "deleted": (shutil.rmtree, "lacks 1 of its 5 shards .first shard-00002", "shard-00002: missing"),
    "truncated": (lambda shard: os.truncate(data_of(shard), 5000), "shard-00002/layer_03 is damaged", "5,000 bytes"),
    "a bit of its index": (lambda shard: flip(data_of(shard), -20), "shard-00002/layer_03 is damaged", "index"),
    "a bit of its metadata": (
        lambda shard: flip(shard / "layer_03" / "zarr.json", 60),
        "shard-00002/layer_03 is damaged",
        "layer_03",
    ),
    "a bit of a hidden state": (
        lambda shard: flip(data_of(shard), 5000),
        "shard-00002/layer_03: checksum differs",
        "checksum differs",
    ),
}


@pytest.mark.parametrize(("damage", "refusal", "problem"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_refused_repaired_and_harvested_and_then_trains_the_same_sae(
    damage: Callable[[Path], object],
    refusal: str,
    problem: str,
    folder: Path,
    expected: bytes,
    tiny_settings: Callable[..., HarvestSettings],
    tmp_path: Path,
) -> None:
    damage(folder / "shard-00002")
    settings = run_of(folder, tmp_path / "saes", verify="checksum" in refusal)
    with pytest.raises((WrongInput, FailedRun), match=refusal) as refused:
        train(settings)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "saes").glob("[!.]*"))
    (found,) = verify(str(folder)).problems
    assert "shard-00002" in found
    assert problem in found
    files = [path for path in folder.rglob("*") if path.is_file()]
    others = {path: path.stat().st_mtime_ns for path in files if "shard-00002" not in path.parts}
    assert repair(str(folder)).removed == ([] if "missing" in problem else ["shard-00002"])
    harvest(tiny_settings(out=str(folder)))
    assert {path: path.stat().st_mtime_ns for path in others} == others
    (result,) = train(run_of(folder, tmp_path / "saes", verify=True, overwrite=True))
    assert (result.folder / WEIGHTS).read_bytes() == expected


def test_a_shard_cut_under_the_trainer_stops_it_and_the_resumed_run_ends_as_if_nothing_had_been(
    folder: Path, expected: bytes, tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    def cut(progress: Progress) -> None:
        if progress.stage.startswith("train"):
            os.truncate(data_of(folder / "shard-00001"), 5000)

    with pytest.raises(FailedRun, match=r"shard-00001/layer_03 is damaged: ends before byte .*cache repair"):
        train(run_of(folder, tmp_path / "saes"), cut)
    assert repair(str(folder)).removed == ["shard-00001"]
    harvest(tiny_settings(out=str(folder)))
    (result,) = train(run_of(folder, tmp_path / "saes", resume=True))
    assert (result.folder / WEIGHTS).read_bytes() == expected


@pytest.mark.parametrize("name", ["layer_03", "token_mean", "token_std"])
def test_a_bit_that_flips_under_the_trainer_stops_it_and_the_resumed_run_ends_as_if_it_had_not(
    name: str, folder: Path, expected: bytes, tiny_settings: Callable[..., HarvestSettings], tmp_path: Path
) -> None:
    said = rf"shard-00001/{name} is damaged: rows 256 to 511 are not what was written .*cache repair"
    with pytest.raises(FailedRun, match=said) as refused:
        train(run_of(folder, tmp_path / "saes"), flipping(folder / "shard-00001" / name, row=300))
    assert "\n" not in str(refused.value)
    assert repair(str(folder)).removed == ["shard-00001"]
    harvest(tiny_settings(out=str(folder)))
    (result,) = train(run_of(folder, tmp_path / "saes", resume=True))
    assert (result.folder / WEIGHTS).read_bytes() == expected


@pytest.mark.parametrize("name", ["layer_03", "token_scale", "token_mean"])
def test_so_does_one_of_an_int8_cache(name: str, int8_cache: Cache, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(int8_cache.folder, tmp_path / "shards"))
    with pytest.raises(FailedRun, match=rf"shard-00001/{name} is damaged: rows 256 to 511 are not what was written"):
        train(run_of(folder, tmp_path / "saes"), flipping(folder / "shard-00001" / name, row=300))


@pytest.mark.parametrize("name", ["channel_mean", "channel_std"])
def test_a_bit_of_an_int8_cache_s_channels_is_found_where_they_are_read(
    name: str, int8_cache: Cache, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(int8_cache.folder, tmp_path / "shards"))
    flip(folder / "shard-00003" / name / "c" / "0" / "0", 5)
    with pytest.raises(FailedRun, match=rf"shard-00003/{name} is damaged: checksum differs"):
        train(run_of(folder, tmp_path / "saes"))


@pytest.mark.parametrize(("name", "data"), [("layer_03", "c/0/0"), ("chunk_hashes", "c/0/0")])
def test_so_is_one_in_an_object_store(
    name: str, data: str, tiny_cache: Cache, s3: Proxy, s3_url: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_cache.folder, tmp_path / "shards"))
    flip(folder / "shard-00001" / name / data, 5)
    put_folder(folder, s3_url)
    with pytest.raises(FailedRun, match=rf"{s3_url}/shard-00001/{name} is damaged: .*(?:checksum differs)"):
        train(run_of(s3_url, tmp_path / "saes"))


def test_one_that_flipped_on_the_way_from_a_store_or_in_what_is_kept_of_it_is_read_anew(
    expected: bytes, tiny_cache: Cache, s3: Proxy, s3_url: str, tmp_path: Path
) -> None:
    put_folder(tiny_cache.folder, s3_url)
    flipped: list[str] = []

    def once(request: Request) -> str | None:
        if "/layer_03/c/" in request.path and "=-" not in request.range and not flipped:
            flipped.append(request.range)
            return "flip"
        return None

    s3.fault = once
    kept: list[Path] = []

    def under_the_run(progress: Progress) -> None:
        if progress.stage.startswith("train") and not kept:
            kept.extend(tmp_path.glob("kept/blocks/??/*"))
            for block in kept:
                flip(block, 5)

    (result,) = train(run_of(s3_url, tmp_path / "saes"), under_the_run)
    assert flipped
    assert len(kept) > 5
    assert (result.folder / WEIGHTS).read_bytes() == expected


def flipping(array: Path, row: int) -> Callable[[Progress], None]:
    """Flips a bit of a row once the first step is done; the second epoch, at the latest, reads it."""
    done: list[int] = []

    def report(progress: Progress) -> None:
        if progress.stage.startswith("train") and not done:
            file = array / "c" / "0" / "0"
            rows = zarr.open_array(str(array), mode="r")
            done.append(row * rows.dtype.itemsize * rows.shape[1])
            flip(file, done[0])

    return report
