"""Fill the missing shards: claim each, run its rows through the LM, write it.

The LM fills one shard buffer while a thread writes the other. A shard is a pure function of its rows, so it does not
matter which harvester writes it. Each takes what nobody has claimed, its own share first, and stays until all shards
are there: the others take over what one that dies leaves.

The number of rows a forward pass takes is part of the rounding of what a shard holds. So a shard is filled with one
number throughout, its record says which, and a resumed run takes the number that its last shards had.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.ring import Ring
from routesae.harvest.filling.buffer import ShardBuffer, Staging
from routesae.harvest.filling.output import Output
from routesae.harvest.lm.model import LanguageModel
from routesae.harvest.settings import HarvestSettings, Share, share_of
from routesae.machine.device import keep_freed_memory
from routesae.machine.lock import Lock
from routesae.machine.stop import stop_code, stop_requests
from routesae.reporting import FailedRun, Progress, Report, Stopped, amount, human_bytes, is_out_of_memory

log = logging.getLogger(__name__)

STOP_WITHIN_SECONDS = 20.0  # then a shard not filled yet is dropped; SLURM kills 30 s after its SIGTERM
# Rows a forward pass, at first. On two cores 8 took less time a token than 4, and 16 no less than 8
# (benchmarks/harvest.py).
START_SEQUENCES = {"cuda": 64, "cpu": 8}
POLL_SECONDS = 0.5  # between looks at shards that other harvesters work on
TRIES = 3  # of a shard that is deleted while the run is on


def harvest_shards(
    output: Output,
    cache: Cache,
    model: LanguageModel,
    claims: Claims,
    settings: HarvestSettings,
    report: Report,
    ring: Ring | None = None,
) -> None:
    """Write the shards that are missing, beside any other harvesters; return once all are there.

    ring: what the cache is; a shard is written once it has room for it.
    Raises Stopped if it was asked to stop, FailedRun if a shard cannot be made.
    """
    batching = Batching(settings.batch_sequences, cache, model.device)
    on = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "the CPU"
    attention = getattr(model.model.config, "_attn_implementation", None) or "its own"
    log.info(
        f"harvest on {on}, LM in {cache.manifest.lm_dtype}, {attention} attention, "
        f"{amount(torch.get_num_threads(), 'thread')}, {batching.sequences} rows a batch"
    )
    keep_freed_memory()
    work = Work(cache, claims, share_of(settings), report, ring)
    with stop_requests() as stop, ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
        deadline: float | None = None

        def step(rows: int) -> None:
            nonlocal deadline
            work.report(rows)
            if stop() and deadline is None:
                deadline = time.monotonic() + STOP_WITHIN_SECONDS
                log.info("stopping after this shard, or in %.0f s; once more to stop at once", STOP_WITHIN_SECONDS)
            elif deadline is not None and time.monotonic() > deadline:
                raise _OutOfTime

        writing = writer.submit(lambda: None)  # at most one shard is being written while one is filled
        for item in work.claimed():
            if item is None:
                writing.result()
                work.wait()
            else:
                index, claim = item
                try:
                    buffer = batching.fill(model, cache, index, step)
                except _OutOfTime:
                    break
                writing.result()
                writing = writer.submit(_write, buffer, output, cache, claim, batching.sequences)
                del buffer
            if stop():
                break
        writing.result()
        work.finish()
        request, missing = stop(), len(cache.missing())
    if request and missing:
        there = f"{cache.manifest.shard_count - missing} of {cache.manifest.shard_count} shards are there"
        raise Stopped(f"stopped: {there}; run the same command again to go on", stop_code(request))


def _write(buffer: ShardBuffer, output: Output, cache: Cache, claim: Lock, batch_sequences: int) -> None:
    try:
        cache.require_unchanged()
        buffer.commit(cache, batch_sequences)
        output.publish(cache, buffer.index)
    except OSError:
        if claim.held() or not cache.has_shard(buffer.index):
            raise
        log.info("%s was taken over while this process was suspended", shard_name(buffer.index))
    finally:
        claim.release()


class _OutOfTime(Exception):
    """The shard being filled is dropped."""


class Batching:
    """`sequences` rows a forward pass, halved if the device's memory runs out, unless they were asked for."""

    def __init__(self, asked: int | None, cache: Cache, device: torch.device):
        self._is_asked, self._staging = asked is not None, Staging(cache.manifest, device)
        recorded = [shard.record.batch_sequences for shard in cache.shards()] if asked is None else []
        self.sequences = asked or min(recorded, default=START_SEQUENCES[device.type])

    def fill(self, model: LanguageModel, cache: Cache, index: int, step: Callable[[int], None]) -> ShardBuffer:
        """The buffer of shard `index`, filled by batches of `self.sequences` rows.

        `step` gets the number of rows of each batch, and minus those of a buffer that is begun again. Raises
        FailedRun if no number of rows fits, or the one asked for does not.
        """
        first, after = cache.manifest.shard_range(index)
        token_ids_sT, kept_sT = np.array(cache.tokens()[first:after]), cache.kept(first, after)
        done = 0

        def stepped(rows: int) -> None:
            nonlocal done
            done += rows
            step(rows)

        def filled() -> ShardBuffer:
            buffer = ShardBuffer(token_ids_sT, kept_sT, cache.manifest, index, self._staging)
            buffer.fill(model, self.sequences, stepped)
            return buffer

        while True:
            try:
                return filled()
            except (RuntimeError, MemoryError) as full:
                if not is_out_of_memory(full):
                    raise
                if self._is_asked or self.sequences == 1:
                    sizes = "--batch-sequences, or none," if self._is_asked else "--shard-tokens or --context"
                    raise FailedRun(
                        f"two shards and a forward pass of {self.sequences} rows do not fit in the device's memory "
                        f"({str(full).splitlines()[0].rstrip('.')}); give a smaller {sizes} or --device cpu"
                    ) from full
            # Out here the failure's traceback no longer holds the tensors.
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            step(-done)
            done = 0
            log.info("%d rows a batch do not fit in the device's memory: %d now", self.sequences, self.sequences // 2)
            self.sequences //= 2


class Work:
    """The missing shards: which to take next, and how much of them is done here and by others."""

    def __init__(self, cache: Cache, claims: Claims, share: Share, report: Report, ring: Ring | None = None):
        self._cache, self._claims, self._report, self._ring = cache, claims, report, ring
        shards = range(cache.manifest.shard_count)
        self._shards = share.order(shards) if ring is None else list(shards)  # as trainers need them
        self._asked = set[int]()  # the shards that were missing at any time
        self._tries = Counter[int]()  # of the shards begun here
        self._rows_here = self._rows_elsewhere = self._reported = 0
        self._facts = {"worker": str(share)} if share.workers > 1 else {}

    def claimed(self) -> Iterator[tuple[int, Lock] | None]:
        """Claim and yield shard after shard until all are there; yield None while the rest is claimed, here or by
        others. Raises FailedRun where a shard that was written does not stay."""
        while left := self._left():
            has_any = False
            for index in left:
                if self._ring is not None and not self._ring.has_room(index):
                    break
                if self._cache.has_shard(index) or (claim := self._claims.take(shard_name(index))) is None:
                    continue
                if self._cache.has_shard(index):  # committed between the look and the claim
                    claim.release()
                    continue
                if self._tries[index] == TRIES:
                    raise FailedRun(
                        f"{self._cache.path}/{shard_name(index)} was deleted {TRIES} times while this ran; find out "
                        "by what, and run the same command again"
                    )
                if self._tries[index]:
                    log.warning("%s was deleted while this ran: it is written again", shard_name(index))
                    self._rows_here -= self._rows_of([index])
                self._tries[index] += 1
                has_any = True
                yield index, claim
            if not has_any:
                yield None

    def report(self, rows: int = 0, facts: Mapping[str, str] | None = None) -> None:
        """Report that `rows` more were run here; fewer than none if a shard is to be filled again."""
        manifest = self._cache.manifest
        self._rows_here += rows
        self._reported = done = self._rows_here + self._rows_elsewhere
        size = human_bytes(manifest.kept_tokens * manifest.token_bytes * done / manifest.rows)
        done, total = done * manifest.context, self._rows_of(self._asked) * manifest.context
        self._report(Progress("harvest", done, total, "tokens", {"size": size, **self._facts, **(facts or {})}))

    def finish(self) -> None:
        """Report what others did since the last step."""
        if self._reported != self._rows_here + self._rows_elsewhere:
            self.report()

    def wait(self) -> None:
        """Wait a moment for other harvesters, or for room. The next look takes over what one that dies leaves."""
        if left := self._left():
            owners = {str(owner) for index in left if (owner := self._claims.owner(shard_name(index)))}
            if self._ring is not None:
                self._ring.advance()
                owners = owners or {self._ring.holding()}
            self.report(facts={"waiting for": " and ".join(sorted(owners)) or "others"})
            time.sleep(POLL_SECONDS)

    def _left(self) -> list[int]:
        """Shards that are not there, or not there any more."""
        missing = set(self._cache.missing())
        self._asked |= missing
        self._rows_elsewhere = self._rows_of(self._asked - missing - self._tries.keys())
        return [index for index in self._shards if index in missing]

    def _rows_of(self, shards: Iterable[int]) -> int:
        ranges = map(self._cache.manifest.shard_range, shards)
        return sum(after - first for first, after in ranges)
