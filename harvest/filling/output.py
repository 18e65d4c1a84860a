"""Decide where a harvest writes: into --out or, for an object store, into a folder from which shards are sent.

    <--cache-dir>/staged/NAME/      a cache folder like any other, in which harvesters on this machine share the work
        tokens/ document_starts/    kept until the folder is deleted
        shard-00003/                deleted here once it is in the store

A shard is written and committed on disk as always. Then its arrays are sent, in parts side by side, and its zarr.json
last: until then it does not exist in the store. All of that happens beside the LM, in the thread that writes. What a
killed harvest had committed and not sent is sent by the next one. Claims hold for one machine: harvesters on several
may do the same shard, with the same bytes.
"""

import logging
import re
import shutil
from pathlib import Path

import xxhash

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.copying import begin_copy, begin_in_store, require_same_cache, require_unused, send
from routesae.harvest.cache.manifest import shard_arrays, shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.store import blocks
from routesae.harvest.cache.store.bucket import BucketFolder
from routesae.machine.files import is_url
from routesae.reporting import WrongInput

log = logging.getLogger(__name__)

STAGED_SHARDS = 3  # on this disk at most: one being written, one being sent, one more of another harvester's


class Output:
    """Where one harvest writes.

    folder: on this disk, where shards are written. store: where they are sent from there; None if --out is a folder.
    """

    def __init__(self, out: str):
        self.out = out
        self.store = BucketFolder.at(out) if is_url(out) else None
        self.folder = Path(out)
        if self.store is not None:
            url = out.rstrip("/")
            name = re.sub(r"[^A-Za-z0-9.]+", "-", url)[-80:]
            self.folder = blocks.options.folder / "staged" / f"{name}-{xxhash.xxh3_64_hexdigest(url.encode())[:8]}"

    def is_begun(self) -> bool:
        """Whether the folder is a cache: its tokens are whole and its manifest is there."""
        return (self.folder / "zarr.json").exists()

    def fetch_tokens(self) -> bool:
        """Begin the folder with the tokens that the store has; return False if it has none.

        Raises WrongInput if something else is there.
        """
        if self.store is None:
            return False
        if self.store.exists("zarr.json"):
            begin_copy(Cache(self.store), self.folder)
            return True
        require_unused(self.store)
        return False

    def opened(self, cache: Cache) -> Cache:
        """The cache of `folder`, begun in the store too. Raises WrongInput if the store has another cache."""
        if self.store is not None:
            if not self.store.exists("zarr.json"):
                begin_in_store(cache, self.store)
            try:
                require_same_cache(cache, Cache(self.store))
            except WrongInput as differs:
                raise WrongInput(f"{differs}; delete {self.folder}, or give another --out") from None
            cache.shards_at = self.store
        return cache

    def publish(self, cache: Cache, index: int) -> None:
        """Send a shard that is committed here to the store, unless that has it, and delete it here."""
        if self.store is None:
            return
        staged = self.folder / shard_name(index)
        if not cache.has_shard(index):
            send(staged, self.store / staged.name, shard_arrays(cache.manifest))
            log.info("%s is in %s", staged.name, self.store)
        shutil.rmtree(staged)

    def publish_left(self, cache: Cache, claims: Claims) -> None:
        """Send what earlier harvests committed here and did not send, but not what another is working on."""
        for index in range(cache.manifest.shard_count if self.store is not None else 0):
            name = shard_name(index)
            if (self.folder / name).exists() and claims.owner(name) is None:
                self.publish(cache, index)
