"""The place that a cache lies in: a folder on a disk or below a URL. Their classes have the same methods."""

from pathlib import Path

import numpy as np

from routesae.harvest.cache import arrays
from routesae.harvest.cache.store.bucket import BucketArray, BucketFolder
from routesae.harvest.cache.store.disk import DiskArray, DiskFolder
from routesae.machine.files import is_url

Storage = DiskFolder | BucketFolder
StoredArray = DiskArray | BucketArray


def open_storage(path: Path | str) -> Storage:
    """The folder or URL `path`. Raises WrongInput for a URL that cannot be used."""
    return BucketFolder.at(str(path)) if is_url(path) else DiskFolder(Path(path))


def chunk_hashes(array: StoredArray) -> arrays.ChunkHashes:
    """uint64 [C]: of the array as it is now, read in pieces, and never from a local copy."""
    return np.concatenate([np.empty(0, np.uint64), *map(arrays.chunk_hashes, array.pieces())])
