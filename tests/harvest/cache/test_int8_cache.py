"""A cache of --dtype int8: what its files hold, and that whatever else is done to a cache is done to it too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from routesae.harvest.cache import quantise
from routesae.harvest.cache.copying import copy
from routesae.harvest.cache.inspect import describe
from routesae.harvest.cache.manifest import FORMAT_VERSION, FORMULA, layer_name, shard_name
from routesae.harvest.cache.quantise import encoded, row_statistics
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.verify import verify
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import WrongInput
from routesae.tests.object_store import Proxy

Settings = Callable[..., HarvestSettings]
LAYERS = (2, 3, 4, 5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_zarr(path: Path, index: int, layer: int) -> np.ndarray[Any, Any]:
    """The hidden states [n, D] of a layer by the formula in the array's own attributes, with zarr alone."""
    shard = zarr.open_group(str(path), mode="r")[shard_name(index)]
    array = shard[layer_name(layer)]
    names = {name: shard[name][:] for name in ("channel_mean", "channel_std", "token_scale")}
    formula, _, _ = str(array.attrs["hidden_state"]).partition(", for the l-th")
    return np.asarray(eval(formula, {**names, "q": array[:], "l": LAYERS.index(layer)})).astype(np.float16)


def test_zarr_alone_gives_the_hidden_states_by_the_formula_in_the_file(int8_cache: Cache, tiny_cache: Cache) -> None:
    """They differ from those of float16 by half a step at most, and the bytes are a little over half."""
    for index in range(5):
        for at, layer in enumerate(LAYERS):
            expected_nD = tiny_cache.shard(index).read(layer_name(layer)).astype(np.float64)
            read_nD = by_zarr(int8_cache.folder, index, layer).astype(np.float64)
            shard = int8_cache.shard(index)
            step_nD = shard.read("channel_std")[at] * shard.read("token_scale")[:, at, None].astype(np.float64)
            rounding_nD = np.spacing(np.abs(read_nD).astype(np.float16)).astype(np.float64)
            assert (np.abs(read_nD - expected_nD) <= step_nD / 2 + rounding_nD).all()
            assert shard.read(layer_name(layer)).dtype == np.int8
    assert int8_cache.manifest.token_bytes == len(LAYERS) * (32 + 12)
    assert tiny_cache.manifest.token_bytes == len(LAYERS) * (2 * 32 + 8)
    assert "the l-th of the cache's layers" in FORMULA


def test_statistics_and_losses_are_those_of_what_is_read_back(int8_cache: Cache, tiny_cache: Cache) -> None:
    for index in range(5):
        shard = int8_cache.shard(index)
        for at, layer in enumerate(LAYERS):
            read_nD = torch.from_numpy(by_zarr(int8_cache.folder, index, layer))
            for name, found_n in zip(("token_mean", "token_std"), row_statistics(read_nD), strict=True):
                assert np.array_equal(shard.read(name)[:, at], found_n.numpy())
            statistics = shard.record.statistics[str(layer)]
            assert statistics.mean == pytest.approx(float(read_nD.double().mean()), rel=1e-4, abs=1e-6)
            assert statistics.mean_square == pytest.approx(float(read_nD.double().square().mean()), rel=1e-4)
            plain_nD = tiny_cache.shard(index).read(layer_name(layer)).astype(np.float64)
            error_n = ((read_nD.double().numpy() - plain_nD) ** 2).sum(axis=1)
            assert statistics.int8_fvu == pytest.approx(
                error_n.sum() / ((plain_nD - plain_nD.mean(axis=0)) ** 2).sum(), rel=1e-4
            )
            own_n = ((plain_nD - plain_nD.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
            assert statistics.int8_norm_mse == pytest.approx((error_n / own_n).mean(), rel=1e-4)
            assert 0 < statistics.int8_fvu < 1e-3


def test_missing_shards_are_written_again_with_the_same_bytes_by_any_worker(
    int8_cache: Cache, tiny_settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "shards"
    shutil.copytree(int8_cache.folder, path)
    shutil.rmtree(path / shard_name(1))
    shutil.rmtree(path / shard_name(4))
    harvest(tiny_settings(out=str(path), dtype="int8", worker=1, workers=3))
    assert contents(path) == contents(int8_cache.folder)


def test_int8_into_a_float16_cache_is_refused(begun: Path, tiny_settings: Settings) -> None:
    with pytest.raises(WrongInput, match="dtype is float16, not int8"):
        harvest(tiny_settings(out=str(begun), dtype="int8"))


def test_verify_reads_all_of_it(int8_cache: Cache, tiny_cache: Cache, tmp_path: Path) -> None:
    assert verify(str(int8_cache.folder)).problems == []
    assert verify(str(int8_cache.folder)).digest != verify(str(tiny_cache.folder)).digest
    path = tmp_path / "shards"
    for name in ("channel_mean", "channel_std", "token_scale", "layer_03"):
        shutil.copytree(int8_cache.folder, path)
        file = path / shard_name(2) / name / "c" / "0" / "0"
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
        assert verify(str(path)).problems == [f"shard-00002/{name}: checksum differs from the one recorded"]
        shutil.rmtree(path)


def test_a_copy_through_an_object_store_has_the_same_bytes(
    int8_cache: Cache, s3: Proxy, s3_url: str, tmp_path: Path
) -> None:
    copy([int8_cache.folder], s3_url)
    copy([s3_url], str(tmp_path / "shards"))
    assert contents(tmp_path / "shards") == contents(int8_cache.folder)


def test_info_shows_what_int8_lost(int8_cache: Cache, tiny_cache: Cache) -> None:
    described = describe(str(int8_cache.folder))
    assert "int8" in described.facts["layers"]
    records = [shard.record for shard in int8_cache.shards()]
    for row in described.layers:
        found = [(one.kept, one.statistics[str(row["layer"])].int8_norm_mse or 0) for one in records]
        assert row["int8 NormMSE"] == pytest.approx(sum(n * lost for n, lost in found) / sum(n for n, _ in found))
    assert "int8 FVU" in described.layers[0]
    assert not any(name.startswith("int8") for name in describe(str(tiny_cache.folder)).layers[0])


def test_other_caches_say_nothing_of_it_and_stay_readable_by_what_read_them_before(tiny_cache: Cache) -> None:
    """The record of a float16 shard has the fields it always had: what does not know the new ones opens it."""
    attributes = json.loads((tiny_cache.folder / shard_name(0) / "zarr.json").read_text())["attributes"]
    assert sorted(attributes["statistics"]["2"]) == ["clipped", "max_abs", "mean", "mean_square", "non_finite"]
    statistics = tiny_cache.shard(0).record.statistics["2"]
    assert (statistics.int8_fvu, statistics.int8_norm_mse) == (None, None)
    assert tiny_cache.manifest.format_version == FORMAT_VERSION == 5


def test_threads_change_no_bit(
    tiny_cache: Cache, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "CPU_PIECE_VALUES", 1 << 17)  # enough for torch to start them
    hidden_nD = torch.from_numpy(np.array(tiny_cache.shard(0).read("layer_04"))).repeat(20, 1)
    std_n = row_statistics(hidden_nD)[1]
    found = []
    for threads in (1, 2):
        set_threads(threads)
        q_nD, encoding = encoded(hidden_nD, std_n)
        found.append([q_nD, encoding.scale_n, *encoding.channels, encoding.mean_n, encoding.std_n])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
