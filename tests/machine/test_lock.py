"""One lock, one owner: the living keep theirs, the dead lose theirs at once, and other machines go by age."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from routesae.machine import lock as locks
from routesae.machine.lock import DEAD_AFTER_SECONDS, Lock, hold
from routesae.reporting import WrongInput

HOLDS = """
import sys, time
from pathlib import Path
from routesae.machine.lock import Lock
assert Lock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".a.lock"


@pytest.fixture
def process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> Lock:
    """The lock as another machine took it, on a file system that shows its flock to nobody else, and then died."""
    monkeypatch.setattr(locks, "_kernel", lambda: "node7")
    lock = Lock(path)
    assert lock.take()
    monkeypatch.setattr(locks, "_kernel", lambda: "node8")
    lock._released.set()  # its heart stands still
    lock._heart.join()
    assert lock._file is not None
    os.close(lock._file)
    lock._file = os.open(path, os.O_RDONLY)
    return lock


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets this machine's clock to so many seconds."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


def test_of_many_that_want_a_lock_at_once_one_gets_it(tmp_path: Path) -> None:
    start, taken = threading.Barrier(16), list[Lock]()

    def take() -> None:
        start.wait()
        for name in map(str, range(20)):
            if (lock := Lock(tmp_path / name)).take():
                taken.append(lock)

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lock.path.name for lock in taken) == sorted(map(str, range(20)))
    assert [path.name for path in tmp_path.iterdir() if "." in path.name] == []  # no half made one is left
    for lock in taken:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_however_often_it_is_taken_and_released_one_owner_at_a_time(path: Path) -> None:
    """Four threads take and release it as fast as they can: looks, links and deletions meet in every order."""
    inside, most, rounds = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        for _ in range(100):
            lock = Lock(path)
            if lock.take():
                with guard:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    rounds[0] += 1
                assert lock.held()
                with guard:
                    inside[0] -= 1
                lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert rounds[0] >= 4
    assert list(path.parent.iterdir()) == []


def test_a_lock_is_its_owners_until_it_is_released(path: Path) -> None:
    ours, theirs = Lock(path), Lock(path)
    assert ours.look() is None
    assert ours.take()
    assert ours.held()
    assert not theirs.take()
    for lock in (ours, theirs):
        owner = lock.look()
        assert owner is not None
        assert lock.is_surely_held
        assert (owner.pid, str(owner).split()[0]) == (os.getpid(), "process")
    ours.release()
    assert not ours.held()
    assert theirs.take()
    ours.release()  # again: it is another's now, and stays
    assert theirs.held()
    theirs.release()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_processs_lock_is_free_at_once(
    kill: signal.Signals, path: Path, process: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "routesae")
    lock = Lock(path)
    assert not lock.take()
    process.send_signal(kill)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie, and counts as dead
    assert lock.take()
    assert f"{path} was left by an owner that is gone" in caplog.text
    lock.release()
    assert list(path.parent.iterdir()) == []


def test_a_suspended_process_keeps_its_lock(
    path: Path, process: subprocess.Popen[str], at: Callable[[float], None]
) -> None:
    process.send_signal(signal.SIGSTOP)
    lock = Lock(path)
    assert not lock.take()
    at(10 * DEAD_AFTER_SECONDS)
    assert not lock.take()


def test_a_forked_child_neither_has_nor_keeps_its_parents_lock(path: Path) -> None:
    lock = Lock(path)
    assert lock.take()
    (reading, writing), (ready, ready_to) = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        os.close(ready_to)
        fine = not lock.held()
        lock.release()
        os.write(writing, b"ready")
        os.read(ready, 1)  # until the parent is done
        os._exit(0 if fine and path.exists() else 1)
    os.read(reading, 5)
    assert lock.held()
    descriptor = lock._file
    assert descriptor is not None
    lock._released.set()
    lock._heart.join()
    os.close(descriptor)  # as the kernel does when the parent is killed
    lock._file = None
    locks._held.discard(lock)
    assert Lock(path).take()
    os.close(ready_to)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for end in (reading, writing, ready):
        os.close(end)


def test_another_machines_lock_is_free_when_nobody_renews_it_by_our_own_clock(
    elsewhere: Lock, path: Path, at: Callable[[float], None]
) -> None:
    seconds, lock = 0.0, Lock(path)
    for mtime in (10**9, 2 * 10**9, 10**18):  # years off this machine's clock, both ways: only changes count
        os.utime(path, ns=(mtime, mtime))
        assert not lock.take()
        seconds += DEAD_AFTER_SECONDS - 1
        at(seconds)
        assert not lock.take()
    assert elsewhere.held()
    at(seconds + 1)
    assert lock.take()
    assert not elsewhere.held()  # it wakes up beside its successor, and knows
    elsewhere.release()
    assert lock.held()


def test_where_the_file_system_has_no_flock_age_decides(
    path: Path, at: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    ours, theirs = Lock(path), Lock(path)
    assert ours.take()
    assert not theirs.take()
    at(DEAD_AFTER_SECONDS - 1)
    assert not theirs.take()
    os.utime(path, ns=(1, 1))  # renewed
    at(DEAD_AFTER_SECONDS)
    assert not theirs.take()
    at(2 * DEAD_AFTER_SECONDS)
    assert theirs.take()
    assert (ours.held(), theirs.held()) == (False, True)
    ours.release()
    assert theirs.held()


def test_where_the_file_system_has_no_links_one_gets_it_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", refuse)
    ours, theirs = Lock(path), Lock(path)
    assert ours.take()
    assert not theirs.take()
    owner = theirs.look()
    assert owner is not None
    assert owner.pid == os.getpid()
    ours.release()
    assert theirs.take()
    theirs.release()
    assert list(path.parent.iterdir()) == []


def test_a_kill_while_a_lock_is_made_leaves_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.link", lambda *paths: os._exit(9))
    if (child := os.fork()) == 0:
        Lock(path).take()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert len(list(path.parent.iterdir())) == 1  # under its random name
    with hold(path, "the folder"):
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"pid": "x"}', "[" * 4000, '{"host":1}', '{"since":9e99}', '{"pid":1}']
)
def test_a_file_that_says_nothing_lives_by_its_mtime(text: str, path: Path, at: Callable[[float], None]) -> None:
    path.write_text(text)
    lock = Lock(path)
    assert not lock.take()
    assert lock.look() is not None
    at(DEAD_AFTER_SECONDS)
    assert lock.take()


def test_a_pipe_or_a_link_in_a_locks_place_keeps_nobody_waiting_and_is_not_followed(path: Path) -> None:
    os.mkfifo(path)
    assert not Lock(path).take()
    path.unlink()
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(OSError, match=r"\.a\.lock"):
        Lock(path).take()
    assert not (path.parent / "elsewhere").exists()


def test_a_heartbeat_renews_what_is_held_and_no_successors_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    kept, lost = Lock(tmp_path / "kept"), Lock(tmp_path / "lost")
    assert kept.take()
    assert lost.take()
    lost.path.unlink()
    lost.path.write_text("another's")
    for lock in (kept, lost):
        os.utime(lock.path, ns=(1, 1))
    for _ in range(1000):
        if kept.path.stat().st_mtime_ns != 1:
            break
        time.sleep(0.01)
    assert kept.path.stat().st_mtime_ns != 1
    kept.release()
    lost.release()
    assert lost.path.stat().st_mtime_ns == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lost"]


def test_two_that_find_the_same_dead_lock_do_not_both_get_it(
    elsewhere: Lock, path: Path, at: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second saw the dead one's file, and deletes it only after the first has put its own in that place."""
    first, second, delete = Lock(path), Lock(path), Lock._delete
    assert not first.take()
    assert not second.take()
    at(DEAD_AFTER_SECONDS)

    def late(self: Lock, dead: os.stat_result) -> None:
        if self is second:
            monkeypatch.setattr(Lock, "_delete", delete)
            delete(first, dead)
            assert first._create()
        delete(self, dead)

    monkeypatch.setattr(Lock, "_delete", late)
    assert not second.take()
    assert first.held()
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_folder_that_takes_no_file_is_an_os_error_and_leaves_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="No space left"):
        Lock(path).take()
    assert list(path.parent.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        Lock(path.parent / "nowhere" / "lock").take()


# ------------------------------------------------------------------------------------------------------------ hold


def test_holding_what_another_holds_is_refused_at_once_naming_the_owner(
    path: Path, process: subprocess.Popen[str]
) -> None:
    message = (
        rf"^--out saes is in use by process {process.pid} on \S+ since 20\S+ \S+ UTC; wait for it to end, or stop"
    )
    with pytest.raises(WrongInput, match=message), hold(path, "--out saes"):
        raise AssertionError
    process.kill()
    process.wait()
    with hold(path, "--out saes") as lock:
        assert lock.held()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("is_alive", [True, False])
def test_holding_what_another_machine_left_waits_until_that_one_shows_itself_alive_or_dead(
    is_alive: bool, elsewhere: Lock, path: Path, at: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = [0.0]

    def sleep(seconds: float) -> None:
        slept[0] += 10
        at(slept[0])
        if is_alive and slept[0] == 50:
            os.utime(path, ns=(1, 1))

    monkeypatch.setattr("time.sleep", sleep)
    if is_alive:
        with pytest.raises(WrongInput, match="the run is in use by process"), hold(path, "the run"):
            raise AssertionError
        assert slept == [50]
    else:
        with hold(path, "the run") as lock:
            assert lock.held()
        assert slept == [DEAD_AFTER_SECONDS]
