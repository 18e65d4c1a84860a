"""The arrays of a float shard, made of its hidden states, for tests and benchmarks that write caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from routesae.harvest.cache.manifest import STATISTICS, LayerStatistics, layer_name
from routesae.harvest.cache.quantise import row_statistics

Array = np.ndarray[Any, Any]
NO_STATISTICS = LayerStatistics(mean=0.0, mean_square=0.0, max_abs=0.0, clipped=0)


def stored_statistics(hidden_nD: Array) -> tuple[Array, Array]:
    """mean_n and std_n, float32, of a whole layer of a shard."""
    mean_n, std_n = row_statistics(torch.from_numpy(hidden_nD))
    return mean_n.numpy(), std_n.numpy()


def float_shard(
    token_ids_sT: Array, order: Array, hidden: Sequence[tuple[int, Array]]
) -> Iterator[tuple[str, Array]]:
    """What write_shard takes. hidden: (layer, [n, D])."""
    yield "token_ids", token_ids_sT
    yield "order", order
    yield from ((layer_name(layer), hidden_nD) for layer, hidden_nD in hidden)
    statistics = zip(*(stored_statistics(hidden_nD) for _, hidden_nD in hidden), strict=True)
    for name, each in zip(STATISTICS, statistics, strict=True):
        yield name, np.stack(each, axis=1)
