"""One owner at a time for a folder, a file or a piece of work: a lock that is free as soon as its owner is dead.

    with hold(folder / ".run.lock", f"--out {folder}"):     # WrongInput, naming the owner, if another process has it
        ...
    lock = Lock(folder / ".shard-00003.claim")
    if lock.take(): ...                                     # False if another process has it

The lock is a small JSON file (host, process, since when), which its owner keeps locked with flock. The kernel drops a
flock with its process, so on one machine a dead owner's lock is free at once, whatever killed it. Other machines see
a flock on some file systems only. So the owner also renews the file's mtime every HEARTBEAT_SECONDS, and another
machine's lock is free once nobody has renewed it for DEAD_AFTER_SECONDS. The watcher times that by its own clock,
from when it first saw the mtime, so machines need not agree on the time.

The file is written and locked under a random name and linked into place, so it is never seen half made. An owner on a
machine that hung for longer may wake up beside its successor: ask `held()` before doing what only the owner may do.
A forked child does not own its parent's locks.
"""

import errno
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from routesae.reporting import WrongInput

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 150.0  # NFS clients may show an mtime that is 60 s old
POLL_SECONDS = 1.0
LARGEST_BYTES = 4096
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # FAT, some network file systems
_OPEN = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class Owner(BaseModel, frozen=True):
    """What a lock file says about its owner. The defaults stand for a file that says nothing readable."""

    host: str = ""
    pid: int = 0
    since: datetime | None = None
    kernel: str = ""
    """The running kernel: containers of one machine share it, and with it their flocks, whatever their host names."""
    locked: bool = False
    """Whether the file system took the flock."""

    def __str__(self) -> str:
        host = "".join(c if c.isprintable() else "?" for c in self.host[:64])
        return f"process {self.pid} on {host}" if self.pid else "an unknown process"


class Lock:
    """The lock whose file is `path`. One object takes it once at a time; two objects exclude each other."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None  # open while this object has the lock
        self._released = threading.Event()
        self._heart = threading.Thread()
        self._stamp: tuple[int, int] | None = None  # inode and mtime of another's file, as last seen
        self._stamp_since = 0.0
        self.is_surely_held = False  # after look(); False if another machine's owner may have died just now

    def take(self) -> bool:
        """Take the lock; return False if another has it. Raises OSError if the folder takes no file."""
        return self.look() is None and self._create()

    def held(self) -> bool:
        """Whether this object has the lock still: a successor may have taken it while this machine hung."""
        try:
            return self._file is not None and os.path.samestat(os.fstat(self._file), os.lstat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        """Give the lock up and delete its file; do nothing if this object does not have it."""
        file, self._file = self._file, None
        if file is None:
            return
        self._released.set()
        self._heart.join()
        with suppress(OSError):  # the folder may have become read-only: the kernel drops the lock all the same
            if os.path.samestat(os.fstat(file), os.lstat(self.path)):
                self.path.unlink()
        _held.discard(self)
        os.close(file)

    def look(self) -> Owner | None:
        """Return who has the lock, this object too, or None if it is free. Deletes a dead owner's file."""
        try:
            try:
                file = os.open(self.path, os.O_RDWR | _OPEN)
            except PermissionError:  # another user's; NFS alone needs it open for writing
                file = os.open(self.path, os.O_RDONLY | _OPEN)
        except FileNotFoundError:
            return None
        try:
            status, owner, took_flock = os.fstat(file), _read_owner(file), False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                took_flock = True
            except BlockingIOError:
                self.is_surely_held = True
                return owner
            except OSError:  # no locks here
                pass
            if not (took_flock and owner.locked and owner.kernel == _kernel()):
                stamp, now = (status.st_ino, status.st_mtime_ns), time.monotonic()
                if stamp != self._stamp:
                    self.is_surely_held = self._stamp is not None  # its owner renewed it while this one watched
                    self._stamp, self._stamp_since = stamp, now
                if now - self._stamp_since < DEAD_AFTER_SECONDS:
                    return owner
            with suppress(OSError):
                # Whoever has the flock of the file that is in place, and nobody else, may delete it.
                if os.path.samestat(os.lstat(self.path), status):
                    self._delete(status)
            return None
        finally:
            os.close(file)

    def _delete(self, dead: os.stat_result) -> None:
        """Delete the dead owner's file. Without flocks another may have come into its place: that is put back."""
        aside = self._random_name()
        self.path.rename(aside)
        try:
            if not os.path.samestat(os.lstat(aside), dead):
                os.link(aside, self.path)
            else:
                log.info("%s was left by an owner that is gone", self.path)
        finally:
            aside.unlink()

    def _create(self) -> bool:
        """Make the lock file, written and locked; return False if another process was faster."""
        _drop_locks_in_forked_children()
        partial = self._random_name()
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o644)
        try:
            locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                locked = False
            owner = Owner(
                host=socket.gethostname(), pid=os.getpid(), since=datetime.now(UTC), kernel=_kernel(), locked=locked
            )
            os.write(file, owner.model_dump_json().encode())
            try:
                os.link(partial, self.path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | _OPEN))
                partial.rename(self.path)
        except BaseException as error:
            os.close(file)
            if isinstance(error, FileExistsError):
                return False
            raise
        finally:
            partial.unlink(missing_ok=True)
        self._file, self._released = file, threading.Event()
        _held.add(self)
        self._heart = threading.Thread(target=_renew, args=(file, self._released), name="lock-renewal", daemon=True)
        self._heart.start()
        return True

    def _random_name(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")


@contextmanager
def hold(path: Path, what: str) -> Iterator[Lock]:
    """Have the lock at `path` while open. Raises WrongInput, naming the owner, if another process has it.

    what: the thing that is locked, as the user knows it (`--out saes`). Where the owner is on another machine and may
    be dead, this waits until its file is renewed or DEAD_AFTER_SECONDS have passed.
    """
    lock, is_waiting = Lock(path), False
    while not lock.take():
        if (owner := lock.look()) is None:
            continue
        if lock.is_surely_held:
            since = owner.since and f" since {owner.since:%Y-%m-%d %H:%M:%S} UTC"
            raise WrongInput(f"{what} is in use by {owner}{since or ''}; wait for it to end, or stop it")
        if not is_waiting:
            log.info("%s was in use by %s; waiting to see if that is alive", what, owner)
        is_waiting = True
        time.sleep(POLL_SECONDS)
    try:
        for left in path.parent.glob(f"{path.name}.*"):  # a kill while a lock was made
            Lock(left).look()
        yield lock
    finally:
        lock.release()


_held: set[Lock] = set()


@cache
def _drop_locks_in_forked_children() -> None:
    def drop() -> None:  # closing its copy of the file leaves the parent's flock alone
        for lock in _held:
            if lock._file is not None:
                os.close(lock._file)
                lock._file = None
        _held.clear()

    os.register_at_fork(after_in_child=drop)


def _renew(file: int, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(file)  # without a time: the file server's own clock sets it


def _read_owner(file: int) -> Owner:
    try:
        return Owner.model_validate_json(os.pread(file, LARGEST_BYTES, 0))
    except (OSError, ValueError):
        return Owner()


@cache
def _kernel() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
