"""The arrays of a float shard, made of its hidden states, for tests and benchmarks that write caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import xxhash

from routesae.harvest.cache.arrays import array_hash, read_group, write_array, write_group
from routesae.harvest.cache.manifest import DOCUMENTS, STATISTICS, LayerStatistics, Manifest, layer_name
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
    root = {"tokens": tokens_ST, "roles": np.zeros(tokens_ST.shape, "|u1"), "document_starts": np.zeros(1, "<i8")}
    pyarrow.parquet.write_table(
        pyarrow.table({"data": ["made"], "place": ["1"]}), sink := pyarrow.BufferOutputStream()
    )
    documents = sink.getvalue().to_pybytes()
    made = {f"{name}_hash": array_hash(array) for name, array in root.items()}
    made |= {"documents_hash": xxhash.xxh3_64_hexdigest(documents), "weights_hash": "x", "exact_weights_hash": "x"}
    made |= {"documents": 1, "held_out": 0.05, "roles": (), "keep_roles": (), "keep_fields": ()}
    manifest = Manifest(**{**made, **fields})
    path.mkdir(parents=True, exist_ok=True)
    with staging(path, "tokens") as prepared:
        for name, array in root.items():
            write_array(prepared / name, array)
        (prepared / DOCUMENTS).write_bytes(documents)
        begin_cache(path, manifest, prepared)
    return manifest


def change_attributes(group: Path, **changes: Any) -> None:
    """Write other attributes into a group's zarr.json, as somebody would who knows the format: checksum and all."""
    write_group(group, {**read_group((group / "zarr.json").read_bytes()), **changes})
