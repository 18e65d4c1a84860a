"""The arrays of a float shard, made of its hidden states, for tests and benchmarks that write caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from routesae.harvest.cache.arrays import array_hash, read_group, write_array, write_group
from routesae.harvest.cache.manifest import STATISTICS, LayerStatistics, Manifest, layer_name
from routesae.harvest.cache.quantise import row_statistics
from routesae.harvest.cache.writer import begin_cache, staging

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


def begin(path: Path, tokens_ST: Array, **fields: Any) -> Manifest:
    """A cache of one document and no shards yet. fields: those of the manifest that are not about its arrays."""
    document_starts = np.zeros(1, "<i8")
    names = ("tokens_hash", "document_starts_hash")
    hashes = dict(zip(names, map(array_hash, (tokens_ST, document_starts)), strict=True))
    manifest = Manifest(**hashes, **fields, weights_hash="x", exact_weights_hash="x", documents=1)
    path.mkdir(parents=True, exist_ok=True)
    with staging(path, "tokens") as prepared:
        write_array(prepared / "tokens", tokens_ST)
        write_array(prepared / "document_starts", document_starts)
        begin_cache(path, manifest, prepared)
    return manifest


def change_attributes(group: Path, **changes: Any) -> None:
    """Write other attributes into a group's zarr.json, as somebody would who knows the format: checksum and all."""
    write_group(group, {**read_group((group / "zarr.json").read_bytes()), **changes})
