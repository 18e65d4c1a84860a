"""Claims in a shared folder: one alone gets one, the living keep theirs, and the dead lose theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from routesae.harvest.filling import claims
from routesae.harvest.filling.claims import Claims, Owner


def put(path: Path, owner: Owner) -> None:
    path.write_text(json.dumps(asdict(owner)))


@pytest.fixture
def gone() -> Owner:
    """A process of this place that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(claims._myself(), pid=process.pid, started="1")


@pytest.fixture
def elsewhere() -> Owner:
    """A process of another machine, with a number that no process has here."""
    return replace(claims._myself(), host="node7", place="node7 boot", pid=2**30)


def test_of_many_that_want_a_claim_at_once_one_gets_it(tmp_path: Path) -> None:
    start, taken = threading.Barrier(16), list[str]()
    with Claims(tmp_path) as mine:

        def take() -> None:
            start.wait()
            for name in map(str, range(20)):
                if mine.take(name) is not None:
                    taken.append(name)

        threads = [threading.Thread(target=take) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == sorted(map(str, range(20)))
    assert list(tmp_path.iterdir()) == []  # all are released at the end


def test_a_claim_is_anothers_until_it_is_released(tmp_path: Path) -> None:
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        claim = ours.take("shard-00003")
        assert claim is not None
        assert (tmp_path / ".shard-00003.claim").exists()
        assert theirs.take("shard-00003") is None
        assert (theirs.is_live("shard-00003"), theirs.is_live("shard-00004")) == (True, False)
        assert theirs.owner("shard-00003") == claim.owner
        ours.release(claim)
        assert theirs.take("shard-00003") is not None
        ours.release(claim)  # again: it is not its own any more, and stays
        assert ours.take("shard-00003") is None


def test_a_dead_processs_claim_is_taken_over_at_once(
    gone: Owner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "routesae")
    put(tmp_path / ".a.claim", gone)
    with Claims(tmp_path) as ours:
        assert not ours.is_live("a")
        claim = ours.take("a")
        assert claim is not None
        assert claim.held()
    assert f"a was claimed by process {gone.pid} on {gone.host}, which is gone" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_and_not_waited_for_is_gone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = replace(claims._myself(), pid=process.pid, started=claims._process(process.pid)[1])
    put(tmp_path / ".a.claim", owner)
    with Claims(tmp_path) as ours:
        assert ours.take("a") is None
        process.kill()
        while claims._process(process.pid)[0] != "Z":
            pass
        assert ours.take("a") is not None
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def test_a_number_that_another_process_got_since_is_no_sign_of_life(tmp_path: Path) -> None:
    put(tmp_path / ".a.claim", replace(claims._myself(), started="12345"))
    with Claims(tmp_path) as ours:
        assert ours.take("a") is not None


def test_another_machines_claim_dies_when_nobody_renews_it_by_our_own_clock(
    elsewhere: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    path = tmp_path / ".a.claim"
    put(path, elsewhere)
    os_times = [10**9, 2 * 10**9, 10**18]  # years off this machine's clock, both ways: only changes count
    with Claims(tmp_path) as ours:
        for mtime in os_times:
            os.utime(path, ns=(mtime, mtime))
            assert ours.take("a") is None
            now += claims.DEAD_AFTER_SECONDS - 1
            assert ours.take("a") is None
        now += 1
        assert ours.take("a") is not None


def test_a_pipe_in_a_claims_place_is_a_claim_that_says_nothing_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".a.claim")
    with Claims(tmp_path) as ours:
        asked = threading.Thread(target=lambda: ours.take("a"), daemon=True)
        asked.start()
        asked.join(timeout=20)
        assert not asked.is_alive()
        assert ours.owner("a") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "[" * 4000, '{"host":"","place":"","pid":"x"}'])
def test_a_claim_that_says_nothing_lives_by_its_mtime(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    (tmp_path / ".a.claim").write_text(text)
    with Claims(tmp_path) as ours:
        assert ours.take("a") is None
        assert ours.owner("a") is None
        now = claims.DEAD_AFTER_SECONDS
        assert ours.take("a") is not None


def test_a_heartbeat_renews_what_is_held_and_nothing_else(
    elsewhere: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    with Claims(tmp_path) as ours:
        for name in ("kept", "lost"):
            assert ours.take(name) is not None
        put(tmp_path / ".lost.claim", elsewhere)  # taken over meanwhile
        for name in ("kept", "lost"):
            os.utime(tmp_path / f".{name}.claim", ns=(1, 1))
        renewed = threading.Event()
        for _ in range(500):
            if (tmp_path / ".kept.claim").stat().st_mtime_ns != 1:
                renewed.set()
                break
            renewed.wait(0.01)
        assert renewed.is_set()
        assert (tmp_path / ".lost.claim").stat().st_mtime_ns == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lost.claim"]


def test_two_that_find_the_same_dead_claim_do_not_both_get_it(
    gone: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second saw the dead one's claim, and removes it only after the first has put its own in that place."""
    path = tmp_path / ".a.claim"
    put(path, gone)
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        remove = Claims._remove

        def late(self: Claims, path: Path, dead: claims._Seen) -> None:
            if self is second:
                monkeypatch.setattr(Claims, "_remove", remove)
                assert first.take("a") is not None
            remove(self, path, dead)

        monkeypatch.setattr(Claims, "_remove", late)
        assert second.take("a") is None
        assert first.is_live("a")
        assert [found.name for found in tmp_path.iterdir()] == [".a.claim"]


def test_sweeping_deletes_claims_on_what_is_done_and_their_remains(gone: Owner, tmp_path: Path) -> None:
    for name in (".a.claim", ".a.claim.1234", ".b.claim", "a.txt"):
        put(tmp_path / name, gone)
    Claims(tmp_path).sweep(lambda name: name == "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.claim", "a.txt"]


def test_a_folder_that_takes_no_file_is_an_os_error_and_leaves_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with Claims(tmp_path) as ours, pytest.raises(OSError, match="No space left"):
        ours.take("a")
    assert list(tmp_path.iterdir()) == []
    with Claims(tmp_path / "nowhere") as ours, pytest.raises(FileNotFoundError):
        ours.take("a")
