"""Choose how many rows a forward pass takes: what was asked for, or what fits in the device's memory.

The number is part of the rounding of what a shard holds. So a shard is filled with one number throughout, its record
says which, and a resumed run takes the number that its last shards had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch

from routesae.harvest.cache.reader import Cache
from routesae.harvest.filling.buffer import ShardBuffer
from routesae.harvest.lm.model import LanguageModel
from routesae.reporting import FailedRun

log = logging.getLogger(__name__)

# The first size tried. On two cores 8 took less time a token than 4, and 16 no less than 8 (benchmarks/harvest.py).
START_SEQUENCES = {"cuda": 64, "cpu": 8}


class Batching:
    """`sequences` rows a forward pass, halved if the device's memory runs out, unless they were asked for."""

    def __init__(self, asked: int | None, cache: Cache, device: torch.device):
        self._is_asked = asked is not None
        recorded = [shard.record.batch_sequences for shard in cache.shards()] if asked is None else []
        self.sequences = asked or min(recorded, default=START_SEQUENCES[device.type])

    def fill(self, model: LanguageModel, cache: Cache, index: int, step: Callable[[int], None]) -> ShardBuffer:
        """The buffer of shard `index`, filled by batches of `self.sequences` rows.

        `step` gets the number of rows of each batch, and minus those of a buffer that is begun again. Raises
        FailedRun if no number of rows fits, or the one asked for does not.
        """
        first, after = cache.manifest.shard_range(index)
        token_ids_sT = np.array(cache.tokens()[first:after])
        done = 0

        def stepped(rows: int) -> None:
            nonlocal done
            done += rows
            step(rows)

        def filled() -> ShardBuffer:
            buffer = ShardBuffer(token_ids_sT, cache.manifest, index, model.device)
            buffer.fill(model, self.sequences, stepped)
            return buffer

        while True:
            try:
                return filled()
            except torch.OutOfMemoryError as full:
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
