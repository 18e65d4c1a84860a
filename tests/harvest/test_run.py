"""The stage harvest, end to end on a tiny model."""

from __future__ import annotations

import numpy as np

from routesae.harvest.cache import Cache


def test_cache_has_all_its_shards(tiny_cache: Cache) -> None:
    assert tiny_cache.missing() == []
    kept = sum(shard.record.kept for shard in tiny_cache.shards())
    assert kept == tiny_cache.manifest.kept_tokens
    assert np.isfinite(next(tiny_cache.shards()).read("layer_02")).all()
