"""A shard's way off a GPU: copied on a stream of its own beside the next one's filling, by memory nobody is using."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from routesae.harvest.cache import arrays, quantise
from routesae.harvest.cache.manifest import CHUNK_HASHES, shard_arrays, shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.writer import write_shard
from routesae.harvest.filling.buffer import ShardBuffer, Staging
from routesae.harvest.lm.model import LanguageModel
from routesae.tests.card import CUDA, card_in, noting

CPU = torch.device("cpu")
WIDTH, BLOCKS, ROWS = 32, 6, 8


class Table(nn.Module):
    """An LM of a table of vectors, to which each block adds one."""

    class Block(nn.Module):
        def forward(self, hidden_BTD: Tensor) -> Tensor:
            return hidden_BTD + 1

    def __init__(self, device: torch.device):
        super().__init__()
        self.table = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
        if device.type == "cuda":
            self.table = self.table.pin_memory().to(device, non_blocking=True)
        self.blocks = nn.ModuleList(self.Block() for _ in range(BLOCKS))

    def forward(self, input_ids: Tensor, use_cache: bool) -> None:
        hidden_BTD = self.table[input_ids]
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)


def harvested(cache: Cache, device: torch.device, change: Callable[[Staging], object] = lambda _: None) -> None:
    """Three shards as `harvest_shards` makes them: each is written after the next one's filling is under way."""
    model = Table(device)
    lm = LanguageModel(model, model.blocks, WIDTH, device)
    staging = Staging(cache.manifest, device)
    change(staging)
    before: ShardBuffer | None = None
    for index in range(3):
        first, after = cache.manifest.shard_range(index)
        tokens_sT, kept_sT = np.array(cache.tokens()[first:after]), cache.kept(first, after)
        buffer = ShardBuffer(tokens_sT, kept_sT, cache.manifest, index, staging)
        buffer.fill(lm, ROWS, lambda rows: None)
        if before is not None:
            before.commit(cache, ROWS)
        before = buffer
    assert before is not None
    before.commit(cache, ROWS)
    assert len(staging.free) == 2  # one was filled while another was written


@pytest.fixture(params=["float16", "int8"])
def empty(request: pytest.FixtureRequest, tiny_cache: Cache, int8_cache: Cache, tmp_path: Path) -> Cache:
    """A cache without shards."""
    source = tiny_cache if request.param == "float16" else int8_cache
    shutil.copytree(source.path, tmp_path / "gpu", ignore=shutil.ignore_patterns("shard-*"))
    return Cache(tmp_path / "gpu")


def races_of(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, without: str = "", change: Any = lambda _: None
) -> list[str]:
    monkeypatch.setattr(arrays, "WRITERS", 2)  # of four layers, so that their memory is used again in a shard
    write = arrays.write_array

    def slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.05)  # longer than a slow or busy machine takes to encode the next layer
        write(*args, **kwargs)

    with card_in(monkeypatch, without) as card:
        noted = noting(card, slowly, lambda folder, array, **_: [array], writes=False)
        monkeypatch.setattr(arrays, "write_array", noted)
        harvested(cache, CUDA, change)
    monkeypatch.setattr(arrays, "write_array", write)
    return card.races


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_shards_leave_a_gpu_as_they_leave_a_cpu_without_a_race(
    empty: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "GPU_PIECE_VALUES", quantise.CPU_PIECE_VALUES)  # the order of its sums
    shutil.copytree(empty.path, tmp_path / "cpu")
    assert races_of(empty, monkeypatch) == []
    harvested(Cache(tmp_path / "cpu"), CPU)
    assert len(contents(empty.path)) > 30
    assert contents(empty.path) == contents(tmp_path / "cpu")


@pytest.mark.parametrize(
    ("without", "race"),
    [
        ("wait_event", "stream 1 reads what stream 0 may be using"),
        ("synchronize", "host reads what stream 1 may be using"),
    ],
)
def test_what_orders_a_shards_copies_is_needed(
    without: str, race: str, empty: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert race in races_of(empty, monkeypatch, without)


def test_staged_memory_is_used_again_when_it_is_written_and_not_before(
    empty: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_few(staging: Staging) -> None:
        del staging.layers[1:]

    assert "stream 1 writes what a thread is reading or writing" in races_of(empty, monkeypatch, change=too_few)


def test_an_array_is_asked_for_once_the_one_that_many_before_it_is_written(
    tiny_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "WRITERS", 2)
    write, done = arrays.write_array, set[str]()

    def slowly(folder: Path, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.01)
        write(folder, *args, **kwargs)
        done.add(folder.name)

    monkeypatch.setattr(arrays, "write_array", slowly)
    shard = tiny_cache.shard(0)
    names = [name for name in shard_arrays(tiny_cache.manifest) if name != CHUNK_HASHES]

    def values() -> Iterator[tuple[str, Any]]:
        for at, name in enumerate(names):
            assert done >= set(names[: max(0, at - 1)])
            yield name, np.array(shard.read(name))

    record = write_shard(tmp_path, tiny_cache.manifest, 0, values(), lambda hashes: shard.record)
    assert record == shard.record
    assert contents(tmp_path / shard_name(0)) == contents(tiny_cache.path / shard_name(0))
