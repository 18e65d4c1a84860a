"""A cache harvested into an object store: its tokens and one shard at a time on this disk in; all of it there, out.

    <--cache-dir>/staged/NAME/      a cache folder as any other, in which harvesters on this machine share the work
        tokens/ document_starts/    kept until the folder is deleted
        shard-00003/                until it is in the store; then it is deleted here

A shard is written and committed on disk as always, its arrays are sent, in parts side by side, and its zarr.json
last: until then it does not exist in the store. All of that is beside the LM, in the thread that writes. What a
killed harvest had committed and not sent is sent by the next one. Claims are of one machine: harvesters on several
may do the same shard, with the same bytes.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import xxhash

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.copying import begin_copy, begin_in_store, require_same_cache, require_unused, send_arrays
from routesae.harvest.cache.manifest import shard_arrays, shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.storage import is_url
from routesae.harvest.cache.store.blocks import chosen
from routesae.harvest.cache.store.bucket import BucketFolder
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import WrongInput

log = logging.getLogger(__name__)

STAGED_SHARDS = 3  # on this disk at most: one being written, one being sent, one more of another harvester's


class StagedCache(Cache):
    """A cache folder whose shards go to the store. What is missing is what the store has not got."""

    def __init__(self, folder: Path, remote: Cache):
        super().__init__(folder)
        self.remote = remote

    def has_shard(self, index: int) -> bool:
        return self.remote.has_shard(index)

    def missing(self) -> list[int]:
        return self.remote.missing()

    def weights_hash(self) -> str | None:
        return self.remote.weights_hash()

    def publish(self, index: int) -> None:
        """Send a shard that is committed here, unless the store has it; then let go of it here."""
        staged = self.folder / shard_name(index)
        if not self.remote.has_shard(index):
            there = BucketFolder(self.remote.address) / staged.name
            send_arrays(staged, there, shard_arrays(self.manifest))
            there.put("zarr.json", (staged / "zarr.json").read_bytes())
            log.info("%s is in %s", staged.name, self.remote.path)
        shutil.rmtree(staged)


class Stage:
    """The place `folder` on this disk for what goes to `remote`."""

    def __init__(self, remote: BucketFolder, folder: Path):
        self.remote = remote
        self.folder = folder

    def fetch_root(self) -> bool:
        """Begin the folder with the tokens that the store has; False where it has none.

        Raises WrongInput where something else is there.
        """
        if self.remote.exists("zarr.json"):
            begin_copy(Cache(self.remote), self.folder)
            return True
        require_unused(self.remote)
        return False

    def opened(self) -> StagedCache:
        """The folder's cache, begun in the store too. Raises WrongInput where the store has another."""
        staged = Cache(self.folder)
        if not self.remote.exists("zarr.json"):
            begin_in_store(staged, self.remote)
        there = Cache(self.remote)
        try:
            require_same_cache(staged, there)
        except WrongInput as differs:
            raise WrongInput(f"{differs}; delete {self.folder}, which nothing needs, or give another --out") from None
        return StagedCache(self.folder, there)


def stage_of(settings: HarvestSettings) -> Stage | None:
    """None where --out is a folder."""
    return Stage(BucketFolder.at(settings.out), staging_folder(settings)) if is_url(settings.out) else None


def staging_folder(settings: HarvestSettings) -> Path:
    """Where shards are written: --out, or the folder they are sent from."""
    if not is_url(settings.out):
        return Path(settings.out)
    url = settings.out.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", url)[-80:]
    return chosen().folder / "staged" / f"{name}-{xxhash.xxh3_64_hexdigest(url.encode())[:8]}"


def published(cache: Cache) -> Cache:
    """What was harvested, where others read it."""
    return cache.remote if isinstance(cache, StagedCache) else cache


def publish_left(cache: Cache, claims: Claims) -> None:
    """Send what earlier harvests committed here and did not get to send; what another is at stays its own."""
    for folder in sorted(cache.folder.glob("shard-*")):
        index = folder.name.removeprefix("shard-")
        if index.isdecimal() and int(index) < cache.manifest.shard_count and not claims.is_live(folder.name):
            cache.publish(int(index))
