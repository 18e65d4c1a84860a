"""A bounded folder on this disk for what was read from object stores: blocks of bytes, found again by key.

    <--cache-dir>/blocks/0/         one folder a process that runs at a time; the next process finds it again
        lock                        held by the process that uses the folder
        3f/3f0c…                    a block's bytes, then xxh3-64 of them

Each process keeps at most --cache-bytes, the blocks it used last, so N processes on a machine may take N times that.
What an earlier process left counts, and its checksum is compared before the first use. Blocks are fetched by many
threads: a request to a store takes 50 ms, however small.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from routesae.harvest.cache.store.disk import OpenFile
from routesae.reporting import FailedRun, WrongInput, human_bytes

if TYPE_CHECKING:
    from obstore import Bytes

    Data = bytes | Bytes  # what a read gives

IN_FLIGHT = 64  # requests at a time: at 50 ms each and 0.3 to 1 MB a block, 400 MB/s and more
PIECE_BYTES = 8 << 20  # of a large object, read or written at a time
DEFAULT_BYTES = 10_000_000_000
_HASH_BYTES = 8
_LOCK = "lock"
_PARTIAL = ".partial"


def default_folder() -> Path:
    """Below the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "routesae"


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """--cache-dir and --cache-bytes: where this process may keep what it reads from object stores, and how much."""

    folder: Path = field(default_factory=default_folder)
    limit: int = DEFAULT_BYTES
    """Bytes."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise WrongInput(f"--cache-bytes {self.limit} keeps nothing; the default is {DEFAULT_BYTES:,}")


_chosen: BlockSettings | None = None


def choose(settings: BlockSettings) -> None:
    """Have all caches of this process keep their blocks so. Not before, the defaults hold."""
    global _chosen
    _chosen = settings


def chosen() -> BlockSettings:
    return _chosen or BlockSettings()


def blocks() -> BlockCache:
    """The one of this process, made when it is first needed."""
    return _blocks_with(chosen())


@lru_cache(maxsize=1)
def _blocks_with(settings: BlockSettings) -> BlockCache:
    return BlockCache(settings.folder / "blocks", settings.limit)


class Block(NamedTuple):
    """key: names these bytes and no others, ever. read: fetches them, `size` of them, in any thread."""

    key: str
    size: int
    read: Callable[[], Data]


class _Pending(NamedTuple):
    """A block on its way. size: in bytes."""

    future: Future[OpenFile]
    size: int


class BlockCache:
    """The blocks below `folder`, at most `limit` bytes of them. Safe for the threads of one process."""

    def __init__(self, folder: Path, limit: int):
        self.limit = limit
        self.folder, self._held = _unused_folder(folder)
        self._lock = threading.Condition()
        self._whole_lock = threading.Lock()  # so that one thread makes a whole file
        self._kept: OrderedDict[str, int] = OrderedDict()  # bytes, the longest unused first
        self._bytes = 0  # of those, and of those being written
        self._writing = 0  # how many are
        self._unproven: set[str] = set()  # an earlier process's, not compared with their checksums yet
        self._pinned: set[str] = set()
        self._pending: dict[str, _Pending] = {}
        self._pending_bytes = 0
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="block-fetch")
        self._find()

    @property
    def bytes(self) -> int:
        """What is kept, and being written."""
        return self._bytes

    def announce(self, block: Block) -> None:
        """Begin to fetch a block that will be asked for soon, unless half of the limit is under way already."""
        key = block.key
        with self._lock:
            room = self._pending_bytes + block.size <= self.limit // 2
            if key not in self._kept and key not in self._pending and room:
                self._begin(block)

    def open(self, block: Block) -> OpenFile:
        """The block, open for reading. Raises as its `read`, and WrongInput or FailedRun if it cannot be kept."""
        with self._lock:
            if (kept := self._open(block.key, block.size)) is not None:
                return kept
            pending = self._pending.get(block.key) or self._begin(block)
        try:
            return pending.future.result()
        except CancelledError:  # as another that was under way failed
            return self.open(block)

    def drop(self, key: str) -> None:
        """Let go of a block, which is then fetched anew where it is asked for."""
        with self._lock:
            if key in self._kept and key not in self._pinned:
                with suppress(OSError):
                    self._path(key).unlink()
                self._forget(key)

    def whole(self, key: str, size: int, pieces: Callable[[], Iterable[Data]]) -> Path:
        """A file of `size` bytes that stays as long as this process runs, made of pieces that are fetched once."""
        with self._whole_lock:
            with self._lock:
                kept = self._open(key, size)
                self._pinned.add(key)
            if kept is None:
                self._write(key, size, pieces())
        return self._path(key)

    def _find(self) -> None:
        """Take over what an earlier process left, the oldest first."""
        blocks = []
        for path in self.folder.glob("??/*"):
            if path.name.endswith(_PARTIAL):
                path.unlink()
            else:
                status = path.stat()
                blocks.append((status.st_mtime_ns, path.name, status.st_size - _HASH_BYTES))
        for _, key, size in sorted(blocks):
            self._kept[key] = size
            self._bytes += size
            self._unproven.add(key)
        with self._lock:
            self._make_room(0)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _open(self, key: str, size: int) -> OpenFile | None:
        """Under the lock. None where it is not kept, or not whole."""
        if key not in self._kept:
            return None
        try:
            opened = OpenFile(os.open(self._path(key), os.O_RDONLY))
        except FileNotFoundError:  # deleted by hand
            self._forget(key)
            return None
        if key in self._unproven and not (self._kept[key] == size and _is_whole(opened.descriptor, size)):
            self._forget(key)
            return None
        self._unproven.discard(key)
        self._kept.move_to_end(key)
        return opened

    def _begin(self, block: Block) -> _Pending:
        """Under the lock."""
        self._pending_bytes += block.size
        self._pending[block.key] = pending = _Pending(self._pool.submit(self._fetch, block), block.size)
        return pending

    def _fetch(self, block: Block) -> OpenFile:
        try:
            return self._write(block.key, block.size, [block.read()])
        except FailedRun:
            self._cancel_announced()  # else a process that ends would wait for them all
            raise
        finally:
            with self._lock:
                self._end(block.key)

    def _cancel_announced(self) -> None:
        with self._lock:
            for key, pending in list(self._pending.items()):
                if pending.future.cancel():
                    self._end(key)

    def _end(self, key: str) -> None:
        """Under the lock."""
        self._pending_bytes -= self._pending.pop(key).size

    def _write(self, key: str, size: int, pieces: Iterable[Data]) -> OpenFile:
        path, hasher, written = self._path(key), xxhash.xxh3_64(), 0
        partial = path.with_name(path.name + _PARTIAL)
        with self._lock:
            self._make_room(size)
            self._bytes += size
            self._writing += 1
        try:
            path.parent.mkdir(exist_ok=True)
            opened = OpenFile(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644))
            with open(opened.descriptor, "wb", closefd=False) as file:
                for piece in pieces:
                    hasher.update(piece)
                    written += file.write(piece)
                file.write(hasher.digest())
            assert written == size, (key, written, size)
            partial.rename(path)
        except BaseException as failure:
            with self._lock:
                self._bytes -= size
                self._writing -= 1
                self._lock.notify_all()
            with suppress(OSError):
                partial.unlink()
            if isinstance(failure, OSError) and failure.errno is not None:
                raise FailedRun(
                    f"{self.folder} does not take a block ({failure.strerror}); make room there, or give another "
                    "--cache-dir or fewer --cache-bytes"
                ) from failure
            raise
        with self._lock:
            self._kept[key] = size
            self._writing -= 1
            self._lock.notify_all()
        return opened

    def _make_room(self, size: int) -> None:
        """Under the lock: let go of blocks until `size` more fit, waiting for what is just being written."""
        while self._bytes + size > self.limit:
            key = next((key for key in self._kept if key not in self._pinned), None)
            if key is not None:
                with suppress(OSError):
                    self._path(key).unlink()
                self._forget(key)
            elif self._writing:
                self._lock.wait()
            else:
                needed = human_bytes(self._bytes + size)
                raise WrongInput(f"--cache-bytes {self.limit:,} is too little: {needed} are needed at once")

    def _forget(self, key: str) -> None:
        self._bytes -= self._kept.pop(key)
        self._unproven.discard(key)


def _is_whole(descriptor: int, size: int) -> bool:
    hasher = xxhash.xxh3_64()
    for first in range(0, size, PIECE_BYTES):
        hasher.update(os.pread(descriptor, min(PIECE_BYTES, size - first), first))
    return os.pread(descriptor, _HASH_BYTES + 1, size) == hasher.digest()


def _unused_folder(folder: Path) -> tuple[Path, OpenFile]:
    """The first folder below `folder` that no process uses, and its lock. Raises WrongInput if there is none."""
    try:
        for number in count():
            unused = folder / str(number)
            unused.mkdir(parents=True, exist_ok=True)
            lock = OpenFile(os.open(unused / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            with suppress(BlockingIOError):
                fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return unused, lock
    except OSError as error:
        raise WrongInput(f"--cache-dir {folder} cannot be written ({error.strerror}); give another") from error
    raise AssertionError
