"""Which shards an object store holds: a cache's folder there in; those that are committed, and their records, out.

A shard is committed once its zarr.json is there, which is put last. Names are listed; whether each is committed is
asked of many at a time, and of each only until it is.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from routesae.harvest.cache.arrays import BadArray
from routesae.harvest.cache.store.folder import IN_FLIGHT, RemoteFolder
from routesae.machine.files import LARGEST_BYTES


class RemoteShards:
    """Those of the cache at `folder`. A committed shard is looked at once: it stays as it is."""

    def __init__(self, folder: RemoteFolder):
        self.folder = folder
        self._records: dict[str, bytes] = {}

    def names(self) -> set[str]:
        """Of all that are committed now."""
        listed = {name for name in self.folder.folders() if name.startswith("shard-")}
        unknown = sorted(listed - self._records.keys())
        if unknown:
            with ThreadPoolExecutor(min(IN_FLIGHT, len(unknown)), thread_name_prefix="shard-records") as pool:
                list(pool.map(self.record, unknown))
        return listed & self._records.keys()

    def record(self, name: str) -> bytes | None:
        """The shard's zarr.json; None where it is not committed. Raises BadArray where that is none, and as every
        request."""
        if name not in self._records:
            try:
                self._records[name] = (self.folder / name).read("zarr.json", LARGEST_BYTES)
            except FileNotFoundError:
                return None
            except BadArray as bad:
                self._records[name] = str(bad).encode()  # no JSON, so it is named where it is read
        return self._records[name]
