"""Batches on their way to a GPU: copied while the trainer steps, from memory that is not filled before it is read."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch

from routesae.harvest.cache.reader import Cache
from routesae.tests.card import CUDA, card_in, noting
from routesae.train.loading.batches import Selection, epoch_plans, load
from routesae.train.loading.rows import RowReader

BATCH = 300


def batches_of(cache: Cache, device: torch.device) -> list[list[torch.Tensor]]:
    """Each read after the next was asked for too, as a step that is still running would."""
    selection = Selection(cache, 0, cache.manifest.train_rows, cache.manifest.layers)
    found = []
    plans = epoch_plans(selection, seed=0, epoch=0, batch_tokens=BATCH)
    with closing(load(selection, plans, BATCH, device)) as batches:
        for batch in batches:
            read = [values * 1 for values in batch]  # by the stream of the trainer, which does not wait
            del batch
            found.append(read)
    return [[values.cpu() for values in read] for read in found]


def on_card(cache: Cache, monkeypatch: pytest.MonkeyPatch, without: str = "") -> tuple[list[str], Any]:
    read = RowReader.read
    with card_in(monkeypatch, without) as card:
        noted = noting(card, read, lambda self, reads, *arrays: arrays if reads else (), writes=True)
        monkeypatch.setattr(RowReader, "read", noted)
        found = batches_of(cache, CUDA)
    return card.races, found


@pytest.fixture(params=["float16", "int8"])
def cache(request: pytest.FixtureRequest, tiny_cache: Cache, int8_cache: Cache) -> Cache:
    return tiny_cache if request.param == "float16" else int8_cache


def test_batches_reach_a_gpu_whole_without_a_race_and_without_a_copy_that_waits(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    races, found = on_card(cache, monkeypatch)
    assert races == []
    expected = batches_of(cache, torch.device("cpu"))
    assert len(found) == len(expected) > 10
    for ours, cpus in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, cpus, strict=True))


@pytest.mark.parametrize(
    ("without", "race"),
    [
        ("synchronize", "host writes what stream 1 may be using"),
        ("record_stream", "stream 1's memory is free while stream 0 may use it"),
    ],
)
def test_what_orders_the_loader_is_needed(
    without: str, race: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert race in on_card(cache, monkeypatch, without)[0]
