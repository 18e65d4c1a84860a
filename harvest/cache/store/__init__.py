"""The two kinds of place a cache can lie in, and the choice between them."""

from __future__ import annotations

from pathlib import Path

from routesae.harvest.cache.storage import Storage, is_url


def open_storage(path: Path | str) -> Storage:
    """The folder or URL `path`. Raises WrongInput for a URL that cannot be used."""
    if is_url(path):
        from routesae.harvest.cache.store.bucket import BucketFolder

        return BucketFolder.at(str(path))
    from routesae.harvest.cache.store.disk import DiskFolder

    return DiskFolder(Path(path))
