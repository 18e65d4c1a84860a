"""Batches: every kept training token once an epoch, in a seeded order, and a damaged shard never goes unnoticed."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routesae.harvest.cache.manifest import Manifest, ShardRecord
from routesae.harvest.cache.quantise import row_statistics
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.writer import write_shard
from routesae.reporting import FailedRun, WrongInput
from routesae.tests.shards import NO_STATISTICS, begin, float_shard
from routesae.train.loading import rows
from routesae.train.loading.batches import (
    BLOCK_ROWS,
    Batch,
    Block,
    Plan,
    Selection,
    cut_plans,
    epoch_plans,
    largest_share,
    load,
    read_sample,
    share_of,
    tokens_of,
    windows_of,
)

CPU = torch.device("cpu")
WIDTH, SPECIAL_ID = 4, 7


def make_cache(path: Path, **changes: Any) -> Cache:
    """A cache whose hidden state is (position // 1024, position % 1024, layer, 1), position flat in all of tokens.

    Every row's first position and every id 7 are dropped. Exact in float16.
    """
    text = dict.fromkeys(("model", "config_hash", "tokenizer_hash", "corpus", "split"), "x")
    counts = dict.fromkeys(("kept_tokens", "min_chars", "documents_short", "documents_malformed"), 0)
    given: dict[str, Any] = {
        "rows": 200,
        "context": 32,
        "shard_rows": 23,  # shard 8 holds rows 184 to 199 and training ends after row 189
        "layers": (2, 3, 5),
        "dtype": "float16",
        "seed": 0,
    } | changes
    rng = np.random.default_rng(1)
    tokens_ST = rng.integers(0, 30, (given["rows"], given["context"]), dtype=np.int32)
    manifest = begin(
        path,
        tokens_ST,
        **{**text, **counts, **given},
        revision=None,
        lm_dtype="float32",
        model_layers=8,
        width=WIDTH,
        overflow="error",
        text_field="text",
        corpus_fingerprint="x",
        tokens_asked=1,
        special_ids=(SPECIAL_ID,),
        keep_special=False,
        skip_positions=1,
        versions={},
    )
    for index in range(manifest.shard_count):
        first, after = manifest.shard_range(index)
        token_ids_sT = tokens_ST[first:after]
        kept_sT = token_ids_sT != SPECIAL_ID
        kept_sT[:, 0] = False
        order = rng.permutation(np.flatnonzero(kept_sT)).astype(np.int32)
        hidden = [(layer, encoded(order + first * manifest.context, layer, manifest)) for layer in manifest.layers]

        def record(hashes: Any, index: int = index, kept: int = len(order)) -> ShardRecord:
            rows = manifest.shard_range(index)
            return ShardRecord(
                index=index,
                rows=rows,
                kept=kept,
                weights_hash="x",
                batch_sequences=1,
                statistics={str(layer): NO_STATISTICS for layer in manifest.layers},
                hashes=hashes,
            )

        write_shard(path, manifest, index, float_shard(token_ids_sT, order, hidden), record)
    return Cache(path)


def encoded(position: Any, layer: int, manifest: Manifest) -> Any:
    columns = [position // 1024, position % 1024, np.full_like(position, layer), np.ones_like(position)]
    return np.stack(columns, axis=1).astype(manifest.dtype)


def decoded(hidden_ND: torch.Tensor) -> list[int]:
    """Flat positions of the rows of a batch of `make_cache`."""
    return [int(row[0]) * 1024 + int(row[1]) for row in hidden_ND.tolist()]


def wanted_positions(cache: Cache, first_row: int, after_row: int) -> list[int]:
    """Kept flat positions of those rows, by a loop over the tokens."""
    positions, tokens_ST = [], cache.tokens()
    for row in range(first_row, after_row):
        for column, token in enumerate(tokens_ST[row].tolist()):
            if column > 0 and token != SPECIAL_ID:
                positions.append(row * cache.manifest.context + column)
    return positions


def training(cache: Cache, layers: tuple[int, ...] | None = None) -> Selection:
    return Selection(cache, 0, cache.manifest.train_rows, layers or cache.manifest.layers)


def epoch(selection: Selection, batch_tokens: int, *, seed: int = 0, epoch: int = 0) -> list[torch.Tensor]:
    plans = epoch_plans(selection, seed=seed, epoch=epoch, batch_tokens=batch_tokens)
    return [batch.hidden_LND.clone() for batch in load(selection, plans, batch_tokens, CPU)]


def mappings_of(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/shard-" in line]


FORMS = ("float16", "float32")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Cache]:
    """Each of FORMS: nine shards of some 690 tokens; the last straddles the held-out boundary."""
    folder = tmp_path_factory.mktemp("caches")
    return remembered(lambda form: make_cache(folder / form, dtype=form))


@pytest.fixture(scope="module")
def position_cache(caches: Callable[[str], Cache]) -> Cache:
    return caches("float16")


def copied(cache: Cache, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(cache.path, tmp_path / "shards"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_tokens", [100, 1000])
def test_an_epoch_is_every_kept_training_token_exactly_once(
    caches: Callable[[str], Cache], form: str, batch_tokens: int
) -> None:
    cache = caches(form)
    first, after = list(cache.shards())[-1].record.rows
    assert first < cache.manifest.train_rows < after  # else nothing straddles
    batches = epoch(training(cache), batch_tokens)
    seen_N = torch.cat(batches, dim=1)
    assert seen_N.dtype == (getattr(torch, form))
    assert sorted(decoded(seen_N[0])) == wanted_positions(cache, 0, cache.manifest.train_rows)


def test_the_layers_of_a_batch_are_the_asked_ones_of_the_same_tokens(position_cache: Cache) -> None:
    for batch_LND in epoch(training(position_cache, (5, 2)), 333):
        assert batch_LND[:, :, 2].unique(dim=1).tolist() == [[5], [2]]
        assert decoded(batch_LND[0]) == decoded(batch_LND[1])


def test_an_epoch_of_a_real_harvest_is_the_stored_rows_of_kept_training_tokens_bit_for_bit(tiny_cache: Cache) -> None:
    import zarr

    manifest, group = tiny_cache.manifest, zarr.open_group(str(tiny_cache.path), mode="r")
    wanted: list[bytes] = []
    for name in sorted(set(group.group_keys())):
        shard: Any = group[name]
        order = shard["order"][:]
        hidden_LnD = np.stack([shard[f"layer_{layer:02d}"][:] for layer in manifest.layers])
        row = shard.attrs["rows"][0] + order // manifest.context
        wanted += [hidden_LnD[:, i].tobytes() for i in np.flatnonzero(row < manifest.train_rows)]
    seen_LND = torch.cat(epoch(training(tiny_cache), 777), dim=1)
    seen = [seen_LND[:, i].numpy().tobytes() for i in range(seen_LND.shape[1])]
    tokens_ST = group["tokens"][: manifest.train_rows]  # type: ignore[index]
    kept = ~np.isin(tokens_ST[:, manifest.skip_positions :], manifest.special_ids)
    assert len(seen) == kept.sum()
    assert sorted(seen) == sorted(wanted)


def test_the_held_out_rows_are_the_rest(position_cache: Cache) -> None:
    first, after = position_cache.manifest.train_rows, position_cache.manifest.rows
    selection = Selection(position_cache, first, after, (3,))
    held_out = decoded(torch.cat(epoch(selection, 100), dim=1)[0])
    assert sorted(held_out) == wanted_positions(position_cache, first, after)
    assert len(selection) + len(training(position_cache)) == len(wanted_positions(position_cache, 0, after))


def test_a_selection_may_begin_and_end_inside_one_shard(position_cache: Cache) -> None:
    selection = Selection(position_cache, 25, 41, (2,))
    assert sorted(decoded(torch.cat(epoch(selection, 60), dim=1)[0])) == wanted_positions(position_cache, 25, 41)


@pytest.mark.parametrize("batch_tokens", [1, 255, 256, 257, 1000, 5000, 100_000])
def test_every_batch_is_full_but_the_last(position_cache: Cache, batch_tokens: int) -> None:
    selection = training(position_cache)
    plans = list(epoch_plans(selection, seed=0, epoch=0, batch_tokens=batch_tokens))
    sizes = [sum(block.after - block.first for block in plan) for plan in plans]
    whole, rest = divmod(len(selection), batch_tokens)
    assert sizes == [batch_tokens] * whole + [rest] * (rest > 0)


def test_batches_have_the_sizes_of_their_plans(position_cache: Cache) -> None:
    selection = training(position_cache)
    whole, rest = divmod(len(selection), 1000)
    assert rest > 0
    assert [batch_LND.shape[1] for batch_LND in epoch(selection, 1000)] == [1000] * whole + [rest]


def test_the_order_is_fixed_by_seed_and_epoch(position_cache: Cache) -> None:
    selection = training(position_cache)

    def order(seed: int, at: int) -> list[int]:
        return decoded(torch.cat(epoch(selection, 500, seed=seed, epoch=at), dim=1)[0])

    assert order(3, 1) == order(3, 1)
    assert len({tuple(order(seed, at)) for seed in (0, 3) for at in (0, 1, 2)}) == 6


def test_the_order_does_not_depend_on_the_batch_size(position_cache: Cache) -> None:
    selection = training(position_cache)
    small, large = (decoded(torch.cat(epoch(selection, n), dim=1)[0]) for n in (100, 3000))
    assert small == large


def of_windows(selection: Selection, window: int | None, batch_tokens: int = 300) -> list[Plan]:
    return list(epoch_plans(selection, seed=2, epoch=1, batch_tokens=batch_tokens, window=window))


@pytest.mark.parametrize("window", [1, 2, 3, 1000])
def test_windows_give_every_token_once_and_mix_only_their_own_shards(position_cache: Cache, window: int) -> None:
    selection = training(position_cache)
    plans = of_windows(selection, window)
    read = decoded(torch.cat([b.hidden_LND.clone() for b in load(selection, iter(plans), 300, CPU)], dim=1)[0])
    assert sorted(read) == wanted_positions(position_cache, 0, position_cache.manifest.train_rows)
    mixed = [{block.shard // window for block in plan} for plan in plans]
    assert all(len(of_plan) == 1 for of_plan in mixed)
    order = [of_plan.pop() for of_plan in mixed]
    assert order == sorted(order)
    assert max(order) == (len(selection.indices) - 1) // window


def test_every_window_has_an_order_of_its_own(position_cache: Cache) -> None:
    one, other, *_ = of_windows(training(position_cache), 2, 10**6)
    orders = [[(block.shard % 2, block.first) for block in plan] for plan in (one, other)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_no_window_ends_with_a_small_batch(position_cache: Cache) -> None:
    selection = training(position_cache)
    for window in windows_of(selection, 300, 2):
        sizes, tokens = window.batch_tokens, sum(map(selection.count, window.shards))
        assert len(sizes) == -(-tokens // 300)
        assert sum(sizes) == tokens
        assert max(sizes) <= 300
        assert min(sizes) > max(sizes) - len(sizes)


def test_a_window_of_all_shards_has_the_order_without_windows(position_cache: Cache) -> None:
    selection = training(position_cache)
    whole, one = (of_windows(selection, window, 10**6) for window in (None, 1000))
    assert whole == one


def test_plans_are_the_same_before_any_shard_is_there(position_cache: Cache, tmp_path: Path) -> None:
    """Also where the last shard of the selection is held out in part."""
    root = Path(shutil.copytree(position_cache.path, tmp_path / "root", ignore=shutil.ignore_patterns("shard-*")))
    rows = position_cache.manifest.train_rows
    whole = Selection(position_cache, 0, rows, (3,))
    growing = Selection(Cache(root), 0, rows, (3,), growing=True)
    assert whole.rows[len(whole.indices) - 1] is not None
    assert of_windows(growing, 2) == of_windows(whole, 2)
    assert len(growing) == len(whole)
    for shard in position_cache.shards():
        shutil.copytree(shard.path, root / shard.path.name)
    growing.open(range(len(growing.indices)))
    read = [[b.hidden_LND.clone() for b in load(of, iter(of_windows(of, 2)), 300, CPU)] for of in (whole, growing)]
    assert torch.equal(torch.cat(read[0], dim=1), torch.cat(read[1], dim=1))


def test_the_first_sample_is_of_the_first_window(position_cache: Cache) -> None:
    selection = training(position_cache)
    (first, *_) = windows_of(selection, 10**6, 2)
    sample = decoded(read_sample(selection, seed=4, tokens=10**6, window=2).hidden_LND[0])
    after = position_cache.manifest.shard_range(1)[1]
    assert sorted(sample) == wanted_positions(position_cache, 0, after)
    assert len(sample) == sum(first.batch_tokens)


def test_a_batch_is_made_of_contiguous_blocks_from_many_shards(position_cache: Cache) -> None:
    selection = training(position_cache)
    plans = list(epoch_plans(selection, seed=0, epoch=0, batch_tokens=1024))
    assert all(0 < block.after - block.first <= BLOCK_ROWS for plan in plans for block in plan)
    # A shard of 23 rows keeps about 690 tokens: three blocks. 1024 tokens take at least 4 blocks, at most 8.
    assert all(len(plan) <= 8 for plan in plans)
    assert np.mean([len({block.shard for block in plan}) for plan in plans[:-1]]) > 3
    read = decoded(epoch(selection, 1024)[0][0])
    stored = {
        shard.path.name: [int(p) + shard.record.rows[0] * 32 for p in shard.read("order")]
        for shard in position_cache.shards()
    }
    at = 0
    for block in plans[0]:
        shard = selection.shards[block.shard]
        if shard.record.rows[1] <= position_cache.manifest.train_rows:  # blocks of the straddling one have gaps
            assert read[at : at + block.after - block.first] == stored[shard.path.name][block.first : block.after]
        at += block.after - block.first


def test_cut_plans_equals_cutting_row_by_row() -> None:
    rng = np.random.default_rng(0)
    sizes = [int(n) for n in rng.integers(1, 257, 40)]
    blocks = [Block(i, 3 * i, 3 * i + n) for i, n in enumerate(sizes)]
    rows = [(block.shard, row) for block in blocks for row in range(block.first, block.after)]
    for batch_tokens in (1, 7, 256, 300, len(rows), len(rows) + 1):
        naive = [rows[i : i + batch_tokens] for i in range(0, len(rows), batch_tokens)]
        plans = list(cut_plans(iter(blocks), batch_tokens))
        cut = [[(block.shard, row) for block in plan for row in range(block.first, block.after)] for plan in plans]
        assert cut == naive
        for plan in plans:  # no block is cut twice within a batch
            assert len({block.shard for block in plan}) == len(plan)


def test_cut_plans_of_nothing_is_nothing() -> None:
    assert list(cut_plans(iter([]), 10)) == []


def test_a_layer_that_was_not_harvested_is_refused_with_those_that_were(position_cache: Cache) -> None:
    with pytest.raises(WrongInput, match=r"layer 4 was not harvested.*2, 3, 5"):
        training(position_cache, (3, 4))


def test_a_missing_shard_is_refused_before_anything_is_read(position_cache: Cache, tmp_path: Path) -> None:
    copy = copied(position_cache, tmp_path)
    shutil.rmtree(copy / "shard-00004")
    with pytest.raises(WrongInput, match=r"1 of its 9 shards .*shard-00004"):
        training(Cache(copy))


def replace_data(shard: Path, change: Callable[[bytes], bytes]) -> None:
    """By a rename: who has the file open goes on with what it was."""
    data = shard / "layer_03" / "c" / "0" / "0"
    changed = data.with_name("changed")
    changed.write_bytes(change(data.read_bytes()))
    changed.replace(data)


def cut_data(shard: Path) -> None:
    replace_data(shard, lambda data: data[: len(data) // 2])


def cut_to_nothing(shard: Path) -> None:
    replace_data(shard, lambda _: b"")


def grow_data(shard: Path) -> None:
    replace_data(shard, lambda data: bytes(4096) + data)


def delete_data(shard: Path) -> None:
    (shard / "layer_03" / "c" / "0" / "0").unlink()


def delete_layer(shard: Path) -> None:
    shutil.rmtree(shard / "layer_03")


DAMAGES = [cut_data, cut_to_nothing, delete_data, delete_layer]


@pytest.mark.parametrize("damage", [*DAMAGES, grow_data])
def test_a_damaged_layer_is_an_error_that_names_it(position_cache: Cache, tmp_path: Path, damage: Any) -> None:
    cache = Cache(copied(position_cache, tmp_path))
    damage(cache.path / "shard-00001")
    with pytest.raises((WrongInput, FailedRun), match=r"shard-00001.*layer_03.*damaged"):
        epoch(training(cache), 1000)


@pytest.mark.parametrize("damage", [cut_to_nothing, delete_data, delete_layer, shutil.rmtree])
def test_a_shard_lost_while_training_stops_it_and_is_named(
    position_cache: Cache, tmp_path: Path, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "OPEN_FILES", 1)  # one that is held open is read on, lost or not
    cache = Cache(copied(position_cache, tmp_path))
    selection = training(cache)
    for shard in selection.shards.values():
        for layer in selection.layers:
            shard.array(f"layer_{layer:02d}")  # checked once, as after a first epoch
    plans = (plan for at in range(20) for plan in epoch_plans(selection, seed=0, epoch=at, batch_tokens=200))
    loader = load(selection, plans, 200, CPU)
    next(loader)
    damage(cache.path / "shard-00001")
    with closing(loader), pytest.raises(FailedRun, match=r"shard-00001.*damaged"):
        assert_no_nan(loader)
    assert loader_threads() == []


def test_a_file_cut_in_place_while_training_stops_it_and_is_named(position_cache: Cache, tmp_path: Path) -> None:
    cache = Cache(copied(position_cache, tmp_path))
    selection = training(cache)
    plans = (plan for at in range(20) for plan in epoch_plans(selection, seed=0, epoch=at, batch_tokens=200))
    with closing(load(selection, plans, 200, CPU)) as loader:
        for _ in range(60):  # two epochs: every file is open
            next(loader)
        os.truncate(cache.path / "shard-00001" / "layer_03" / "c" / "0" / "0", 1000)
        with pytest.raises(FailedRun, match=r"shard-00001.*layer_03.*damaged: ends before byte"):
            assert_no_nan(loader)


def test_a_damaged_order_is_refused_by_name(position_cache: Cache, tmp_path: Path) -> None:
    copy = copied(position_cache, tmp_path)
    data = copy / "shard-00008" / "order" / "c" / "0"  # the shard that straddles: its order is read
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(WrongInput, match=r"shard-00008.*damaged"):
        training(Cache(copy))


def test_a_damaged_shard_record_is_refused_by_name(position_cache: Cache, tmp_path: Path) -> None:
    copy = copied(position_cache, tmp_path)
    (copy / "shard-00002" / "zarr.json").write_text("{")
    with pytest.raises(WrongInput, match=r"shard-00002.*damaged"):
        training(Cache(copy))


def assert_no_nan(loader: Iterator[Batch]) -> None:
    for batch in loader:
        assert not batch.hidden_LND.isnan().any()


@pytest.mark.parametrize("world", [1, 3])
def test_every_share_of_every_batch_is_contiguous(position_cache: Cache, world: int) -> None:
    """The last one too, and those that are a row less: a GPU is sent nothing else without a copy before."""
    selection = training(position_cache)
    sizes = set()
    for rank in range(world):
        plans = epoch_plans(selection, seed=0, epoch=0, batch_tokens=500)
        shares = [share_of(plan, rank, world) for plan in plans]
        read = load(selection, iter(shares), largest_share(500, world), CPU)
        for share, batch in zip(shares, read, strict=True):
            assert batch.hidden_LND.shape == (3, tokens_of(share), WIDTH)
            assert all(values.is_contiguous() for values in batch)
            sizes.add(tokens_of(share))
    assert len(sizes) > world // 2 + 1


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batch-loader")]


def test_the_loader_thread_ends_with_the_epoch_and_with_a_consumer_that_stops_early(position_cache: Cache) -> None:
    selection = training(position_cache)
    epoch(selection, 100)
    assert loader_threads() == []
    loader = load(selection, epoch_plans(selection, seed=0, epoch=0, batch_tokens=100), 100, CPU)
    next(loader)
    assert len(loader_threads()) == 2
    del loader
    gc.collect()
    assert loader_threads() == []


def test_a_batch_is_valid_until_the_next_is_asked_for(position_cache: Cache) -> None:
    selection = training(position_cache)
    loader = load(selection, epoch_plans(selection, seed=0, epoch=0, batch_tokens=100), 100, CPU)
    hidden_LND = next(loader).hidden_LND
    then_LND = hidden_LND.clone()
    loader_threads()[0].join(timeout=0.3)  # time enough to fill every buffer it may fill
    assert torch.equal(hidden_LND, then_LND)
    assert not torch.equal(next(loader).hidden_LND, then_LND)


def test_a_failure_of_the_plans_reaches_the_consumer(position_cache: Cache) -> None:
    selection = training(position_cache)

    def plans() -> Iterator[Plan]:
        yield [Block(0, 0, 10)]
        raise ZeroDivisionError

    loader = load(selection, plans(), 10, CPU)
    with pytest.raises(ZeroDivisionError):
        list(loader)
    assert loader_threads() == []


def test_a_batch_has_the_mean_and_standard_deviation_of_each_of_its_rows(
    position_cache: Cache, tiny_cache: Cache
) -> None:
    for cache, layers in ((position_cache, (5, 2)), (tiny_cache, (3, 4)), (tiny_cache, tiny_cache.manifest.layers)):
        selection = training(cache, layers)
        plans = epoch_plans(selection, seed=0, epoch=0, batch_tokens=333)
        seen = 0
        for batch in load(selection, plans, 333, CPU):
            seen += batch.hidden_LND.shape[1]
            for at in range(len(layers)):
                mean_N, std_N = row_statistics(batch.hidden_LND[at])
                torch.testing.assert_close(batch.mean_LN1[at, :, 0], mean_N)
                torch.testing.assert_close(batch.std_LN1[at, :, 0], std_N)
        assert seen == len(selection)


def test_statistics_that_are_cut_are_an_error_that_names_them(position_cache: Cache, tmp_path: Path) -> None:
    cache = Cache(copied(position_cache, tmp_path))
    os.truncate(cache.path / "shard-00002" / "token_std" / "c" / "0" / "0", 64)
    with pytest.raises(FailedRun, match=r"shard-00002.*token_std.*damaged"):
        epoch(training(cache), 1000)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_order_of_blocks_is_the_one_that_runs_were_begun_with(position_cache: Cache, seed: int) -> None:
    """A checkpoint goes on in the middle of it, so no release may change it."""
    selection = training(position_cache)
    blocks = []
    for shard in range(len(selection.shards)):
        for first in range(0, selection.count(shard), BLOCK_ROWS):
            blocks.append(Block(shard, first, min(first + BLOCK_ROWS, selection.count(shard))))
    assert selection.blocks() == blocks
    order = np.random.Generator(np.random.PCG64([seed, 3])).permutation(len(blocks))
    one_batch = epoch_plans(selection, seed=seed, epoch=3, batch_tokens=len(selection))
    assert list(one_batch) == [[blocks[i] for i in order]]


def test_a_sample_is_the_first_tokens_of_the_first_epoch(position_cache: Cache) -> None:
    selection = training(position_cache, (3, 5))
    (first_LND, *_) = epoch(selection, 700, seed=4)
    sample = read_sample(selection, seed=4, tokens=700)
    assert torch.equal(sample.hidden_LND, first_LND)
    torch.testing.assert_close(sample.mean_LN1, first_LND.float().mean(2, keepdim=True))
    assert read_sample(selection, seed=4, tokens=10**6).hidden_LND.shape[1] == len(selection)


def descriptors_of(folder: Path) -> list[str]:
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # a reader thread has closed it meanwhile
            targets.append(str(Path("/proc/self/fd", name).readlink()))
    return [target for target in targets if target.startswith(f"{folder}/shard-")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc/self/fd")
def test_few_files_are_open_at_once_and_none_afterwards(
    position_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "OPEN_FILES", 5)
    selection = training(position_cache)  # 27 layer files and 18 of statistics
    plans = epoch_plans(selection, seed=0, epoch=0, batch_tokens=100)
    held, seen = 0, []
    for batch in load(selection, plans, 100, CPU):
        held = max(held, len(descriptors_of(position_cache.path)))
        seen += decoded(batch.hidden_LND[0])
    assert 1 < held <= 5 + 2  # and one that each thread reads from
    assert sorted(seen) == wanted_positions(position_cache, 0, position_cache.manifest.train_rows)
    gc.collect()
    assert descriptors_of(position_cache.path) == []


ABANDON = """
import sys, time, torch
from routesae.harvest.cache.reader import Cache
from routesae.train.loading.batches import Selection, epoch_plans, load
cache = Cache(sys.argv[1])
selection = Selection(cache, 0, cache.manifest.train_rows, cache.manifest.layers)
batches = load(selection, epoch_plans(selection, seed=0, epoch=0, batch_tokens=50), 50, torch.device("cpu"))
next(batches)
time.sleep(1)  # by now its thread waits for a buffer that nobody will give back
"""


def test_a_loader_that_nobody_closes_does_not_keep_the_process_from_its_end(position_cache: Cache) -> None:
    command = [sys.executable, "-c", ABANDON, str(position_cache.path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_no_mapping_of_a_shard_stays_open(position_cache: Cache) -> None:
    selection = training(position_cache)
    held = selection.shards[0].read("layer_02")
    assert len(mappings_of(position_cache.path)) == 1  # the check sees one that is open
    del held
    batches = load(selection, epoch_plans(selection, seed=0, epoch=0, batch_tokens=100), 100, CPU)
    assert list(batches)[-1].hidden_LND.isfinite().all()
    assert mappings_of(position_cache.path) == []
