"""A cache in; what a person wants to know of it, or every problem it has, out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from routesae.harvest.arrays import BadArray
from routesae.harvest.cache import Cache, array_hash, kept_flat, shard_arrays, shard_name
from routesae.reporting import Progress, Report, WrongInput, human_bytes, silent


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
    size = sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())
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
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    return Description(facts, _layer_statistics(cache))


def _layer_statistics(cache: Cache) -> list[dict[str, Any]]:
    records = [shard.record for shard in cache.shards()]
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
    return rows


def verify(path: str, report: Report = silent) -> list[str]:
    """Every problem of the cache, a line each; none where it is whole. Reads all of it."""
    cache = Cache(path)
    problems = verify_tokens(cache)
    for index in range(cache.manifest.shard_count):
        if cache.has_shard(index):
            problems += verify_shard(cache, index)
        else:
            problems.append(f"{shard_name(index)}: missing")
        report(Progress("verify", index + 1, cache.manifest.shard_count, "shards", {}))
    return problems


def verify_tokens(cache: Cache) -> list[str]:
    """What is wrong with tokens and document_starts, a line each."""
    problems = []
    try:
        if array_hash(cache.tokens()) != cache.manifest.tokens_hash:
            problems.append("tokens: checksum differs from the one recorded")
    except WrongInput as bad:
        problems.append(f"tokens: {bad}")
    try:
        starts = cache.document_starts()
        if not (np.diff(starts) > 0).all():
            problems.append("document_starts: not ascending")
    except WrongInput as bad:
        problems.append(f"document_starts: {bad}")
    return problems


def verify_shard(cache: Cache, index: int) -> list[str]:
    """Everything wrong with one shard, a line each: sizes, indexes, checksums, order, tokens."""
    name = shard_name(index)
    try:
        shard = cache.shard(index)
    except BadArray as bad:
        return [f"{name}: {bad}"]
    problems = []
    for array in shard_arrays(cache.manifest):
        try:
            values = shard.read(array)
            if array_hash(values) != shard.record.hashes.get(array):
                problems.append(f"{name}/{array}: checksum differs from the one recorded")
        except (BadArray, OSError, ValueError, RuntimeError) as bad:
            problems.append(f"{name}/{array}: {bad}")
    if problems:
        return problems
    token_ids_sT = shard.read("token_ids")
    first, after = shard.record.rows
    try:
        if not np.array_equal(token_ids_sT, cache.tokens()[first:after]):
            problems.append(f"{name}/token_ids: not rows {first} to {after - 1} of tokens")
    except WrongInput:
        pass  # tokens itself cannot be read, which verify_tokens says
    if not np.array_equal(np.sort(shard.read("order")), kept_flat(token_ids_sT, cache.manifest)):
        problems.append(f"{name}/order: not a permutation of the kept positions")
    return problems
