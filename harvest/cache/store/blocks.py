"""A bounded folder on this disk for what was read from object stores: blocks of bytes, found again by key.

    <--cache-dir>/blocks/3f/3f0c…       a block; the time it was last used is its mtime

All processes share the folder and keep about --cache-bytes in it, the blocks that were used last. Whoever reads a
block compares its rows with their checksums, and drops it where they differ. Blocks are fetched by many threads: a
request to a store takes 50 ms, however small.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy.typing as npt

from routesae.harvest.cache.arrays import Array
from routesae.harvest.cache.settings import BlockOptions
from routesae.harvest.cache.store.disk import OpenFile, map_file
from routesae.machine.files import PARTIAL, BadFile, delete_unless_locked, replacing
from routesae.reporting import FailedRun, WrongInput, human_bytes

if TYPE_CHECKING:
    from obstore import Bytes

    Data = bytes | Bytes  # what a read gives

IN_FLIGHT = 64  # requests at a time: at 50 ms each and 0.3 to 1 MB a block, 400 MB/s and more
PIECE_BYTES = 8 << 20  # of a large object, read or written at a time
KEPT_SHARE = 7 / 8  # of the limit stays where room is made, so that not every block asks for a look at all others


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
    """The blocks below `folder`, about `limit` bytes of them. Raises WrongInput where the folder cannot be made."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._pending: dict[str, tuple[Future[OpenFile], int]] = {}  # blocks on their way, and their bytes
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="block-fetch")
        self._writing = 0  # bytes of the blocks that are being written
        self._bytes = limit  # of these and all others, as far as known: the first block looks what is there
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WrongInput(f"--cache-dir {folder} cannot be written ({error.strerror}); give another") from error

    def announce(self, block: Block) -> None:
        """Begin to fetch a block that will be asked for soon, unless half of the limit is under way already."""
        with self._lock:
            under_way = sum(size for _, size in self._pending.values())
            known = block.key in self._pending or self._path(block.key).exists()
            if not known and under_way + block.size <= self.limit // 2:
                self._begin(block)

    def open(self, block: Block) -> OpenFile:
        """The block, open for reading. Raises as its `read`, and WrongInput or FailedRun if it cannot be kept."""
        with self._lock:
            if block.key in self._pending:
                future = self._pending[block.key][0]
            elif (kept := self._kept(block)) is not None:
                return kept
            else:
                future = self._begin(block)
        try:
            return future.result()
        except CancelledError:  # as another that was under way failed
            return self.open(block)

    def drop(self, key: str) -> None:
        """Let go of a block, which is then fetched anew where it is asked for."""
        with suppress(OSError):
            self._path(key).unlink()

    def mapped(self, block: Block, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
        """An array that is a whole block; it stays readable when the block has made room for others."""
        opened = self.open(block)
        with open(opened.descriptor, "rb", closefd=False) as file:
            return map_file(file, dtype, shape)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _kept(self, block: Block) -> OpenFile | None:
        """None where it is not kept, or was cut."""
        with suppress(OSError, BadFile):
            opened = OpenFile(self._path(block.key))
            if os.fstat(opened.descriptor).st_size == block.size:
                os.utime(self._path(block.key))
                return opened
        return None

    def _begin(self, block: Block) -> Future[OpenFile]:
        """Under the lock."""
        future = self._pool.submit(self._fetch, block)
        self._pending[block.key] = future, block.size
        return future

    def _fetch(self, block: Block) -> OpenFile:
        try:
            with self._lock:
                self._writing += block.size
                self._make_room(block.size)
            path = self._path(block.key)
            path.parent.mkdir(exist_ok=True)
            with replacing(path, durable=False) as file:
                for piece in block.read():
                    file.write(piece)
                file.flush()
                return OpenFile(Path(file.name))  # before another process can make room with it
        except OSError as error:
            if error.errno is None:  # the store's
                raise
            raise FailedRun(
                f"{self.folder} does not take a block ({error.strerror}); make room there, or give another "
                "--cache-dir or fewer --cache-bytes"
            ) from error
        except FailedRun:
            with self._lock:  # else a process that ends would wait for them all
                self._pending = {key: one for key, one in self._pending.items() if not one[0].cancel()}
            raise
        finally:
            with self._lock:
                self._writing -= block.size
                del self._pending[block.key]

    def _make_room(self, size: int) -> None:
        """Under the lock: count `size` bytes more, and delete the blocks used longest ago where they are too many."""
        if size > self.limit:
            raise WrongInput(f"--cache-bytes {self.limit:,} is too little: {human_bytes(size)} are needed at once")
        self._bytes += size
        if self._bytes <= self.limit:
            return
        kept = []
        for path in self.folder.glob("??/*"):
            with suppress(OSError):
                if path.name.endswith(PARTIAL):
                    delete_unless_locked(path)  # of a process that was killed
                else:
                    status = path.lstat()
                    kept.append((status.st_mtime_ns, status.st_size, path))
        self._bytes = self._writing + sum(size for _, size, _ in kept)
        for _, freed, path in sorted(kept):
            if self._bytes <= self.limit * KEPT_SHARE:
                return
            with suppress(OSError):
                path.unlink()
            self._bytes -= freed
