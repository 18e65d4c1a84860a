"""Who works on what where several harvesters share a folder: names in; claims, which one alone can make, out.

    .shard-00003.claim   JSON: host, place, pid and start time of its owner, and a token of the claim

A claim is a file that only one can create (O_EXCL, on NFS too). Its owner renews its mtime every HEARTBEAT_SECONDS.
It is dead when its owner's process is gone, which those in the same place can see, or when nobody has renewed it for
DEAD_AFTER_SECONDS. The watcher measures that by its own clock, from when it first saw the mtime, so machines need not
agree on the time, and a file server may take a minute to show a renewal.

Claims spare work; they guard nothing. An owner that was suspended may wake up beside its successor. So what a claim
is for is made under a name of one's own and committed by a rename that one alone can win.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from routesae.machine.files import read_json

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
DEAD_AFTER_SECONDS = 150.0  # NFS clients may show an mtime that is 60 s old
LARGEST_BYTES = 4096
TRIES = 3  # at a claim that others make and drop at the same moment


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Whose a claim is. token: of this one claim."""

    host: str
    place: str
    """Where `pid` means one process: host, boot and process namespace. Containers may share a host's name."""
    pid: int
    started: str
    """When the process began, in the kernel's ticks; "" where it does not say. Process ids come round again."""
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_gone(self) -> bool:
        """Whether it can be seen from here that the process is no more."""
        return self.place == _place() and not _runs(self.pid, self.started)


@dataclass(frozen=True)
class _Seen:
    """What a claim's file said at one moment. owner: None where it says none; it then lives by its mtime alone."""

    owner: Owner | None
    mtime_ns: int


class Claim:
    """One that this process made."""

    def __init__(self, path: Path, owner: Owner):
        self.path = path
        self.owner = owner

    def held(self) -> bool:
        """Whether it is still this one's: another may have taken it over while this process was suspended."""
        seen = _look(self.path)
        return seen is not None and seen.owner == self.owner

    def renew(self) -> None:
        """Tell the others that its owner lives."""
        with suppress(OSError):
            if self.held():
                os.utime(self.path)  # without a time: the file server's own clock sets it

    def release(self) -> None:
        """Let others claim it. Where the folder cannot be written any more, the claim dies with the process."""
        with suppress(OSError):
            if self.held():
                self.path.unlink()


class Claims:
    """The claims in `folder`. A context: at its end all that were made in it are released."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._held: set[Claim] = set()
        self._watched: dict[Path, tuple[int, float]] = {}  # mtime, and when it was first seen
        self._over = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self, name: str) -> Claim | None:
        """A claim on `name`, made anew or taken over from the dead; None where another's lives.

        Raises OSError where the folder does not take a file.
        """
        path = self._path(name)
        for _ in range(TRIES):
            if (claim := _make(path)) is not None:
                self._held.add(claim)
                self._start_heart()
                return claim
            seen = _look(path)
            if seen is None:  # released this moment
                continue
            if self._lives(path, seen):
                return None
            log.info("%s was claimed by %s, which is gone: taken over", name, seen.owner or "nobody known")
            self._remove(path, seen)
        return None

    def owner(self, name: str) -> Owner | None:
        """Of the living claim on `name`; None where there is none, or it does not say."""
        path = self._path(name)
        seen = _look(path)
        return seen.owner if seen is not None and self._lives(path, seen) else None

    def is_live(self, name: str) -> bool:
        """Whether one who lives, this process too, has a claim on `name`."""
        path = self._path(name)
        seen = _look(path)
        return seen is not None and self._lives(path, seen)

    def release(self, claim: Claim) -> None:
        self._held.discard(claim)
        claim.release()

    def sweep(self, is_done: Callable[[str], bool]) -> None:
        """Delete the claims on what is done: those that killed owners left."""
        for path in self.folder.glob(".*.claim*"):
            if is_done(path.name[1:].partition(".")[0]):
                path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._over.set()
        if self._heart is not None:
            self._heart.join()
        for claim in list(self._held):
            self.release(claim)

    def _path(self, name: str) -> Path:
        return self.folder / f".{name}.claim"

    def _lives(self, path: Path, seen: _Seen) -> bool:
        if seen.owner is not None and seen.owner.is_gone():
            return False
        now = time.monotonic()
        mtime_ns, since = self._watched.get(path, (None, now))
        if mtime_ns != seen.mtime_ns:
            since = now
        self._watched[path] = (seen.mtime_ns, since)
        return now - since < DEAD_AFTER_SECONDS

    def _remove(self, path: Path, dead: _Seen) -> None:
        """Delete the claim that was seen to be dead, and no other that has come in its place since."""
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            path.rename(aside)
        except FileNotFoundError:  # another was faster
            return
        if _look(aside) == dead:
            aside.unlink(missing_ok=True)
        else:
            with suppress(FileNotFoundError):
                aside.rename(path)

    def _start_heart(self) -> None:
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="claim-heartbeat", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            for claim in list(self._held):
                claim.renew()


def _make(path: Path) -> Claim | None:
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    owner = _myself()
    try:
        os.write(file, json.dumps(asdict(owner)).encode())
    except OSError:  # a full disk: a claim without an owner would only be in the way
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)
    return Claim(path, owner)


def _look(path: Path) -> _Seen | None:
    """None where there is no claim."""
    try:
        mtime_ns = path.stat().st_mtime_ns
        owner = Owner(**read_json(path, LARGEST_BYTES))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # not written yet, or not by a harvester
        return _Seen(None, mtime_ns)
    return _Seen(owner if isinstance(owner.pid, int) and owner.pid > 0 else None, mtime_ns)


def _myself() -> Owner:
    pid = os.getpid()
    return Owner(
        host=socket.gethostname(),
        place=_place(),
        pid=pid,
        started=_process(pid)[1],
        token=secrets.token_hex(8),
    )


@cache
def _place() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _runs(pid: int, started: str) -> bool:
    state, found = _process(pid)
    if found:
        return state not in "ZX" and (not started or found == started)
    try:  # no /proc, or one that hides the processes of others
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _process(pid: int) -> tuple[str, str]:
    """State letter and start time of a process, from /proc; empty where it does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
