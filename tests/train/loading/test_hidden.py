"""Training reads an int8 cache as if it were a float16 one of the decoded numbers, wherever it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routesae.harvest.cache import quantise
from routesae.harvest.cache.copying import begin_copy
from routesae.harvest.cache.manifest import Manifest, layer_name, shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.writer import write_shard
from routesae.reporting import FailedRun
from routesae.tests.object_store import Proxy, put_folder
from routesae.tests.shards import change_attributes, float_shard
from routesae.train.loading import batches
from routesae.train.loading import rows as loading
from routesae.train.loading.batches import Selection, epoch_plans, load
from routesae.train.run import train
from routesae.train.settings import TrainSettings

Make = Callable[..., TrainSettings]
CPU = torch.device("cpu")
LAYERS = (2, 3, 4, 5)


def decoded(cache: Cache, index: int, layer: int) -> Any:
    """float16 [n, D], by the format's formula in numpy."""
    shard, at = cache.shard(index), cache.manifest.layers.index(layer)
    scaled_nD = shard.read(layer_name(layer)).astype(np.float32) * shard.read("token_scale")[:, at, None]
    return (scaled_nD * shard.read("channel_std")[at] + shard.read("channel_mean")[at]).astype(np.float16)


@pytest.fixture(scope="session")
def decoded_cache(int8_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same, written as a float16 cache."""
    path = tmp_path_factory.mktemp("decoded") / "shards"
    begin_copy(int8_cache, path)
    change_attributes(path, dtype="float16")
    manifest = Manifest.from_dict({**int8_cache.manifest.to_dict(), "dtype": "float16"})
    assert Cache(path).manifest == manifest
    for shard in int8_cache.shards():
        record = shard.record
        write_shard(
            path,
            manifest,
            record.index,
            float_shard(
                np.array(shard.read("token_ids")),
                np.array(shard.read("order")),
                [(layer, decoded(int8_cache, record.index, layer)) for layer in LAYERS],
            ),
            lambda hashes, record=record: record.model_copy(update={"hashes": hashes}),  # type: ignore[misc]
        )
    return Cache(path)


def epoch_of(cache: Cache, layers: Sequence[int], first_row: int, after_row: int) -> list[torch.Tensor]:
    """hidden_LND, mean_LN1 and std_LN1 of every batch of an epoch."""
    selection = Selection(cache, first_row, after_row, layers)
    plans = epoch_plans(selection, seed=3, epoch=0, batch_tokens=900)
    return [values.clone() for batch in load(selection, plans, 900, CPU) for values in batch]


def epoch_decoded_after_the_copy(cache: Cache, layers: Sequence[int], *rows: int) -> list[torch.Tensor]:
    """The same by the route to a GPU: int8 as it is stored is what is copied."""
    selection = Selection(cache, *rows, layers)
    staged = batches._staged(selection, epoch_plans(selection, seed=3, epoch=0, batch_tokens=900), 900, encoded=True)
    found = []
    for batch in staged:
        assert isinstance(batch, batches.Encoded)
        assert batch.q_LND.dtype == torch.int8
        assert batch.q_LND.is_contiguous()
        found += [values.clone() for values in batch.decoded()]
    return found


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("layers", [LAYERS, (3,), (5, 2)])
@pytest.mark.parametrize("rows", [(0, 562), (100, 300)])
@pytest.mark.parametrize(("kept_bytes", "piece_values"), [(1 << 26, 1 << 15), (1, 32 * 50)])
def test_batches_are_bitwise_those_of_the_decoded_numbers(
    int8_cache: Cache,
    decoded_cache: Cache,
    layers: tuple[int, ...],
    rows: tuple[int, int],
    kept_bytes: int,
    piece_values: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a shard's rows are read in part, where the channels of one shard are kept at most, and where a block
    is decoded in several pieces of 50 rows."""
    monkeypatch.setattr(loading, "CHANNELS_BYTES", kept_bytes)
    monkeypatch.setattr(quantise, "CPU_PIECE_VALUES", piece_values)
    expected = epoch_of(decoded_cache, layers, *rows)
    assert expected[0].dtype == torch.float16
    assert same(epoch_of(int8_cache, layers, *rows), expected)
    assert same(epoch_decoded_after_the_copy(int8_cache, layers, *rows), expected)


def test_batches_out_of_an_object_store_are_the_same(int8_cache: Cache, s3: Proxy, s3_url: str) -> None:
    put_folder(int8_cache.folder, s3_url)
    assert same(epoch_of(Cache(s3_url), LAYERS, 0, 562), epoch_of(int8_cache, LAYERS, 0, 562))


@pytest.mark.parametrize("sae", ["topk", "routesae"])
def test_weights_are_bitwise_those_of_training_on_the_decoded_numbers(
    int8_cache: Cache, decoded_cache: Cache, settings: Make, sae: str, tmp_path: Path
) -> None:
    weights, scores = [], []
    for cache in (int8_cache, decoded_cache):
        (result,) = train(settings(cache=str(cache.path), sae=sae, out=str(tmp_path / cache.manifest.dtype)))
        weights.append((result.folder / "sae_weights.safetensors").read_bytes())
        assert result.held_out is not None
        scores.append(result.held_out.norm_mse)
    assert weights[0] == weights[1]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["channel_mean", "token_scale", "layer_03"])
def test_a_file_that_is_cut_under_the_run_is_named(int8_cache: Cache, name: str, tmp_path: Path) -> None:
    copied = tmp_path / "shards"
    shutil.copytree(int8_cache.folder, copied)
    file = copied / shard_name(2) / name / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FailedRun, match=f"shard-00002/{name} is damaged"):
        epoch_of(Cache(copied), (3,), 0, 562)
