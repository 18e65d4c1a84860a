"""How many rows a forward pass takes, where the device's memory has no room for what was tried."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from routesae.harvest.cache.reader import Cache
from routesae.harvest.filling import buffer, shards
from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.lm.passes import run_until
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.machine import device
from routesae.reporting import FailedRun, Progress

Settings = Callable[..., HarvestSettings]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[int]]:
    """room(rows, passes): forward passes of more than `rows` rows run out of memory once `passes` have been made."""

    def limit(rows: int, passes: int) -> list[int]:
        tried: list[int] = []

        def limited(lm: LanguageModel, token_ids_BT: Tensor, last_layer: int) -> None:
            tried.append(len(token_ids_BT))
            if len(token_ids_BT) > rows and len(tried) > passes:
                if len(tried) % 2 == 0:  # as the host's runs out
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 GiB")
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")
            run_until(lm, token_ids_BT, last_layer)

        monkeypatch.setattr(buffer, "run_until", limited)
        return tried

    return limit


def contents(cache: Cache) -> dict[str, bytes]:
    return {str(path.relative_to(cache.path)): path.read_bytes() for path in cache.path.rglob("*") if path.is_file()}


def sizes(cache: Cache) -> list[int]:
    return [shard.record.batch_sequences for shard in cache.shards()]


def test_rows_are_halved_until_they_fit_and_the_shards_are_as_if_asked_for_so(
    room: Callable[[int, int], list[int]], tiny_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "routesae")
    asked = harvest(tiny_settings(out=str(tmp_path / "asked"), tokens=4096, batch_sequences=2))
    tried = room(3, 0)
    seen: list[Progress] = []
    found = harvest(tiny_settings(out=str(tmp_path / "found"), tokens=4096), seen.append)
    assert tried == [8, 4] + [2] * 128
    assert contents(found) == contents(asked)
    assert "8 rows a batch do not fit in the device's memory: 4 now" in caplog.text
    assert seen[-1].done == seen[-1].total == 4096


def test_a_shard_that_ran_out_half_way_is_filled_anew_by_one_number_of_rows(
    room: Callable[[int, int], list[int]], tiny_settings: Settings, tmp_path: Path
) -> None:
    room(4, 16 + 5)  # in the sixth batch of the second shard of 128 rows
    seen: list[Progress] = []
    cache = harvest(tiny_settings(out=str(tmp_path / "shards"), tokens=6144), seen.append)
    assert sizes(cache) == [8, 4, 4]
    done = [now.done for now in seen if now.stage == "harvest"]
    assert 2048 + 5 * 8 * 16 in done
    assert done[done.index(2048 + 5 * 8 * 16) + 1] == 2048  # what was undone is not counted
    assert done[-1] == 6144


def test_a_resumed_run_takes_the_number_that_its_last_shards_had(
    room: Callable[[int, int], list[int]], tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room(4, 16)
    settings = tiny_settings(out=str(tmp_path / "shards"), tokens=6144)
    cache = harvest(settings)
    assert sizes(cache) == [8, 4, 4]
    before = contents(cache)
    shutil.rmtree(tmp_path / "shards" / "shard-00002")
    tried = room(8, 0)  # there is room for 8 now
    assert contents(harvest(settings)) == before
    assert set(tried) == {4}
    shutil.rmtree(tmp_path / "shards" / "shard-00000")
    monkeypatch.setitem(shards.START_SEQUENCES, "cpu", 16)
    assert sizes(harvest(settings)) == [4, 4, 4]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (8, r"forward pass of 8 rows do not fit.*\(CUDA out of memory.*2 GiB\); give a smaller --batch-sequences"),
        (None, r"forward pass of 1 rows do not fit.*give a smaller --shard-tokens or --context"),
    ],
)
def test_where_nothing_fits_the_run_fails_with_the_remedy(
    asked: int | None,
    message: str,
    room: Callable[[int, int], list[int]],
    tiny_settings: Settings,
    tmp_path: Path,
) -> None:
    tried = room(0, 0)
    with pytest.raises(FailedRun, match=message) as error:
        harvest(tiny_settings(out=str(tmp_path / "shards"), tokens=2048, batch_sequences=asked))
    assert "\n" not in str(error.value)
    assert tried == ([8] if asked else [8, 4, 2, 1])
    assert Cache(tmp_path / "shards").missing() == [0]


@pytest.mark.parametrize(("amx", "lm_dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_lm_runs_in_bfloat16_where_the_cpu_has_tiles(
    amx: bool, lm_dtype: str, tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bfloat16_units", lambda of: amx)
    cache = harvest(tiny_settings(out=str(tmp_path / "shards"), tokens=2048, lm_dtype="auto"))
    assert cache.manifest.lm_dtype == lm_dtype


def test_how_the_lm_runs_is_said_once(
    tiny_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "routesae")
    harvest(tiny_settings(out=str(tmp_path / "shards"), tokens=4096))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("harvest on ")]
    assert said == ["harvest on the CPU, LM in float32, sdpa attention, 1 thread, 8 rows a batch"]


def test_a_map_over_the_disk_gives_the_same_bytes_as_one_device(tiny_settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    one = harvest(tiny_settings(out=str(tmp_path / "one"), tokens=2048))
    spread = harvest(tiny_settings(out=str(tmp_path / "spread"), tokens=2048, device_map='{"": "disk"}'))
    assert contents(spread) == contents(one)
