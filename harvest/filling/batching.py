"""How many rows a forward pass takes: what was asked for, or what the device's memory has room for.

The number is part of the rounding of what a shard holds. So a shard is filled by one number alone, its record says
which, and a run that goes on takes the number its last shards had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from routesae.harvest.cache.reader import Cache
from routesae.harvest.filling.buffer import ShardBuffer
from routesae.harvest.lm.model import LanguageModel
from routesae.reporting import FailedRun

log = logging.getLogger(__name__)

# The first size tried. On two cores 8 took less time a token than 4, and 16 no less than 8 (benchmarks/harvest.py).
START_SEQUENCES = {"cuda": 64, "cpu": 8}


class Batching:
    """`sequences` rows a forward pass, halved where the device's memory runs out; never where they were asked for."""

    def __init__(self, asked: int | None, cache: Cache, device: torch.device):
        self._asked = asked is not None
        recorded = [shard.record.batch_sequences for shard in cache.shards()] if asked is None else []
        self.sequences = asked or min(recorded, default=START_SEQUENCES[device.type])

    def fill(self, make: Callable[[], ShardBuffer], model: LanguageModel, step: Callable[[int], None]) -> ShardBuffer:
        """A new buffer, filled by batches of `self.sequences` rows.

        `step` is told the rows of each batch, and minus those of a buffer that is begun again. Raises FailedRun
        where no number of rows fits, or the one asked for does not.
        """
        while True:
            done: list[int] = []

            def stepped(rows: int, done: list[int] = done) -> None:
                done.append(rows)
                step(rows)

            try:
                return _filled(make(), model, self.sequences, stepped)
            except torch.OutOfMemoryError as full:
                if self._asked or self.sequences == 1:
                    raise FailedRun(self._no_room(full)) from full
            # Out here, where the failure's traceback no longer holds the tensors.
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            step(-sum(done))
            log.info("%d rows a batch do not fit the device's memory: %d now", self.sequences, self.sequences // 2)
            self.sequences //= 2

    def _no_room(self, full: torch.OutOfMemoryError) -> str:
        remedy = "a smaller --batch-sequences, or none," if self._asked else "a smaller --shard-tokens or --context"
        return (
            f"two shards and a forward pass of {self.sequences} rows do not fit the device's memory "
            f"({str(full).splitlines()[0].rstrip('.')}); give {remedy} or --device cpu"
        )


def _filled(buffer: ShardBuffer, model: LanguageModel, sequences: int, step: Callable[[int], None]) -> ShardBuffer:
    buffer.fill(model, sequences, step)
    return buffer
