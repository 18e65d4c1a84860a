"""Training out of an object store: the weights are those of training from disk, the disk and the requests bounded."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.settings import BlockOptions
from routesae.harvest.cache.store import blocks
from routesae.harvest.cache.store import bucket as remote
from routesae.harvest.cache.store.blocks import BlockCache
from routesae.harvest.cache.store.bucket import BucketFolder
from routesae.reporting import FailedRun
from routesae.tests.object_store import Proxy, Request, put_folder
from routesae.train.run import train
from routesae.train.settings import TrainSettings

Make = Callable[..., TrainSettings]
LAYER_BLOCK_BYTES = 1 << 16  # 1,024 rows of the tiny cache's width


@pytest.fixture
def remote_settings(settings: Make, tiny_cache: Cache, s3: Proxy, s3_url: str, tmp_path: Path) -> Make:
    """As `settings`, out of the store."""
    put_folder(tiny_cache.folder, s3_url)
    s3.requests.clear()
    return lambda **changes: settings(cache=s3_url, out=str(tmp_path / "remote"), **changes)


def weights(folder: Path) -> bytes:
    return (folder / "sae_weights.safetensors").read_bytes()


def bytes_in(folder: Path) -> int:
    """Of the blocks in it; others may be ending to write some meanwhile, under another name."""
    found = 0
    for path in folder.glob("??/*"):
        with suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def data_ranges(proxy: Proxy) -> list[tuple[int, int]]:
    """First and last byte of every read of a layer's or statistic's data, suffixes (its index) apart."""
    data = re.compile(r"/(layer|token_[ms]).*/c/")
    asked = [one for one in proxy.requests if one.method == "GET" and data.search(one.path)]
    assert all(one.range for one in asked)  # never all of it
    found = [re.fullmatch(r"bytes=(\d+)-(\d+)", one.range) for one in asked]
    return [(int(match[1]), int(match[2])) for match in found if match]


@pytest.mark.parametrize(("sae", "epochs", "limit"), [("topk", 2, 400_000), ("routesae", 1, 1_500_000)])
def test_the_weights_are_bitwise_those_of_training_from_disk(
    settings: Make,
    remote_settings: Make,
    s3: Proxy,
    sae: str,
    epochs: int,
    limit: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    largest = 0
    fetch = BlockCache._fetch

    def watched(self: BlockCache, *args: object) -> object:
        nonlocal largest
        opened = fetch(self, *args)  # type: ignore[arg-type]
        with self._lock:  # so that what is counted was there at one moment
            largest = max(largest, bytes_in(self.folder))
        return opened

    monkeypatch.setattr(BlockCache, "_fetch", watched)
    monkeypatch.setattr(blocks, "options", BlockOptions(cache_dir=tmp_path / "kept", cache_bytes=limit))
    (from_disk,) = train(settings(sae=sae, epochs=epochs))
    (from_store,) = train(remote_settings(sae=sae, epochs=epochs))
    assert weights(from_store.folder) == weights(from_disk.folder)
    assert from_store.held_out.norm_mse == from_disk.held_out.norm_mse
    assert limit / 2 < largest <= limit  # of 0.9 and 2.7 MB
    ranges = data_ranges(s3)
    assert len(ranges) > 20
    assert max(last + 1 - first for first, last in ranges) <= LAYER_BLOCK_BYTES


def test_blocks_that_are_kept_are_not_fetched_again(remote_settings: Make, s3: Proxy) -> None:
    train(remote_settings(epochs=2))
    layers = [(one.path, one.range) for one in s3.requests if "/layer_" in one.path and "=-" not in one.range]
    blocks_read = [one for one in layers if one[1]]
    assert len(set(blocks_read)) == len(blocks_read) == 9  # the fifth shard has less than 1,024 rows
    s3.requests.clear()
    train(remote_settings(epochs=1, overwrite=True))
    assert data_ranges(s3) == []


def test_many_ranges_are_in_flight(remote_settings: Make, s3: Proxy) -> None:
    s3.latency = 0.1
    train(remote_settings())
    assert s3.most_under_way >= 8


def test_a_server_that_times_out_or_cuts_an_answer_once_is_asked_again(
    settings: Make, remote_settings: Make, s3: Proxy
) -> None:
    failed: dict[str, str] = {}

    def once(request: Request) -> str | None:
        kinds = ["hang", "short", "break"]
        key = request.path + request.range
        if request.method != "GET" or "/c/" not in request.path or key in failed or len(failed) == len(kinds):
            return None
        failed[key] = kinds[len(failed)]
        return failed[key]

    s3.fault = once
    (from_store,) = train(remote_settings())
    assert sorted(failed.values()) == ["break", "hang", "short"]
    (from_disk,) = train(settings())
    assert weights(from_store.folder) == weights(from_disk.folder)


def test_a_run_that_a_store_ends_again_and_again_names_the_object_and_resumes(
    settings: Make, remote_settings: Make, s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "RETRIES", 0)
    checkpointed = remote_settings(checkpoint_every_steps=1, resume=True)
    for number, fault in enumerate(["hang", "short", "refuse"]):
        asked: set[str] = set()

        def later(request: Request, fault: str = fault, asked: set[str] = asked) -> str | None:
            if request.method == "GET" and "/layer_" in request.path and "/c/" in request.path:
                asked.add(request.path + request.range)
            return fault if len(asked) > 11 else None  # of 15 in an epoch

        s3.fault = later
        # A folder of blocks of its own has nothing yet, and a small one is not filled far ahead.
        monkeypatch.setattr(
            blocks, "options", BlockOptions(cache_dir=tmp_path / f"kept-{number}", cache_bytes=200_000)
        )
        with pytest.raises(FailedRun, match=r"s3://bucket/.*/shard-0000\d/") as raised:
            train(checkpointed)
        assert "\n" not in str(raised.value)
    s3.fault = lambda request: None
    (resumed,) = train(checkpointed)
    (from_disk,) = train(settings())
    assert weights(resumed.folder) == weights(from_disk.folder)


def test_an_object_that_changes_under_the_trainer_ends_the_run(remote_settings: Make, s3: Proxy, s3_url: str) -> None:
    array = BucketFolder(s3_url) / "shard-00001" / "layer_03"
    array.put("c/0/0", array.read("c/0/0", 1 << 30)[::-1])
    with pytest.raises(FailedRun, match=r"shard-00001/layer_03 is damaged: chunk index altered"):
        train(remote_settings(layer=3))
