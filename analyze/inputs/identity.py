"""Record what results were made from, so that they can be made again: hashes of SAEs, caches and files."""

from __future__ import annotations

import json
from importlib.metadata import version
from platform import python_version
from typing import Any

import xxhash

from routesae import __version__
from routesae.harvest.cache.reader import Cache
from routesae.train.saes import SAE


def sae_identity(sae: SAE) -> dict[str, Any]:
    """The recipe of a loaded SAE, and an xxh3-128 of each file of weights as it was read."""
    return {"recipe": sae.recipe.to_dict(), "weights": dict(sorted(sae.hashes.items()))}


def cache_identity(cache: Cache) -> dict[str, Any]:
    """Where it is, its manifest, the LM's weights, and an xxh3-128 of what the records of its shards say.

    They hold hashes of all that was written; the hidden states themselves are not read.
    """
    manifest = cache.manifest.to_dict()
    records = [(of.index, of.weights_hash, dict(of.hashes)) for of in (shard.record for shard in cache.shards())]
    written = json.dumps([manifest, records], sort_keys=True)
    return {
        "path": cache.address,
        **manifest,
        "lm_weights": cache.weights_hash(),
        "fingerprint": xxhash.xxh3_128(written.encode()).hexdigest(),
    }


def versions() -> dict[str, str]:
    """Of all that decides a number."""
    others = {package: version(package) for package in ("torch", "transformers", "numpy")}
    return {"python": python_version(), "routesae": __version__, **others}
