"""A cache in; seeded, shuffled batches of hidden states out, as fast as the disk or the memory gives them.

A batch is made of blocks of up to 256 contiguous stored rows from many shards; since every shard was shuffled
when it was written, no mixing buffer is needed. Each block is mapped, copied and unmapped, so that memory does
not grow with the cache. A thread announces blocks to the kernel two batches ahead (page faults alone
leave the disk idle) and copies one batch ahead of the trainer.

Dimension letters: N tokens a batch, L layers, D width.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from routesae.harvest import arrays
from routesae.harvest.cache import DTYPES, Cache, Shard, damaged, layer_name
from routesae.harvest.device import CACHE_DTYPES
from routesae.reporting import FailedRun

BLOCK_ROWS = arrays.CHUNK_ROWS
ADVISE_BATCHES = 2  # batches ahead of the copy that the kernel is told of
STAGING_BATCHES = 3  # one with the trainer, one ready, one being filled


class Block(NamedTuple):
    """Selected stored rows first … after-1 of a shard, at most BLOCK_ROWS, counted among the selected ones."""

    shard: int
    first: int
    after: int


Plan = list[Block]
Batches = Generator[Tensor, None, None]


class Selection:
    """The stored rows of a cache whose tokens stand in rows [first_row, after_row) of `tokens`.

    Raises WrongInput where a shard is missing or damaged or a layer was not harvested.
    """

    def __init__(self, cache: Cache, first_row: int, after_row: int, layers: Sequence[int]):
        self.cache = cache
        self.layers = tuple(layers)
        cache.require_layers(layers)
        cache.require_whole()
        self.shards: list[Shard] = []
        self.rows: list[npt.NDArray[np.int64] | None] = []  # None: all of the shard's rows, in order
        for shard in cache.shards():
            first, after = shard.record.rows
            if after <= first_row or after_row <= first:
                continue
            try:
                rows = shard.positions(first_row, after_row)
            except arrays.BadArray as bad:
                raise damaged(shard.path, bad) from bad
            self.shards.append(shard)
            self.rows.append(rows)

    def count(self, shard: int) -> int:
        """Selected rows of the shard-th of `self.shards`."""
        rows = self.rows[shard]
        return self.shards[shard].record.kept if rows is None else len(rows)

    def __len__(self) -> int:
        """Selected rows, that is tokens, in all."""
        return sum(map(self.count, range(len(self.shards))))

    def blocks(self) -> Plan:
        """Every selected row once, in stored order."""
        return [
            Block(shard, first, min(first + BLOCK_ROWS, self.count(shard)))
            for shard in range(len(self.shards))
            for first in range(0, self.count(shard), BLOCK_ROWS)
        ]


def epoch_plans(selection: Selection, *, seed: int, epoch: int, batch_tokens: int) -> Iterator[Plan]:
    """The batches of one epoch: every selected token once, in an order fixed by (seed, epoch).

    All have `batch_tokens` tokens but the last, which has what remains.
    """
    blocks = selection.blocks()
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(blocks))
    return cut_plans((blocks[i] for i in order), batch_tokens)


def cut_plans(blocks: Iterator[Block], batch_tokens: int) -> Iterator[Plan]:
    """Gather blocks into batches of exactly `batch_tokens`, splitting a block where a batch is full."""
    plan: Plan = []
    room = batch_tokens
    for block in blocks:
        while block.first < block.after:
            taken = block._replace(after=min(block.after, block.first + room))
            plan.append(taken)
            room -= taken.after - taken.first
            block = block._replace(first=taken.after)
            if room == 0:
                yield plan
                plan, room = [], batch_tokens
    if plan:
        yield plan


def read_plan(selection: Selection, plan: Plan, out_LND: npt.NDArray[np.floating]) -> int:
    """Copy the plan's rows of every layer into out_LND; returns N, the rows filled.

    Raises FailedRun where a file is gone, cut or altered in size.
    """
    filled = 0
    for block in plan:
        shard, n = selection.shards[block.shard], block.after - block.first
        for at, layer in enumerate(selection.layers):
            try:
                out_LND[at, filled : filled + n] = _stored_rows(selection, block, layer)
            except (arrays.BadArray, OSError, ValueError) as bad:
                raise FailedRun(str(damaged(shard.path / layer_name(layer), arrays.BadArray(str(bad))))) from bad
        filled += n
    return filled


def _stored_rows(selection: Selection, block: Block, layer: int) -> arrays.Array:
    shard, rows = selection.shards[block.shard], selection.rows[block.shard]
    first, after = _span(selection, block)
    stored = _map_rows(shard, layer, first, after)
    return stored if rows is None else stored[rows[block.first : block.after] - first]


def _span(selection: Selection, block: Block) -> tuple[int, int]:
    """First stored row of the block, and the one after its last."""
    rows = selection.rows[block.shard]
    if rows is None:
        return block.first, block.after
    return int(rows[block.first]), int(rows[block.after - 1]) + 1


def _map_rows(shard: Shard, layer: int, first: int, after: int) -> arrays.Array:
    if shard.manifest.compress != "none":
        return shard.read_rows(layer, first, after)
    dtype, width = np.dtype(DTYPES[shard.manifest.dtype]), shard.manifest.width
    # Mapped anew for every block: a mapping kept open would hold its pages in this process's memory.
    return np.memmap(
        shard.layer_file(layer),
        dtype,
        "r",
        offset=first * width * dtype.itemsize,
        shape=(after - first, width),
    )


def advise(selection: Selection, plan: Plan) -> None:
    """Tell the kernel that the plan's rows are wanted soon."""
    manifest = selection.cache.manifest
    if manifest.compress != "none" or not hasattr(os, "posix_fadvise"):
        return
    row_bytes = manifest.width * np.dtype(DTYPES[manifest.dtype]).itemsize
    for block in plan:
        first, after = _span(selection, block)
        for layer in selection.layers:
            try:
                descriptor = os.open(selection.shards[block.shard].layer_file(layer), os.O_RDONLY)
            except (OSError, arrays.BadArray):
                continue  # the copy meets the same fault and names it
            os.posix_fadvise(descriptor, first * row_bytes, (after - first) * row_bytes, os.POSIX_FADV_WILLNEED)
            os.close(descriptor)


def load(selection: Selection, plans: Iterator[Plan], batch_tokens: int, device: torch.device) -> Batches:
    """hidden_LND of every plan, in the cache's dtype, on `device`; valid until the next one is asked for.

    Close it (contextlib.closing) where it is not read to its end, and its thread ends too.
    On CUDA the copy to the device is made from pinned memory on a stream of its own, one batch ahead.
    """
    staged = _staged(selection, plans, batch_tokens, pinned=device.type == "cuda")
    return _on_device(staged, device) if device.type == "cuda" else staged


def _staged(selection: Selection, plans: Iterator[Plan], batch_tokens: int, *, pinned: bool) -> Batches:
    manifest = selection.cache.manifest
    shape = (len(selection.layers), min(batch_tokens, len(selection)), manifest.width)
    free: queue.Queue[Tensor | None] = queue.Queue()
    ready: queue.Queue[tuple[Tensor, int] | BaseException | None] = queue.Queue()
    for _ in range(STAGING_BATCHES):
        free.put(torch.empty(shape, dtype=CACHE_DTYPES[manifest.dtype], pin_memory=pinned))

    def fill() -> None:
        try:
            for plan in _advised(selection, plans):
                staging_LND = free.get()
                if staging_LND is None:
                    return
                ready.put((staging_LND, read_plan(selection, plan, staging_LND.numpy())))
            ready.put(None)
        except BaseException as failure:  # handed to the trainer's thread, which raises it
            ready.put(failure)

    with _running(fill, free):
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            staging_LND, n = item
            yield staging_LND[:, :n]
            free.put(staging_LND)


@contextmanager
def _running(fill: Callable[[], None], free: queue.Queue[Tensor | None]) -> Iterator[None]:
    thread = threading.Thread(target=fill, name="batch-loader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        free.put(None)  # wakes a thread that waits for a staging buffer, and ends it
        thread.join()


def _advised(selection: Selection, plans: Iterator[Plan]) -> Iterator[Plan]:
    """The same plans, each announced to the kernel ADVISE_BATCHES before it is handed out."""
    ahead: list[Plan] = []
    for plan in plans:
        advise(selection, plan)
        ahead.append(plan)
        if len(ahead) > ADVISE_BATCHES:
            yield ahead.pop(0)
    yield from ahead


def _on_device(staged: Batches, device: torch.device) -> Batches:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copied: tuple[Tensor, torch.cuda.Event] | None = None
    for staging_LND in staged:
        with torch.cuda.stream(stream):
            hidden_LND = staging_LND.to(device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        if copied is not None:
            yield _arrived(*copied)
        # `staged` reuses the buffer once it is resumed; by now its copy ran beside the trainer's whole step.
        event.synchronize()
        copied = (hidden_LND, event)
    if copied is not None:
        yield _arrived(*copied)


def _arrived(hidden_LND: Tensor, event: torch.cuda.Event) -> Tensor:
    current = torch.cuda.current_stream(hidden_LND.device)
    current.wait_event(event)
    hidden_LND.record_stream(current)
    return hidden_LND
