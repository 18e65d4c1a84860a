"""Several harvesters in one folder: they share the work, wait for and take over from each other, stop when asked."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.reader import Cache
from routesae.harvest.filling import shards
from routesae.harvest.filling.output import Output
from routesae.harvest.filling.shards import harvest_shards
from routesae.harvest.lm import model as lm
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings, Share, share_of
from routesae.machine.lock import Lock
from routesae.reporting import FailedRun, Progress, Stopped, WrongInput
from routesae.tests.shards import change_attributes

Settings = Callable[..., HarvestSettings]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_shards(cache: Path, *indices: int) -> None:
    for index in indices or range(5):
        shutil.rmtree(cache / f"shard-0000{index}")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards committed in this process, in order."""
    found: list[str] = []
    commit = shards.ShardBuffer.commit

    def noted(self: shards.ShardBuffer, *arguments: object) -> object:
        record = commit(self, *arguments)  # type: ignore[arg-type]
        found.append(f"shard-0000{self.index}")
        return record

    monkeypatch.setattr(shards.ShardBuffer, "commit", noted)
    return found


# ------------------------------------------------------------------------------------------------- whose is what


def test_shares_divide_the_shards_by_index_and_each_goes_on_with_the_next_workers() -> None:
    orders = [Share(worker=worker, workers=3).order(range(8)) for worker in range(3)]
    assert orders == [[0, 3, 6, 1, 4, 7, 2, 5], [1, 4, 7, 2, 5, 0, 3, 6], [2, 5, 0, 3, 6, 1, 4, 7]]
    assert Share().order([5, 2, 9]) == [2, 5, 9]


@pytest.mark.parametrize(
    ("environment", "flags", "share"),
    [
        ({}, {}, Share()),
        ({"RANK": "2", "WORLD_SIZE": "4"}, {}, Share(worker=2, workers=4)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, {"worker": 0, "workers": 3}, Share(worker=0, workers=3)),
        ({"RANK": "2"}, {}, Share()),  # other tools set one of them
    ],
)
def test_a_share_is_what_flags_say_or_else_torchrun(
    environment: dict[str, str], flags: dict[str, int], share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert share_of(HarvestSettings(**flags)) == share


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"worker": 1}, "--worker and --workers go together"),
        ({"workers": 4}, "--worker and --workers go together"),
        ({"worker": 4, "workers": 4}, r"--worker 4 is not one of 0 to 3 \(--workers 4\)"),
        ({"worker": -1, "workers": 4}, "--worker -1 is not one of 0 to 3"),
        ({"worker": 0, "workers": 0}, "--workers 0 is below 1"),
    ],
)
def test_impossible_shares_are_wrong_input(flags: dict[str, int], message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        HarvestSettings(**flags)


def test_an_environment_that_names_no_worker_is_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, world in (("x", "2"), ("2", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(WrongInput, match=rf"RANK={rank} and WORLD_SIZE={world}.*--worker"):
            share_of(HarvestSettings())


@pytest.mark.parametrize(("worker", "order"), [(0, "02413"), (1, "13024")])
def test_a_worker_alone_begins_with_its_share_and_does_the_others_too(
    worker: int,
    order: str,
    written: list[str],
    begun: Path,
    tiny_cache: Cache,
    tiny_settings: Settings,
) -> None:
    without_shards(begun)
    seen: list[Progress] = []
    harvest(tiny_settings(out=str(begun), worker=worker, workers=2), seen.append)
    assert written == [f"shard-0000{index}" for index in order]
    assert {now.facts["worker"] for now in seen} == {f"{worker} of 0-1"}
    assert contents(begun) == contents(tiny_cache.path)


@pytest.mark.parametrize("workers", [2, 3])
def test_harvesters_at_the_same_time_write_each_shard_once_and_the_same_bytes(
    workers: int, written: list[str], begun: Path, tiny_cache: Cache, tiny_settings: Settings
) -> None:
    """As threads, each with an LM of its own; benchmarks/reliability.py has them as processes."""
    without_shards(begun)
    seen: list[list[Progress]] = [[] for _ in range(workers)]
    models = [
        lm.load_lm(tiny_cache.manifest.model, device=torch.device("cpu"), lm_dtype="float32") for _ in range(workers)
    ]
    at_once = threading.Barrier(workers)

    def work(worker: int) -> None:
        settings = tiny_settings(out=str(begun), worker=worker, workers=workers)
        with Claims(begun) as own:
            at_once.wait()
            harvest_shards(Output(str(begun)), Cache(begun), models[worker], own, settings, seen[worker].append)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == [f"shard-0000{index}" for index in range(5)]
    assert contents(begun) == contents(tiny_cache.path)
    total = tiny_cache.manifest.rows * 16
    assert [reports[-1].done <= total and reports[-1].total == total for reports in seen] == [True] * workers


# ----------------------------------------------------------------------------------- waiting for and taking over


def test_a_claimed_shard_is_left_to_its_harvester_until_that_one_leaves_it(
    written: list[str], begun: Path, tiny_cache: Cache, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "POLL_SECONDS", 0.01)
    without_shards(begun)
    with Claims(begun) as other:
        claim = other.take("shard-00001")
        assert claim is not None
        seen: list[Progress] = []

        def report(now: Progress) -> None:
            seen.append(now)
            if "waiting for" in now.facts and len(written) == 4:
                claim.release()

        harvest(tiny_settings(out=str(begun)), report)
    assert written == [f"shard-0000{index}" for index in (0, 2, 3, 4, 1)]
    waiting = next(now for now in seen if "waiting for" in now.facts)
    assert waiting.facts["waiting for"] == f"process {os.getpid()} on {socket.gethostname()}"
    assert (waiting.done, seen[-1].done) == (seen[-1].total - 2048, seen[-1].total)
    assert contents(begun) == contents(tiny_cache.path)


def test_what_others_write_meanwhile_is_not_written_again_and_counts_as_done(
    written: list[str], begun: Path, tiny_cache: Cache, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "POLL_SECONDS", 0.01)
    without_shards(begun, 2, 3)
    seen: list[Progress] = []
    with Claims(begun) as other:
        assert other.take("shard-00002") is not None

        def report(now: Progress) -> None:
            seen.append(now)
            if "waiting for" in now.facts and not (begun / "shard-00002").exists():
                shutil.copytree(tiny_cache.path / "shard-00002", begun / ".copy")
                (begun / ".copy").rename(begun / "shard-00002")

        harvest(tiny_settings(out=str(begun)), report)
    assert written == ["shard-00003"]
    assert (seen[-1].done, seen[-1].total) == (4096, 4096)


def test_anothers_work_in_progress_is_left_alone_and_a_dead_ones_removed(
    begun: Path, tiny_cache: Cache, tiny_settings: Settings
) -> None:
    without_shards(begun, 1, 2)
    if (child := os.fork()) == 0:
        Lock(begun / ".shard-00001.claim").take()
        os._exit(0)
    os.waitpid(child, 0)
    assert (begun / ".shard-00001.claim").exists()
    for name in (".shard-00001.77-ab.partial", ".shard-00002.78-cd.partial"):
        (begun / name / "order").mkdir(parents=True)
    with Claims(begun) as other:
        assert other.take("shard-00002") is not None
        seen: list[set[str]] = []

        def stopped(now: Progress) -> None:
            seen.append({path.name for path in begun.glob(".shard-*.partial")})
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            harvest(tiny_settings(out=str(begun)), stopped)
        assert seen == [{".shard-00002.78-cd.partial"}]
    harvest(tiny_settings(out=str(begun)))
    assert contents(begun) == contents(tiny_cache.path)
    assert not list(begun.glob(".*"))


@pytest.mark.parametrize("claim_lost", [True, False])
def test_a_shard_that_another_committed_first_stays_as_it_is(
    claim_lost: bool,
    begun: Path,
    tiny_cache: Cache,
    tiny_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two at one shard, as after a suspended one woke up: one alone can win the rename."""
    without_shards(begun, 3)
    commit = shards.ShardBuffer.commit

    def late(self: shards.ShardBuffer, *arguments: object) -> object:
        shutil.copytree(tiny_cache.path / "shard-00003", begun / "shard-00003")
        if claim_lost:
            (begun / ".shard-00003.claim").unlink()
        return commit(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shards.ShardBuffer, "commit", late)
    harvest(tiny_settings(out=str(begun)))
    assert contents(begun) == contents(tiny_cache.path)
    assert not list(begun.glob(".*"))


def test_one_tokenises_and_another_that_begins_meanwhile_waits_for_it(
    tiny_cache: Cache, tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("routesae.harvest.filling.begin.POLL_SECONDS", 0.01)
    out = tmp_path / "new"
    array = out / ".tokens.1-ab.partial" / "tokens" / "tokens" / "c" / "0"
    array.mkdir(parents=True)
    (array / "0").write_bytes(bytes(4 * 1600))
    with Claims(out) as other:
        claim = other.take("tokens")
        assert claim is not None
        seen: list[Progress] = []

        def report(now: Progress) -> None:
            seen.append(now)
            if now.stage == "tokenise elsewhere":  # the other is done
                shutil.rmtree(out / ".tokens.1-ab.partial")
                shutil.copytree(tiny_cache.path, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("shard-*"))
                claim.release()

        harvest(tiny_settings(out=str(out)), report)
    assert {now.stage for now in seen} == {"tokenise elsewhere", "harvest"}
    assert (seen[0].done, seen[0].total) == (1600, 9000)
    assert contents(out) == contents(tiny_cache.path)


def test_one_that_waits_tokenises_itself_when_the_other_gives_up(
    tiny_cache: Cache, tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new"
    out.mkdir()
    with Claims(out) as other:
        claim = other.take("tokens")
        assert claim is not None
        monkeypatch.setattr(time, "sleep", lambda seconds: claim.release())
        (out / ".tokens.1-ab.partial").mkdir()  # what it leaves
        harvest(tiny_settings(out=str(out)))
    assert contents(out) == contents(tiny_cache.path)
    assert not list(out.glob(".*"))


def test_one_that_lost_its_claim_while_tokenising_leaves_the_cache_to_the_other(
    tiny_cache: Cache, tiny_settings: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "new"
    inodes: list[int] = []

    def report(now: Progress) -> None:
        if now.stage == "tokenise" and not (out / "zarr.json").exists():
            shutil.copytree(tiny_cache.path, out, dirs_exist_ok=True)
            (out / ".tokens.claim").unlink()

            inodes.append((out / "tokens").stat().st_ino)

    harvest(tiny_settings(out=str(out)), report)
    assert inodes == [(out / "tokens").stat().st_ino]
    assert contents(out) == contents(tiny_cache.path)
    assert not list(out.glob(".*"))


def test_one_whose_tokens_were_taken_away_with_its_claim_goes_on_with_the_others(
    tiny_cache: Cache, tiny_settings: Settings, tmp_path: Path
) -> None:
    """Suspended while tokenising: the other deletes what it takes for a dead one's remains."""
    out = tmp_path / "new"

    def report(now: Progress) -> None:
        if now.stage == "tokenise" and not (out / "zarr.json").exists():
            shutil.rmtree(next(out.glob(".tokens.*.partial")))
            shutil.copytree(tiny_cache.path, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("shard-*"))
            (out / ".tokens.claim").unlink()

    harvest(tiny_settings(out=str(out)), report)
    assert contents(out) == contents(tiny_cache.path)


def test_a_finished_cache_needs_no_claim_and_may_be_read_only(
    begun: Path, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Claims, name: str) -> None:
        raise OSError(30, "Read-only file system", str(begun))

    monkeypatch.setattr(Claims, "take", refused)
    assert harvest(tiny_settings(out=str(begun))).missing() == []


# ------------------------------------------------------------------------------------------------ asked to stop


def signalled(times: int, at_tokens: int, number: int = signal.SIGTERM) -> Callable[[Progress], None]:
    """Sends this process so many signals when the harvest has come to `at_tokens`."""

    def report(now: Progress) -> None:
        if now.stage == "harvest" and now.done == at_tokens:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return report


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_asked_to_stop_it_finishes_the_shard_and_says_what_is_there(
    number: int, code: int, begun: Path, tiny_cache: Cache, tiny_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "routesae")
    without_shards(begun)
    with pytest.raises(
        Stopped, match="stopped: 2 of 5 shards are there; run the same command again to go on"
    ) as stopped:
        harvest(tiny_settings(out=str(begun)), signalled(1, 2048 + 128, number))
    assert stopped.value.code == code
    assert "stopping after this shard, or in 20 s; once more to stop at once" in caplog.text
    assert Cache(begun).missing() == [2, 3, 4]
    assert not list(begun.glob(".*"))  # no claim, nothing half done
    harvest(tiny_settings(out=str(begun)))
    assert contents(begun) == contents(tiny_cache.path)


def test_a_shard_that_would_take_too_long_is_dropped(
    begun: Path, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "STOP_WITHIN_SECONDS", 0.0)
    without_shards(begun)
    with pytest.raises(Stopped, match="1 of 5 shards are there") as stopped:
        harvest(tiny_settings(out=str(begun)), signalled(1, 2048 + 128))
    assert stopped.value.code == 0
    assert Cache(begun).missing() == [1, 2, 3, 4]
    assert not list(begun.glob(".*"))


def test_asked_twice_it_stops_at_once_and_keeps_what_was_committed(begun: Path, tiny_settings: Settings) -> None:
    without_shards(begun)
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_settings(out=str(begun)), signalled(2, 2048 + 128))
    assert Cache(begun).missing() == [1, 2, 3, 4]
    assert not list(begun.glob(".*"))


def test_asked_to_stop_at_the_last_shard_it_is_done(begun: Path, tiny_settings: Settings) -> None:
    without_shards(begun, 4)
    assert harvest(tiny_settings(out=str(begun)), signalled(1, 128)).missing() == []


def test_asked_to_stop_while_it_waits_for_another_it_stops(begun: Path, tiny_settings: Settings) -> None:
    without_shards(begun, 4)
    with Claims(begun) as other:
        assert other.take("shard-00004") is not None
        with pytest.raises(Stopped, match="4 of 5 shards are there") as stopped:
            harvest(tiny_settings(out=str(begun)), signalled(1, 0))
    assert stopped.value.code == 0


def test_sigterm_while_tokenising_leaves_nothing_and_exits_0(tiny_settings: Settings, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def report(now: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        Stopped, match="stopped before a shard was begun; run the same command again to go on"
    ) as stopped:
        harvest(tiny_settings(out=str(tmp_path / "shards")), report)
    assert stopped.value.code == 0
    assert not (tmp_path / "shards").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_cache_that_another_harvester_began_meanwhile_with_other_weights_gets_no_shard(
    begun: Path, tiny_settings: Settings
) -> None:
    without_shards(begun, 1, 2, 3)

    def report(now: Progress) -> None:
        if now.stage == "harvest" and now.done == 128:
            change_attributes(begun, exact_weights_hash="other")

    with pytest.raises(FailedRun, match="was replaced by another cache while it was written") as failed:
        harvest(tiny_settings(out=str(begun)), report)
    assert "\n" not in str(failed.value)
    assert Cache(begun).missing() == [1, 2, 3]
