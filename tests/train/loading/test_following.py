"""Training on shards as they come, and on a ring that deletes them: the same bytes as from the whole cache."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from routesae import api
from routesae.analyze.scores.run import analyze
from routesae.analyze.scores.settings import AnalyzeSettings
from routesae.harvest.cache.inspect import describe
from routesae.harvest.cache.manifest import RingState
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.ring import Ring, write_state
from routesae.harvest.cache.store.disk import folder_bytes
from routesae.harvest.cache.verify import verify
from routesae.harvest.filling import begin, shards
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import Progress, Stopped, WrongInput
from routesae.tests.processes import Command, run_command
from routesae.train.loading import following
from routesae.train.loading.batches import Selection
from routesae.train.run import train
from routesae.train.settings import RunSettings, TrainSettings

SMALL: dict[str, Any] = {"latents": 64, "k": 8, "lr": 3e-3}
RUNS = tuple(
    RunSettings(**{**SMALL, **changes}, name=name)
    for name, changes in {
        "topk": {"sae": "topk"},
        "jumprelu": {"sae": "jumprelu"},
        "routed": {"sae": "routesae"},
        "scaled": {"sae": "topk", "normalize": "dataset"},
    }.items()
)
WINDOW, SHARDS, STAY = 2, 9, 8  # shards a window, in all, and the first with held-out rows


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (following, shards):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(following, "SILENT_SECONDS", 5.0)


@pytest.fixture(scope="module")
def corpus(tiny_settings: Callable[..., HarvestSettings]) -> Callable[..., HarvestSettings]:
    return lambda **changes: tiny_settings(**{"shard_tokens": 1024, **changes})


@pytest.fixture(scope="module")
def whole(corpus: Callable[..., HarvestSettings], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    cache = harvest(corpus(out=str(tmp_path_factory.mktemp("whole") / "shards")))
    assert cache.manifest.shard_count == SHARDS
    assert cache.manifest.first_held_out_shard == STAY
    return cache


@pytest.fixture(scope="module")
def expected(whole: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SAEs of the whole cache, read in windows."""
    out = tmp_path_factory.mktemp("expected")
    train(asked(whole.path, out))
    return out


def asked(cache: Path | str, out: Path, **changes: Any) -> TrainSettings:
    given = {"runs": RUNS, "batch_tokens": 400, "window": WINDOW, "device": "cpu", "log_every_steps": 3}
    return TrainSettings(**{**given, "cache": str(cache), "out": str(out), **changes})


def followed(cache: Path | str, out: Path, **changes: Any) -> TrainSettings:
    return asked(cache, out, follow=True, **changes)


def keep(cache: Cache, count: int) -> int:
    return count * cache.manifest.shard_bytes


@contextmanager
def harvesting(settings: HarvestSettings) -> Iterator[threading.Thread]:
    """A harvest in a thread, which must end well."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            harvest(settings)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()
    assert failures == []


def weights(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.safetensors"))}


def shards_of(folder: Path | str) -> list[int]:
    return sorted(int(path.name[6:]) for path in Path(folder).glob("shard-*"))


def test_saes_that_follow_a_ring_are_those_of_the_whole_cache(
    corpus: Callable[..., HarvestSettings], whole: Cache, expected: Path, tmp_path: Path
) -> None:
    """And what lies there is never more than --keep and the two shards in the making."""
    ring, most = tmp_path / "ring", [0]
    limit = keep(whole, 4)

    def look(progress: Progress) -> None:
        most[0] = max(most[0], len(shards_of(ring)))

    with harvesting(corpus(out=str(ring), keep=limit)) as thread:
        train(followed(ring, tmp_path / "saes"), look)
    assert weights(tmp_path / "saes") == weights(expected)
    assert len(weights(expected)) >= len(RUNS)
    for name in (run.name for run in RUNS):
        configs = [json.loads((out / str(name) / "cfg.json").read_text()) for out in (expected, tmp_path / "saes")]
        identities = [config["metadata"]["routesae"]["source"]["identity"] for config in configs]
        assert identities[0] == identities[1]
    assert not thread.is_alive()
    assert 0 < most[0] <= 4
    assert shards_of(ring) == [STAY]
    assert verify(ring).problems == []
    assert "8 used by every trainer and deleted" in describe(str(ring)).facts["shards"]


def test_a_cache_that_stays_is_followed_too(
    corpus: Callable[..., HarvestSettings], expected: Path, tmp_path: Path
) -> None:
    grown = tmp_path / "grown"
    with harvesting(corpus(out=str(grown))):
        train(followed(grown, tmp_path / "saes"))
    assert weights(tmp_path / "saes") == weights(expected)
    assert shards_of(grown) == list(range(SHARDS))


def test_trainers_of_different_speed_share_a_ring(
    corpus: Callable[..., HarvestSettings], whole: Cache, expected: Path, tmp_path: Path
) -> None:
    """The fast one waits for the slow one, and nothing is deleted that the slow one needs."""
    ring, failures, ahead = tmp_path / "ring", list[BaseException](), [0]

    def linger(progress: Progress) -> None:
        deadline = time.monotonic() + 20
        while ahead[0] == 0 and time.monotonic() < deadline:  # at its third step, until the other is a window ahead
            needs = [follower.needs for follower in Ring(Cache(ring)).followers().values()]
            ahead[0] = max(needs) - min(needs)
            time.sleep(0.01)
        assert {0, 1} <= set(shards_of(ring)) or progress.done > 3

    def until_both(progress: Progress) -> None:
        while len(Ring(Cache(ring)).followers()) < 2:
            time.sleep(0.01)

    def slow() -> None:
        try:
            train(followed(ring, tmp_path / "slow", window=1, batch_tokens=300), linger)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=slow)
    thread.start()
    with harvesting(corpus(out=str(ring), keep=keep(whole, 4))):
        train(followed(ring, tmp_path / "saes"), until_both)
    thread.join(60)
    assert failures == []
    assert weights(tmp_path / "saes") == weights(expected)
    train(asked(whole.path, tmp_path / "alone", window=1, batch_tokens=300))
    assert weights(tmp_path / "slow") == weights(tmp_path / "alone")
    assert 0 < ahead[0] <= 4
    assert shards_of(ring) == [STAY]


# -------------------------------------------------------------------------------------------- what holds a ring up


def test_a_trainer_that_died_holds_the_ring_up_until_its_file_is_deleted(
    corpus: Callable[..., HarvestSettings],
    whole: Cache,
    expected: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As kill -9 leaves it: a file that says what it needs, and no lock."""
    out = tmp_path / "ring"
    file: list[Path] = []

    def die(progress: Progress) -> None:
        ring = Ring(Cache(out))
        if not file:
            ring.register("dead", "saes/dead", 0)
            file.append(ring.folder / "dead.json")
        if any("holds the ring up" in record.getMessage() for record in caplog.records) and file[0].exists():
            assert 0 in shards_of(out)
            file[0].unlink()

    with harvesting(corpus(out=str(out), keep=keep(whole, 3))) as thread:
        trainer = threading.Thread(target=train, args=(followed(out, tmp_path / "saes"), die))
        trainer.start()
        while thread.is_alive() or trainer.is_alive():
            if file:
                die(Progress("", 0, 1, "", {}))
            time.sleep(0.01)
    said, *again = [record for record in caplog.records if "holds the ring up" in record.getMessage()]
    assert len(again) <= 1  # the harvest says it, and a trainer that was waiting by then
    assert said.levelname == "WARNING"
    for part in ("saes/dead", "shard-00000", " UTC", "--resume", str(file[0])):
        assert part in said.getMessage()
    assert weights(tmp_path / "saes") == weights(expected)
    assert shards_of(out) == [STAY]


def test_a_harvest_waits_for_a_trainer_and_stops_when_it_is_asked_to(
    corpus: Callable[..., HarvestSettings], whole: Cache, tmp_path: Path
) -> None:
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if "waiting for" in progress.facts:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="3 of 9 shards are there"):
        harvest(corpus(out=str(tmp_path / "ring"), keep=keep(whole, 3)), stop)
    assert seen[-1].facts["waiting for"] == f"routesae train --follow --cache {tmp_path / 'ring'}"
    assert shards_of(tmp_path / "ring") == [0, 1, 2]


def test_a_trainer_without_a_harvester_stops_with_what_it_has_and_goes_on_later(
    corpus: Callable[..., HarvestSettings],
    whole: Cache,
    expected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grown = tmp_path / "shards"
    shutil.copytree(whole.path, grown)
    for index in range(4, SHARDS):
        shutil.rmtree(grown / f"shard-0000{index}")
    monkeypatch.setattr(following, "SILENT_SECONDS", 0.1)
    with pytest.raises(Stopped, match=r"shard-00004 and 1 more: nobody.*--resume") as stopped:
        train(followed(grown, tmp_path / "saes"))
    assert stopped.value.code == 0
    status = tmp_path / "shards.status.json"
    monkeypatch.setattr(following, "ENDED_SECONDS", 0.0)
    monkeypatch.setattr(following, "SILENT_SECONDS", 60.0)

    status.write_text('{"state": "failed", "message": "no room left"}')
    os.utime(status, (time.time() + 60,) * 2)  # since the trainer began
    with pytest.raises(Stopped, match=r"the harvest failed \(no room left\)"):
        train(followed(grown, tmp_path / "saes", resume=True))
    monkeypatch.undo()
    with harvesting(corpus(out=str(grown))):
        train(followed(grown, tmp_path / "saes", resume=True))
    assert weights(tmp_path / "saes") == weights(expected)


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def used_up(
    corpus: Callable[..., HarvestSettings], whole: Cache, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A ring at its end, and its SAEs."""
    folder = tmp_path_factory.mktemp("used")
    with harvesting(corpus(out=str(folder / "ring"), keep=keep(whole, 5))):
        train(followed(folder / "ring", folder / "saes"))
    return folder / "ring", folder / "saes"


def test_a_ring_is_trained_on_once(used_up: tuple[Path, Path], tmp_path: Path) -> None:
    ring, saes = used_up
    with pytest.raises(WrongInput, match=r"used up to shard-00007.*saes/topk and 3 more would need shard-00000"):
        train(followed(ring, tmp_path / "saes"))
    with pytest.raises(WrongInput, match="is a ring, whose shards go once they are used; train on it with --follow"):
        train(asked(ring, tmp_path / "saes"))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert train(followed(ring, saes, resume=True)) == []


@pytest.mark.parametrize("changes", [{}, {"max_memory": 1}])
def test_what_is_refused_deletes_no_checkpoint(
    changes: dict[str, Any], used_up: tuple[Path, Path], tmp_path: Path
) -> None:
    """--overwrite on a ring that is used up would lose what nobody can train again."""
    checkpoint = tmp_path / ".topk.partial" / "checkpoint"
    checkpoint.parent.mkdir()
    checkpoint.write_text("hours")
    with pytest.raises(WrongInput):
        train(followed(used_up[0], tmp_path, overwrite=True, **changes))
    assert checkpoint.read_text() == "hours"
    assert not (tmp_path / ".jumprelu.partial").exists()


def test_what_reads_a_ring_reads_its_held_out_rows(used_up: tuple[Path, Path], tmp_path: Path) -> None:
    ring, saes = used_up
    cache = Cache(ring)
    assert cache.missing() == []
    cache.require_whole()
    scored = analyze(AnalyzeSettings(cache=str(ring), out=str(saes), metrics=("NormMSE",), device="cpu"))
    first, after = scored["rows_scored"]
    assert (first, after) == (cache.manifest.train_rows, cache.manifest.rows)
    with pytest.raises(WrongInput, match="is a ring: shard-00000 and others were deleted once every trainer"):
        Selection(cache, 0, cache.manifest.rows, (3,))
    with pytest.raises(WrongInput, match="is a ring: shard-00000"):
        api.Cache(ring).hidden(3)[0]


def test_a_harvest_of_a_used_up_ring_has_nothing_to_do(
    used_up: tuple[Path, Path], corpus: Callable[..., HarvestSettings]
) -> None:
    ring, _ = used_up
    harvest(corpus(out=str(ring)))
    assert shards_of(ring) == [STAY]


TOO_SMALL = r"--keep \d+ is .*, and two shards.*give more, a smaller --held-out, or fewer --shard-tokens"


@pytest.mark.parametrize(("kept", "changes"), [(1, {}), (3, {"held_out": 0.5}), (1, {"context": 32})])
def test_a_ring_that_is_too_small_is_refused_before_the_corpus_is_tokenised(
    corpus: Callable[..., HarvestSettings],
    whole: Cache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: int,
    changes: dict[str, Any],
) -> None:
    monkeypatch.setattr(begin, "write_tokens", None)
    with pytest.raises(WrongInput, match=TOO_SMALL):
        harvest(corpus(out=str(tmp_path / "ring"), keep=keep(whole, kept), **changes))
    assert not (tmp_path / "ring").exists()


def test_a_ring_that_proves_too_small_is_refused_before_a_shard_is_written(whole: Cache, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=TOO_SMALL):
        write_state(tmp_path, whole.manifest, RingState(keep=keep(whole, 1)))
    assert not list(tmp_path.iterdir())


def test_a_cache_that_stays_does_not_become_a_ring(
    corpus: Callable[..., HarvestSettings], whole: Cache, tmp_path: Path
) -> None:
    with pytest.raises(WrongInput, match=r"was begun without --keep, not [0-9]+; give that, or another --out"):
        harvest(corpus(out=str(whole.path), keep=keep(whole, 4)))
    with pytest.raises(WrongInput, match="needs --out to be a folder on a disk; s3://bucket/a keeps all shards"):
        corpus(out="s3://bucket/a", keep="500G")


def test_a_window_that_the_ring_cannot_hold_is_refused(
    corpus: Callable[..., HarvestSettings], whole: Cache, tmp_path: Path
) -> None:
    ring = tmp_path / "ring"

    stages = list[str]()

    def stop(progress: Progress) -> None:
        stages.append(progress.stage)
        if stages.count("harvest") == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        harvest(corpus(out=str(ring), keep=keep(whole, 3)), stop)
    with pytest.raises(WrongInput, match=r"--window 4 takes .*, and the ring .* holds .*; give a smaller --window"):
        train(followed(ring, tmp_path / "saes", window=4))
    assert list(Ring(Cache(ring)).followers()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "--follow sees every token once; leave out --epochs 2"),
        ({"verify": True}, "--verify reads the whole cache"),
        (
            {"tokens": 10**6},
            r"--follow sees the [\d,]+ tokens that there are once; give fewer --tokens",
        ),
    ],
)
def test_what_does_not_go_with_follow_is_refused(
    whole: Cache, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WrongInput, match=message):
        train(followed(whole.path, tmp_path / "saes", **changes))


def test_follow_has_a_window_of_its_own() -> None:
    assert TrainSettings(runs=RUNS, follow=True).window == 16
    assert TrainSettings(runs=RUNS).window is None


# --------------------------------------------------------------------------------------------------------- kills


SIZES = ["--batch-tokens=400", f"--window={WINDOW}", "--device=cpu", "--latents=64", "--k=8", "--lr=3e-3"]
SIZES += ["--log-every-steps=3", "--sae=topk", "--sae=jumprelu"]


def on_disk(folder: Path) -> int:
    """Bytes of the shards that are there, in the making or on their way out."""
    return sum(map(folder_bytes, [*folder.glob("shard-*"), *folder.glob(".shard-*.partial")]))


def kill_both(flags: list[str], folder: Path, most: int, kills: int, rng: random.Random | None) -> Counter[str]:
    """Harvest into a ring and train on it, each killed in turn until `kills` are made; then both end well.

    rng: kills are at random; None: once a shard has been deleted, so that nothing of the first can be made again.
    Returns how often each was killed. Asserts that the shards never take more than `most` bytes.
    """
    commands = {
        "harvest": ["harvest", *flags, "--out=ring"],
        "train": ["train", "--follow", "--cache=ring", *SIZES, "--resume"],
    }
    running = {side: Command(*command, cwd=folder) for side, command in commands.items()}
    killed, sides = Counter[str](), [*commands] * kills
    due = time.monotonic() + (rng.uniform(0.2, 2.0) if rng else 0)
    while running:
        assert on_disk(folder / "ring") <= most
        for side, command in list(running.items()):
            if command.poll() is not None:
                assert command.returncode == 0, command.communicate()[1][-2000:]
                del running[side]
        ready = rng or ((folder / "ring" / "zarr.json").exists() and Ring(Cache(folder / "ring")).used)
        if ready and killed.total() < kills and time.monotonic() > due and sides[killed.total()] in running:
            side = sides[killed.total()]
            running[side].kill()
            running[side].wait(20)
            killed[side] += 1
            running[side] = Command(*commands[side], cwd=folder)
            due = time.monotonic() + (rng.uniform(0.2, 2.0) if rng else 0)
        time.sleep(0.01)
    return killed


@pytest.fixture(scope="module")
def trial(
    corpus: Callable[..., HarvestSettings], whole: Cache, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, int | None], Counter[str]]:
    """A trial of some kills, by seed, whose SAEs are those of the whole cache."""
    folder, made = tmp_path_factory.mktemp("left-alone"), corpus()
    names = ("model", "tokens", "context", "shard_tokens", "layers", "device", "lm_dtype")
    flags = [f"--data={made.data[0]}", *(f"--{name.replace('_', '-')}={getattr(made, name)}" for name in names)]
    run = run_command("train", f"--cache={whole.path}", *SIZES, cwd=folder)
    assert run.returncode == 0, run.stderr
    largest = max(on_disk(Path(whole.path)) // SHARDS, keep(whole, 1))

    def make(kills: int, seed: int | None) -> Counter[str]:
        place, limit = tmp_path_factory.mktemp("trial"), keep(whole, 3)
        rng = None if seed is None else random.Random(seed)
        killed = kill_both([*flags, f"--keep={limit}"], place, limit + 2 * largest, kills, rng)
        assert weights(place / "saes") == weights(folder / "saes")
        assert shards_of(place / "ring") == [STAY]
        assert not list((place / "ring").glob(".shard-*"))
        return killed

    return make


def test_either_side_may_be_killed(trial: Callable[[int, int | None], Counter[str]]) -> None:
    assert trial(2, None) == {"harvest": 1, "train": 1}


@pytest.mark.slow
def test_forty_kills_cost_nothing(trial: Callable[[int, int | None], Counter[str]]) -> None:
    killed = sum((trial(4, seed) for seed in range(1, 16)), Counter[str]())
    assert killed.total() >= 40
    assert min(killed.values()) >= 10
