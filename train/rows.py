"""Stored rows of a shard's arrays in; the same rows in memory that the caller gives, out.

Rows are read, not mapped. A pread copies from the page cache at nearly memcpy's rate (benchmarks/loader.py), leaves
nothing of the cache in this process's memory, and meets a file that was cut as a short read, where a mapping would
end the process with SIGBUS.

Dimension letters: m rows read, W numbers a row: D of a layer, L of token_mean and token_std.
"""

from __future__ import annotations

import os
import resource
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from routesae.harvest import arrays
from routesae.harvest.cache import Shard

OPEN_FILES = 512  # held open at most; opening one anew costs about a twentieth of reading a block from it
GAP_ROWS = 16  # rows between two wanted ones that are read along rather than jumped over


class Span(NamedTuple):
    """Stored rows first … after-1 of a shard, of which `picked` (counted from `first`) are wanted; None: all."""

    first: int
    after: int
    picked: npt.NDArray[np.int64] | None = None

    @property
    def wanted(self) -> int:
        """m, rows of it that are wanted."""
        return self.after - self.first if self.picked is None else len(self.picked)


def spans_of(rows: npt.NDArray[np.int64]) -> list[Span]:
    """Few reads that together hold the stored rows `rows`, ascending, and at most GAP_ROWS others after each."""
    pieces = np.split(rows, np.flatnonzero(np.diff(rows) > GAP_ROWS) + 1) if len(rows) else []
    return [Span(int(piece[0]), int(piece[-1]) + 1, piece - piece[0]) for piece in pieces]


class OpenFile:
    """A descriptor that is closed when nobody holds this object any more, whichever thread that was."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class RowFiles:
    """The files of uncompressed arrays: those used last are held open, far fewer than the process may have."""

    def __init__(self) -> None:
        self._opened = lru_cache(maxsize=_open_file_limit())(_open_file)
        self._of_thread = threading.local()

    def read(self, shard: Shard, name: str, span: Span, out_mW: npt.NDArray[np.generic]) -> None:
        """Copy the span's wanted rows of array `name` into out_mW, C-contiguous and of the array's dtype.

        Raises BadArray where the file is not what the shard's record says or ends early, OSError where it cannot be
        read.
        """
        opened = self._opened(shard, name)
        if span.picked is None:
            _read_whole(opened, span.first, out_mW)
            return
        rows_W = self._scratch((span.after - span.first) * out_mW[0].nbytes).view(out_mW.dtype)
        rows_W = rows_W.reshape(-1, out_mW.shape[1])
        _read_whole(opened, span.first, rows_W)
        np.take(rows_W, span.picked, axis=0, out=out_mW, mode="clip")  # "raise" would copy once more

    def _scratch(self, size: int) -> npt.NDArray[np.uint8]:
        """Memory of this thread, used again and again: fresh pages cost more than what is copied into them."""
        held: npt.NDArray[np.uint8] | None = getattr(self._of_thread, "held", None)
        if held is None or len(held) < size:
            held = self._of_thread.held = np.empty(size, np.uint8)
        return held[:size]

    def advise(self, shard: Shard, name: str, span: Span, row_bytes: int) -> None:
        """Tell the kernel that the span is wanted soon. Raises as `read`."""
        if hasattr(os, "posix_fadvise"):
            length = (span.after - span.first) * row_bytes
            opened = self._opened(shard, name)
            os.posix_fadvise(opened.descriptor, span.first * row_bytes, length, os.POSIX_FADV_WILLNEED)


def _read_whole(opened: OpenFile, first: int, out_mW: npt.NDArray[np.generic]) -> None:
    assert out_mW.flags.c_contiguous  # a copy would be read into and thrown away
    view = out_mW.reshape(-1).view(np.uint8).data
    offset = first * (out_mW.nbytes // len(out_mW))
    while view:  # a read may give less than it is asked for
        read = os.preadv(opened.descriptor, [view], offset)
        if read == 0:
            raise arrays.BadArray(f"ends before byte {offset + len(view):,}, which is still of its rows")
        view, offset = view[read:], offset + read


def _open_file(shard: Shard, name: str) -> OpenFile:
    shard.check(name)
    return OpenFile(os.open(arrays.data_file(shard.path / name, 2), os.O_RDONLY))


def _open_file_limit() -> int:
    """A quarter of what the process may open: the rest is for whoever else is in it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if soft == resource.RLIM_INFINITY else max(1, min(OPEN_FILES, soft // 4))
