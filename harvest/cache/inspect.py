"""What `routesae cache info` says about a cache."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from routesae.harvest.cache.reader import Cache
from routesae.reporting import human_bytes


class Description(NamedTuple):
    """facts: of the whole cache, by name. layers: one row of statistics a layer, over the shards present."""

    facts: dict[str, str]
    layers: list[dict[str, Any]]


def describe(path: str) -> Description:
    """Raises WrongInput where `path` is not a cache."""
    cache = Cache(path)
    manifest, missing = cache.manifest, cache.missing()
    ring = cache.ring()
    used = ring.used if ring else 0
    present = f"{manifest.shard_count - used - len(missing)} of {manifest.shard_count}"
    if ring:
        present += f", and {used} used by every trainer and deleted: a ring of {human_bytes(ring.keep)}"
    if missing:
        present += f"; missing {', '.join(map(str, missing[:8]))}{' …' if len(missing) > 8 else ''}"
    held_out = manifest.rows - manifest.train_rows
    offset = manifest.hidden_states_offset
    place = "none of the hidden_states" if offset is None else f"hidden_states[ℓ{f'{offset:+d}' if offset else ''}]"
    kept, others = "", "special or at the start of a row"
    if manifest.keep_roles:
        kept = f" of {', '.join(manifest.keep_roles)} messages"
        others = "special, at the start of a row or not theirs"
    facts = {
        "model": f"{manifest.model}, {manifest.model_layers} layers, run in {manifest.lm_dtype}",
        "layer ℓ": f"the output of decoder block ℓ; {place} of transformers",
        "layers": f"{', '.join(map(str, manifest.layers))}; width {manifest.width}, {manifest.dtype}",
        "corpus": f"{manifest.corpus}, fingerprint {manifest.corpus_fingerprint}",
        **_provenance(cache),
        "documents": f"{manifest.documents:,} used, {manifest.documents_short:,} empty or too short, "
        f"{manifest.documents_malformed:,} malformed",
        "tokens": f"{manifest.rows:,} rows of {manifest.context}; the last {held_out:,} rows held out",
        "kept": f"{manifest.kept_tokens:,} tokens{kept}; {manifest.rows * manifest.context - manifest.kept_tokens:,} "
        f"{others}",
        "shards": present,
        "on disk": f"{human_bytes(cache.storage.size())}, {human_bytes(manifest.token_bytes)} a token",
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    return Description(facts, _layer_statistics(cache))


def _provenance(cache: Cache) -> dict[str, str]:
    """What is known of the documents: how many tokens each source gave, fields and roles."""
    manifest, given, size = cache.manifest, Counter[str](), cache.manifest.rows * cache.manifest.context
    sizes = np.diff(cache.document_starts(), append=size).tolist()
    for data, tokens in zip(cache.documents()["data"].to_pylist(), sizes, strict=True):
        given[data] += tokens
    counts = np.bincount(cache.roles().reshape(-1), minlength=256) if manifest.roles else ()
    facts = {
        "sources": ", ".join(f"{data} {tokens / size:.1%} of the tokens" for data, tokens in given.items()),
        "token ids": f"as they are in the field {manifest.token_field}" if manifest.token_field else "",
        "fields kept": ", ".join(manifest.keep_fields),
        "roles": ", ".join(f"{role} {n:,} tokens" for role, n in zip(manifest.roles, counts[1:], strict=False)),
    }
    return {name: of for name, of in facts.items() if of}


def _layer_statistics(cache: Cache) -> list[dict[str, Any]]:
    records = [shard.record for shard in cache.shards()]
    tokens = sum(record.kept for record in records)
    rows = []
    for layer in cache.manifest.layers if tokens else ():
        weighted = [(record.kept, record.statistics[str(layer)]) for record in records]
        rows.append(
            {
                "layer": layer,
                "mean": sum(n * one.mean for n, one in weighted) / tokens,
                "mean square": sum(n * one.mean_square for n, one in weighted) / tokens,
                "max abs": max(one.max_abs for _, one in weighted),
                "clipped": sum(one.clipped for _, one in weighted),
            }
        )
        if cache.manifest.dtype == "int8":
            rows[-1] |= {
                "int8 FVU": sum(n * (one.int8_fvu or 0) for n, one in weighted) / tokens,
                "int8 NormMSE": sum(n * (one.int8_norm_mse or 0) for n, one in weighted) / tokens,
            }
    return rows
