"""A cache damaged before or under a training run: named and refused, repaired, and the same SAE in the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from routesae.harvest.cache import Cache
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.harvest.verify import repair, verify
from routesae.reporting import FailedRun, Progress, WrongInput
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


def run_of(cache: Path, out: Path, **changes: Any) -> TrainSettings:
    from routesae.train.settings import settings_of

    given = {"cache": str(cache), "out": str(out), "sae": "topk", "layer": 3, "latents": 64, "k": 8, "lr": 3e-3}
    given |= {"batch_tokens": 500, "epochs": 2, "checkpoint_every_steps": 1, "log_every_steps": 1, "device": "cpu"}
    return settings_of({**given, **changes})


def data_of(shard: Path) -> Path:
    return shard / "layer_03" / "c" / "0" / "0"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


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
    (found,) = verify(str(folder))
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


def test_a_checksum_is_compared_only_where_that_is_asked_for(folder: Path, expected: bytes, tmp_path: Path) -> None:
    """As the README says: a flipped bit of data is found by verify, not by reading."""
    flip(data_of(folder / "shard-00002"), 5000)
    (result,) = train(run_of(folder, tmp_path / "saes"))
    assert (result.folder / WEIGHTS).read_bytes() != expected
