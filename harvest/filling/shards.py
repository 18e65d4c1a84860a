"""Missing shards in; each claimed, run through the LM and written, out.

The LM fills one shard buffer while a thread writes the other. A shard is a pure function of its rows, so it does not
matter which harvester writes it. Each takes what none has claimed, its own share first, and stays until all shards
are there: what one that dies leaves is taken over by the others.

Dimension letters: s rows a shard, T context, B rows a batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.filling.batching import Batching
from routesae.harvest.filling.buffer import ShardBuffer
from routesae.harvest.lm import model as lm
from routesae.harvest.settings import HarvestSettings, share_of
from routesae.machine.lock import Lock
from routesae.machine.memory import keep_freed_memory
from routesae.machine.stop import StopRequest, stop_code, stop_requests
from routesae.reporting import Progress, Report, Stopped, WrongInput, human_bytes

log = logging.getLogger(__name__)

STOP_WITHIN_SECONDS = 20.0  # then a shard not filled yet is dropped; SLURM kills 30 s after its SIGTERM
POLL_SECONDS = 0.5  # between looks at shards that other harvesters work on


def harvest_shards(
    cache: Cache,
    model: lm.LanguageModel,
    weights: str,
    claims: Claims,
    settings: HarvestSettings,
    report: Report,
) -> None:
    """Write the shards that are missing, beside whoever else does; returns once all are there.

    Raises Stopped where it was asked to stop, FailedRun where a shard cannot be made.
    """
    share = share_of(settings)
    batching = Batching(settings.batch_sequences, cache, model.device)
    log.info("harvest on %s", how_it_runs(model, cache.manifest.lm_dtype, batching.sequences))
    keep_freed_memory()
    tokens = cache.tokens()
    worker = {"worker": str(share)} if share.workers > 1 else {}
    tally = Tally(cache, share.order(cache.missing()), worker, report)
    with stop_requests() as stop, ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer:
        deadline = Deadline(stop)
        pending: list[Future[None]] = []
        for found in claimed(tally, claims):
            if found is None:
                _settle(pending)
                _wait_for_others(tally, claims)
            else:
                index, claim = found
                refuse_other_weights(cache, weights, settings)
                first, after = cache.manifest.shard_range(index)
                make = partial(ShardBuffer, np.array(tokens[first:after]), cache.manifest, index, model.device)
                try:
                    buffer = batching.fill(make, model, partial(_step, tally, deadline))
                except _OutOfTime:
                    break
                _settle(pending)  # at most one shard is being written while one is filled
                pending.append(writer.submit(_write, buffer, cache, claim, weights, batching.sequences))
            if stop():
                break
        _settle(pending)
        tally.finish()
        request, missing = stop(), len(cache.missing())
    if request and missing:
        there = f"{cache.manifest.shard_count - missing} of {cache.manifest.shard_count} shards are there"
        raise Stopped(f"stopped: {there}; run the same command again to go on", stop_code(request))


def how_it_runs(model: lm.LanguageModel, lm_dtype: str, sequences: int) -> str:
    """What was chosen by device, in one line."""
    chosen = [
        torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "the CPU",
        f"LM in {lm_dtype}",
        f"{getattr(model.model.config, '_attn_implementation', None) or 'its own'} attention",
        f"{torch.get_num_threads()} threads",
        f"{sequences} rows a batch",
    ]
    return ", ".join(chosen)


def refuse_other_weights(cache: Cache, weights: str, settings: HarvestSettings) -> None:
    """Raises WrongInput where shards that are there were written by an LM with other weights."""
    if cache.weights_hash() not in (None, weights):
        raise WrongInput(
            f"{settings.out} was begun with other weights than {settings.model} has now; "
            "give the model it was begun with, or another --out"
        )


def _settle(pending: list[Future[None]]) -> None:
    while pending:
        pending.pop().result()


def _write(buffer: ShardBuffer, cache: Cache, claim: Lock, weights: str, batch_sequences: int) -> None:
    try:
        buffer.commit(cache, weights, batch_sequences)
        cache.publish(buffer.index)
    except OSError:
        if claim.held() or not cache.has_shard(buffer.index):
            raise
        log.info("%s was taken over while this process was suspended", shard_name(buffer.index))
    finally:
        claim.release()


# ------------------------------------------------------------------------------------------------- asked to stop


class _OutOfTime(Exception):
    """The shard being filled is dropped."""


class Deadline:
    """Gives a harvest that is asked to stop STOP_WITHIN_SECONDS to fill the shard it is at."""

    def __init__(self, stop: StopRequest):
        self._stop = stop
        self._seen: float | None = None

    def check(self) -> None:
        """Between batches. Raises _OutOfTime."""
        if self._stop() is None:
            return
        if self._seen is None:
            self._seen = time.monotonic()
            log.info("stopping after this shard, or in %.0f s; once more to stop at once", STOP_WITHIN_SECONDS)
        elif time.monotonic() - self._seen > STOP_WITHIN_SECONDS:
            raise _OutOfTime


def _step(tally: Tally, deadline: Deadline, rows: int) -> None:
    tally.step(rows)
    deadline.check()


# ------------------------------------------------------------------------------------------ which shards are whose


class Tally:
    """How much of the missing shards is there, by this harvester's work and by others'; told to `report`.

    missing: in the order in which to take them. mine: those begun here.
    """

    def __init__(self, cache: Cache, missing: Sequence[int], facts: dict[str, str], report: Report):
        self.cache = cache
        self.missing = missing
        self.mine: set[int] = set()
        self._own = self._others = self._told = 0
        self._facts = facts
        self._report = report
        self._total = sum(map(self._tokens, missing))

    def step(self, rows: int, facts: dict[str, str] | None = None) -> None:
        """`rows` more were run here; fewer than none where they are to be run again."""
        manifest = self.cache.manifest
        self._own += rows * manifest.context
        self._told = done = self._own + self._others
        written = human_bytes(manifest.kept_tokens * manifest.token_bytes * done / (manifest.rows * manifest.context))
        shown = {"size": written, **self._facts, **(facts or {})}
        self._report(Progress("harvest", done, self._total, "tokens", shown))

    def finish(self) -> None:
        """Tell of what others did since the last step."""
        if self._told != self._own + self._others:
            self.step(0)

    def left(self) -> list[int]:
        """Shards that are not there yet and were not begun here."""
        missing = set(self.cache.missing())
        left = [index for index in self.missing if index not in self.mine]
        self._others = sum(self._tokens(index) for index in left if index not in missing)
        return [index for index in left if index in missing]

    def _tokens(self, index: int) -> int:
        first, after = self.cache.manifest.shard_range(index)
        return (after - first) * self.cache.manifest.context


def claimed(tally: Tally, claims: Claims) -> Iterator[tuple[int, Lock] | None]:
    """Shards to write and the claim on each, until all are there; None where others have claimed what is left."""
    while left := tally.left():
        found = False
        for index in left:
            if tally.cache.has_shard(index) or (claim := claims.take(shard_name(index))) is None:
                continue
            if tally.cache.has_shard(index):  # committed between the look and the claim
                claim.release()
                continue
            tally.mine.add(index)
            found = True
            yield index, claim
        if not found:
            yield None


def _wait_for_others(tally: Tally, claims: Claims) -> None:
    """A moment. What one of them leaves when it dies is taken over at the next look."""
    left = tally.left()
    owners = {str(owner) for index in left if (owner := claims.owner(shard_name(index)))}
    tally.step(0, {"waiting for": " and ".join(sorted(owners)) or "others"})
    if left:
        time.sleep(POLL_SECONDS)
