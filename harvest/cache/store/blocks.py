"""A bounded folder on this disk for what was read from object stores: blocks of bytes, found again by key.

    <--cache-dir>/blocks/0/         one folder a process that runs at a time; the next process finds it again
        lock                        held by the process that uses the folder
        3f/3f0c…                    a block

Each process keeps at most --cache-bytes, the blocks it used last, so N processes on a machine may take N times that.
What an earlier process left counts. Whoever reads a block compares its rows with their checksums, and drops it where
they differ. Blocks are fetched by many threads: a request to a store takes 50 ms, however small.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy.typing as npt

from routesae.harvest.cache.arrays import Array
from routesae.harvest.cache.settings import BlockOptions
from routesae.harvest.cache.store.disk import OpenFile, map_file
from routesae.reporting import FailedRun, WrongInput, human_bytes

if TYPE_CHECKING:
    from obstore import Bytes

    Data = bytes | Bytes  # what a read gives

IN_FLIGHT = 64  # requests at a time: at 50 ms each and 0.3 to 1 MB a block, 400 MB/s and more
PIECE_BYTES = 8 << 20  # of a large object, read or written at a time
_LOCK = "lock"
_PARTIAL = ".partial"


options = BlockOptions()  # of this process; the command line puts its own here


def blocks() -> BlockCache:
    """The cache of blocks of this process, made when it is first needed."""
    return _blocks_with(options)


@lru_cache(maxsize=1)
def _blocks_with(options: BlockOptions) -> BlockCache:
    return BlockCache(options.folder / "blocks", options.cache_bytes)


class Block(NamedTuple):
    """key: names these bytes and no others, ever. read: fetches them, `size` of them, in any thread."""

    key: str
    size: int
    read: Callable[[], Iterable[Data]]


class BlockCache:
    """The blocks below `folder`, at most `limit` bytes of them. Safe for the threads of one process."""

    def __init__(self, folder: Path, limit: int):
        self.limit = limit
        self.folder, self._held = _unused_folder(folder)
        self._lock = threading.Condition()
        self._kept: OrderedDict[str, int] = OrderedDict()  # bytes, the longest unused first
        self._writing = 0  # how many are
        self._pending: dict[str, tuple[Future[OpenFile], int]] = {}  # blocks on their way, and their bytes
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="block-fetch")
        left = [
            path for path in self.folder.glob("??/*") if not path.name.endswith(_PARTIAL)
        ]  # by an earlier process
        for path in sorted(left, key=lambda path: path.stat().st_mtime_ns):
            self._kept[path.name] = path.stat().st_size
        for path in self.folder.glob(f"??/*{_PARTIAL}"):
            path.unlink()
        self.bytes = sum(self._kept.values())  # of those, and of those being written
        with self._lock:
            self._make_room(0)

    def announce(self, block: Block) -> None:
        """Begin to fetch a block that will be asked for soon, unless half of the limit is under way already."""
        with self._lock:
            known = block.key in self._kept or block.key in self._pending
            if not known and sum(size for _, size in self._pending.values()) + block.size <= self.limit // 2:
                self._begin(block)

    def open(self, block: Block) -> OpenFile:
        """The block, open for reading. Raises as its `read`, and WrongInput or FailedRun if it cannot be kept."""
        with self._lock:
            if (kept := self._open(block.key, block.size)) is not None:
                return kept
            future = self._pending[block.key][0] if block.key in self._pending else self._begin(block)
        try:
            return future.result()
        except CancelledError:  # as another that was under way failed
            return self.open(block)

    def drop(self, key: str) -> None:
        """Let go of a block, which is then fetched anew where it is asked for."""
        with self._lock:
            if key in self._kept:
                with suppress(OSError):
                    self._path(key).unlink()
                self._forget(key)

    def mapped(self, block: Block, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
        """An array that is a whole block; it stays readable when the block has made room for others."""
        opened = self.open(block)
        with open(opened.descriptor, "rb", closefd=False) as file:
            return map_file(file, dtype, shape)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _open(self, key: str, size: int) -> OpenFile | None:
        """Under the lock. None where it is not kept, or has another size."""
        if key not in self._kept:
            return None
        try:
            opened = OpenFile(self._path(key))
        except FileNotFoundError:  # deleted by hand
            opened = None
        if opened is None or os.fstat(opened.descriptor).st_size != size:
            self._forget(key)
            return None
        self._kept.move_to_end(key)
        return opened

    def _begin(self, block: Block) -> Future[OpenFile]:
        """Under the lock."""
        future = self._pool.submit(self._fetch, block)
        self._pending[block.key] = future, block.size
        return future

    def _fetch(self, block: Block) -> OpenFile:
        try:
            return self._write(block.key, block.size, block.read())
        except FailedRun:
            with self._lock:  # else a process that ends would wait for them all
                self._pending = {key: one for key, one in self._pending.items() if not one[0].cancel()}
            raise
        finally:
            with self._lock:
                del self._pending[block.key]

    def _write(self, key: str, size: int, pieces: Iterable[Data]) -> OpenFile:
        path = self._path(key)
        partial = path.with_name(path.name + _PARTIAL)
        with self._lock:
            self._make_room(size)
            self.bytes += size
            self._writing += 1
        try:
            path.parent.mkdir(exist_ok=True)
            opened = OpenFile(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR)
            with open(opened.descriptor, "wb", closefd=False) as file:
                for piece in pieces:
                    file.write(piece)
            partial.rename(path)
        except BaseException as failure:
            with self._lock:
                self.bytes -= size
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
        while self.bytes + size > self.limit:
            key = next(iter(self._kept), None)
            if key is not None:
                with suppress(OSError):
                    self._path(key).unlink()
                self._forget(key)
            elif self._writing:
                self._lock.wait()
            else:
                needed = human_bytes(self.bytes + size)
                raise WrongInput(f"--cache-bytes {self.limit:,} is too little: {needed} are needed at once")

    def _forget(self, key: str) -> None:
        self.bytes -= self._kept.pop(key)


def _unused_folder(folder: Path) -> tuple[Path, OpenFile]:
    """The first folder below `folder` that no process uses, and its lock. Raises WrongInput if there is none."""
    try:
        for number in count():
            unused = folder / str(number)
            unused.mkdir(parents=True, exist_ok=True)
            lock = OpenFile(unused / _LOCK, os.O_CREAT | os.O_RDWR)
            with suppress(BlockingIOError):
                fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return unused, lock
    except OSError as error:
        raise WrongInput(f"--cache-dir {folder} cannot be written ({error.strerror}); give another") from error
    raise AssertionError
