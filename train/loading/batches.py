"""Seeded, shuffled batches of a cache's hidden states, as fast as the disk or the memory gives them.

A batch is made of blocks of up to 256 contiguous stored rows from many shards. Every shard was shuffled when it was
written, so no mixing buffer is needed. A thread announces blocks to the kernel a few batches ahead (otherwise the
disk would see one small read at a time) and, with a second thread, reads them one batch ahead of the trainer.

Dimension letters: N tokens a batch, R reads, L layers of the selection, M of the cache, D width, m rows of a span.
"""

import atexit
import math
import mmap
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from routesae.harvest.cache import arrays
from routesae.harvest.cache.quantise import Channels, decode
from routesae.harvest.cache.reader import Cache, Shard, damaged
from routesae.machine.device import CACHE_DTYPES
from routesae.train.loading.rows import Read, RowReader, reads_of_rows

BLOCK_ROWS = arrays.CHUNK_ROWS
ADVISE_BATCHES, ADVISE_BYTES = 2, 1 << 26  # the kernel is told of both, at least, ahead of the reading
STAGING_BATCHES = 3  # one with the trainer, one ready, one being filled
_PLAN_PIECE_BLOCKS = 4096


class Batch(NamedTuple):
    """Hidden states as they are stored, decoded where that is int8; and what STATISTICS names, float32: mean and
    (unbiased) standard deviation of each over D."""

    hidden_LND: Tensor
    mean_LN1: Tensor
    std_LN1: Tensor


class Encoded(NamedTuple):
    """A batch of an int8 cache as it is stored, half the bytes to copy to a GPU. read_N: which of its R reads a token
    is from. channels_R2LD: means and deviations of the channels of the shards that these are from."""

    q_LND: Tensor
    mean_LN1: Tensor
    std_LN1: Tensor
    scale_LN1: Tensor
    read_N: Tensor
    channels_R2LD: Tensor

    def decoded(self) -> Batch:
        """Where it is, to the same bytes on any device."""
        hidden_LND = torch.empty_like(self.q_LND, dtype=torch.float16)
        scratch_ND = torch.empty_like(self.q_LND[0], dtype=torch.float32)
        for at, q_ND in enumerate(self.q_LND):
            channels = Channels(*(of_RD[self.read_N] for of_RD in self.channels_R2LD[:, :, at].unbind(1)))
            decode(q_ND, self.scale_LN1[at, :, 0], channels, scratch_ND, hidden_LND[at])
        return Batch(hidden_LND, self.mean_LN1, self.std_LN1)


class Block(NamedTuple):
    """Selected stored rows first … after-1 of a shard, at most BLOCK_ROWS, counted among the selected ones."""

    shard: int
    first: int
    after: int


Plan = list[Block]
Batches = Generator[Batch, None, None]


class Selection:
    """The stored rows of a cache whose tokens stand in rows [first_row, after_row) of `tokens`.

    indices: of the shards that have some of them. shards: those that are open, by their place among these. growing:
    none is as yet, because they may still be written; what each will have is counted from `tokens`.
    Raises WrongInput where a shard is missing, deleted by a ring or damaged, or a layer was not harvested.
    """

    def __init__(self, cache: Cache, first_row: int, after_row: int, layers: Sequence[int], *, growing: bool = False):
        self.cache, self.layers, self._bounds = cache, tuple(layers), (first_row, after_row)
        cache.require_layers(layers)
        size, after = cache.manifest.shard_rows, min(after_row, cache.manifest.rows)
        self.indices = range(first_row // size, -(-after // size) if first_row < after else 0)
        self.shards: dict[int, Shard] = {}
        self.rows: dict[int, npt.NDArray[np.int64] | None] = {}  # None: all of the shard's rows, in order
        self._counts: dict[int, int] = {}
        for place, index in enumerate(self.indices) if growing else ():
            first, after = cache.manifest.shard_range(index)
            self._counts[place] = int(cache.kept(max(first, first_row), min(after, after_row)).sum())
        if not growing:
            cache.require_whole(self.indices)
            self.open(range(len(self.indices)))

    def open(self, places: Iterable[int]) -> None:
        """Open those of its shards that are not open. Raises WrongInput where one is damaged."""
        for place in sorted(set(places) - self.shards.keys()):
            shard = self.shards[place] = self.cache.opened(self.indices[place])
            (first_row, after_row), (first, after) = self._bounds, shard.record.rows
            self.rows[place] = None
            if first < first_row or after_row < after:
                row = self.positions(place) // self.cache.manifest.context
                self.rows[place] = np.flatnonzero((first_row <= row) & (row < after_row))
            rows = self.rows[place]
            found = shard.record.kept if rows is None else len(rows)
            if self._counts.setdefault(place, found) != found:
                raise damaged(shard.path, arrays.BadArray(f"{found} positions kept, and not {self._counts[place]}"))

    def count(self, shard: int) -> int:
        """Selected rows of the shard-th of `indices`."""
        return self._counts[shard]

    def __len__(self) -> int:
        """Selected rows, that is tokens, in all."""
        return sum(self._counts.values())

    def positions(self, shard: int) -> npt.NDArray[np.int64]:
        """Flat positions in `tokens` of the selected rows of the shard-th of `indices`, in stored order."""
        opened, rows = self.shards[shard], self.rows[shard]
        try:
            positions = opened.positions()
        except arrays.BadArray as bad:
            raise damaged(opened.path, bad) from bad
        return positions if rows is None else positions[rows]

    def block_table(self, shards: range) -> npt.NDArray[np.int64]:
        """[blocks, 3]: shard, first and after of every block; every selected row of the shards once, in order."""
        places, counts = np.array(shards, np.int64), np.array([self.count(shard) for shard in shards], np.int64)
        blocks = -(-counts // BLOCK_ROWS)
        at = np.repeat(np.arange(len(counts)), blocks)
        first = BLOCK_ROWS * (np.arange(len(at)) - np.repeat(blocks.cumsum() - blocks, blocks))
        return np.stack([places[at], first, np.minimum(first + BLOCK_ROWS, counts[at])], axis=1)

    def blocks(self) -> Plan:
        """Every selected row once, in stored order."""
        return [Block(*row) for row in self.block_table(range(len(self.indices))).tolist()]


class Window(NamedTuple):
    """Neighbouring shards of a selection, whose blocks are shuffled together, and N of each of their batches."""

    shards: range
    batch_tokens: list[int]


def windows_of(selection: Selection, batch_tokens: int, window: int | None) -> list[Window]:
    """The windows of `window` shards, the last of fewer; None: one window of all shards.

    A window is divided evenly, into batches of at most `batch_tokens`: none ends with a much smaller one, whose
    gradient would be noise. Only the last batch of a whole epoch without windows may be small.
    """
    found = []
    every = max(1, window or len(selection.indices))
    for first in range(0, len(selection.indices), every):
        shards = range(first, min(first + every, len(selection.indices)))
        if tokens := sum(map(selection.count, shards)):
            size = batch_tokens if window is None else -(-tokens // -(-tokens // batch_tokens))
            found.append(Window(shards, [min(size, tokens - at) for at in range(0, tokens, size)]))
    return found


def epoch_plans(
    selection: Selection, *, seed: int, epoch: int, batch_tokens: int, window: int | None = None
) -> Iterator[Plan]:
    """The batches of one epoch: every selected token once, in an order fixed by (seed, epoch, window).

    Without windows all have `batch_tokens` tokens but the last, which has what remains; see `windows_of`.
    """
    for at, one in enumerate(windows_of(selection, batch_tokens, window)):
        yield from cut_plans(_shuffled(selection, one, [seed, epoch, at]), one.batch_tokens[0])


def _shuffled(selection: Selection, window: Window, seeds: list[int]) -> Iterator[Block]:
    table = selection.block_table(window.shards)
    order = np.random.Generator(np.random.PCG64(seeds)).permutation(len(table))
    for at in range(0, len(order), _PLAN_PIECE_BLOCKS):
        yield from (Block(*row) for row in table[order[at : at + _PLAN_PIECE_BLOCKS]].tolist())


def cut_plans(blocks: Iterator[Block], batch_tokens: int) -> Iterator[Plan]:
    """Gather blocks into batches of exactly `batch_tokens`, splitting a block where a batch is full."""
    plan: Plan = []
    room = batch_tokens
    for block in blocks:
        first = block.first
        while first < block.after:
            after = min(block.after, first + room)
            whole = (first, after) == block[1:]
            plan.append(block if whole else Block(block.shard, first, after))
            room -= after - first
            first = after
            if room == 0:
                yield plan
                plan, room = [], batch_tokens
    if plan:
        yield plan


def share_of(plan: Plan, rank: int, world: int) -> Plan:
    """What one of `world` ranks reads of a plan: contiguous rows, every row read by one rank alone, shares of the
    same size or one row less. Of fewer tokens than ranks each rank reads all."""
    tokens = tokens_of(plan)
    if world == 1 or tokens < world:
        return plan
    first, after = tokens * rank // world, tokens * (rank + 1) // world
    own: Plan = []
    begins = 0
    for block in plan:
        low, high = max(first - begins, 0), min(after - begins, block.after - block.first)
        if low < high:
            own.append(Block(block.shard, block.first + low, block.first + high))
        begins += block.after - block.first
    return own


def largest_share(batch_tokens: int, world: int) -> int:
    """The most tokens that `share_of` gives a rank of a batch of at most `batch_tokens`."""
    return max(-(-batch_tokens // world), min(batch_tokens, world - 1))


def reads_of(selection: Selection, plan: Plan) -> list[Read]:
    """What is to be read of every layer for the plan's batch."""
    reads, at = list[Read](), 0
    for block in plan:
        shard, rows = selection.shards[block.shard], selection.rows[block.shard]
        if rows is None:
            reads.append(Read(shard, block.first, block.after, None, at))
        else:
            reads += reads_of_rows(shard, rows[block.first : block.after], at)
        at += block.after - block.first
    return reads


def tokens_of(plan: Plan) -> int:
    """N of the plan's batch."""
    return sum(block.after - block.first for block in plan)


def batch_memory(selection: Selection, tokens: int, *, pinned: bool = False, encoded: bool = False) -> list[Tensor]:
    """What a reader fills, for at least one token: a Batch, or the first four of an Encoded one."""
    manifest, layers = selection.cache.manifest, len(selection.layers)
    dtype = torch.int8 if encoded else CACHE_DTYPES[manifest.dtype]
    numbers = [_memory((layers, tokens, 1), torch.float32, pinned) for _ in range(3 if encoded else 2)]
    return [_memory((layers, tokens, manifest.width), dtype, pinned), *numbers]


def _memory(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    held = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # the first batches are read into fresh pages; 512 times fewer faults
        held.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(held, dtype=dtype).view(shape)


def read_sample(selection: Selection, *, seed: int, tokens: int, window: int | None = None) -> Batch:
    """The first `tokens` of the first epoch, or all that its first window has, in memory of their own."""
    first = windows_of(selection, tokens, window)[0]
    plans = islice(cut_plans(_shuffled(selection, first, [seed, 0, 0]), tokens), 1)
    (batch,) = load(selection, plans, tokens, torch.device("cpu"))
    return batch


def load(selection: Selection, plans: Iterator[Plan], batch_tokens: int, device: torch.device) -> Batches:
    """The batch of every plan on `device`; valid until the next one is asked for.

    Close it (contextlib.closing) where it is not read to its end, and its threads end too.
    On CUDA the copy to the device is made from pinned memory on a stream of its own, one batch ahead; int8 is decoded
    there. Raises FailedRun where a file is gone, cut or altered.
    """
    cuda = device.type == "cuda"
    encoded = cuda and selection.cache.manifest.dtype == "int8"
    staged = _staged(selection, plans, batch_tokens, pinned=cuda, encoded=encoded)
    return _on_device(staged, device) if cuda else cast("Batches", staged)


def _staged(
    selection: Selection, plans: Iterator[Plan], batch_tokens: int, *, pinned: bool = False, encoded: bool = False
) -> Generator[Batch | Encoded, None, None]:
    reader = RowReader(selection.cache.manifest, selection.layers, decoding=not encoded)
    tokens = min(batch_tokens, len(selection))
    free: queue.Queue[list[Tensor] | None] = queue.Queue()
    ready: queue.Queue[tuple[list[Tensor], Batch | Encoded] | BaseException | None] = queue.Queue()
    for _ in range(STAGING_BATCHES):
        free.put(batch_memory(selection, tokens, pinned=pinned, encoded=encoded))
    stopped = threading.Event()

    def fill() -> None:
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="batch-loader") as second:
                for reads, n in _advised(reader, selection, plans):
                    staging = free.get()
                    if staging is None or stopped.is_set():
                        return
                    # The beginning of the memory, so that a smaller batch is contiguous too: a copy to a GPU is
                    # asynchronous only if it is.
                    values = [most.view(-1)[: most[:, :n].numel()].view_as(most[:, :n]) for most in staging]
                    half = len(reads) // 2
                    memory = [one.numpy() for one in values]
                    other_half = second.submit(reader.read, reads[half:], *memory)
                    reader.read(reads[:half], *memory)
                    other_half.result()
                    if encoded:
                        sizes = torch.tensor([read.rows.stop - read.rows.start for read in reads])
                        channels_R2LD = torch.stack([reader.channels(read.shard) for read in reads])
                        small = (torch.repeat_interleave(sizes), channels_R2LD)
                        values += [one.pin_memory() if pinned else one for one in small]
                    ready.put((staging, (Encoded if encoded else Batch)(*values)))
            ready.put(None)
        except BaseException as failure:  # handed to the trainer's thread, which raises it
            ready.put(failure)

    thread = threading.Thread(target=fill, name="batch-loader", daemon=True)

    def end() -> None:
        stopped.set()
        free.put(None)  # wakes a thread that waits for a staging buffer
        thread.join()

    # Of a loader that nobody closes: at exit, while threads can still be joined.
    atexit.register(end)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            staging, batch = item
            yield batch
            free.put(staging)
    finally:
        end()
        atexit.unregister(end)


def _advised(reader: RowReader, selection: Selection, plans: Iterator[Plan]) -> Iterator[tuple[list[Read], int]]:
    """What to read for each plan, and N, announced to the kernel at least ADVISE_BATCHES and ADVISE_BYTES ahead."""
    ahead: deque[tuple[list[Read], int]] = deque()
    manifest = selection.cache.manifest
    token_bytes = manifest.token_bytes // len(manifest.layers) * len(selection.layers)
    tokens_ahead = 0  # of all in `ahead` but the first
    for plan in plans:
        reads, n = reads_of(selection, plan), tokens_of(plan)
        reader.advise(reads)
        if ahead:
            tokens_ahead += n
        ahead.append((reads, n))
        if len(ahead) > ADVISE_BATCHES and tokens_ahead * token_bytes >= ADVISE_BYTES:
            yield ahead.popleft()
            tokens_ahead -= ahead[0][1]
    yield from ahead


def _on_device(staged: Iterator[Batch | Encoded], device: torch.device) -> Batches:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: Batch | None = None
    for staging in staged:
        with torch.cuda.stream(stream):
            copied = type(staging)(*(values.to(device, non_blocking=True) for values in staging))
            batch = copied.decoded() if isinstance(copied, Encoded) else copied
            arrived = stream.record_event()
        if ahead is not None:
            yield ahead
        # `staged` reuses the buffer once it is resumed; by now its copy ran beside the trainer's whole step. And the
        # batch is there, whichever stream is to read it.
        arrived.synchronize()
        for values in batch:
            values.record_stream(torch.cuda.current_stream(device))
        ahead = batch
    if ahead is not None:
        yield ahead
