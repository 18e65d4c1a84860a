"""A cache in; what a person wants to know of it out."""

from __future__ import annotations

from typing import Any, NamedTuple

from routesae.harvest.cache.arrays import BadArray
from routesae.harvest.cache.reader import Cache, damaged, statistics_problem
from routesae.harvest.cache.store.folder import RemoteFolder
from routesae.reporting import human_bytes


class Description(NamedTuple):
    """facts: of the whole cache, named. layers: one row of statistics a layer, over the shards present."""

    facts: dict[str, str]
    layers: list[dict[str, Any]]


def describe(path: str) -> Description:
    """Raises WrongInput where `path` is not a cache."""
    cache = Cache(path)
    manifest, missing = cache.manifest, cache.missing()
    present = f"{manifest.shard_count - len(missing)} of {manifest.shard_count}"
    if missing:
        present += f"; missing {', '.join(map(str, missing[:8]))}{' …' if len(missing) > 8 else ''}"
    size = _bytes_of(cache)
    held_out = manifest.rows - manifest.train_rows
    facts = {
        "model": f"{manifest.model}, {manifest.model_layers} layers, run in {manifest.lm_dtype}",
        "layers": f"{', '.join(map(str, manifest.layers))}; width {manifest.width}, {manifest.dtype}",
        "corpus": f"{manifest.corpus}, fingerprint {manifest.corpus_fingerprint}",
        "documents": f"{manifest.documents:,} used, {manifest.documents_short:,} too short, "
        f"{manifest.documents_malformed:,} malformed",
        "tokens": f"{manifest.rows:,} rows of {manifest.context}; the last {held_out:,} rows held out",
        "kept": f"{manifest.kept_tokens:,} tokens; {manifest.rows * manifest.context - manifest.kept_tokens:,} "
        "special or at the start of a row",
        "shards": present,
        "on disk": f"{human_bytes(size)}, {human_bytes(manifest.token_bytes)} a token",
        "checksums": "of every array and every chunk of rows" if manifest.chunk_hashes else "of every array",
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    return Description(facts, _layer_statistics(cache))


def _bytes_of(cache: Cache) -> int:
    if isinstance(cache.path, RemoteFolder):
        return sum(cache.path.sizes().values())
    return sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())


def _layer_statistics(cache: Cache) -> list[dict[str, Any]]:
    records = []
    for shard in cache.shards():
        if bad := statistics_problem(shard):
            raise damaged(shard.path, BadArray(bad))
        records.append(shard.record)
    tokens = sum(record.kept for record in records)
    rows = []
    for layer in cache.manifest.layers if tokens else ():
        found = [(record.kept, record.statistics[str(layer)]) for record in records]
        rows.append(
            {
                "layer": layer,
                "mean": sum(n * one.mean for n, one in found) / tokens,
                "mean square": sum(n * one.mean_square for n, one in found) / tokens,
                "max abs": max(one.max_abs for _, one in found),
                "clipped": sum(one.clipped for _, one in found),
            }
        )
        if cache.manifest.dtype == "int8":
            rows[-1] |= {
                "int8 FVU": sum(n * (one.int8_fvu or 0) for n, one in found) / tokens,
                "int8 NormMSE": sum(n * (one.int8_norm_mse or 0) for n, one in found) / tokens,
            }
    return rows
