"""What a process may keep on its disk of the caches that it reads from object stores."""

import os
from pathlib import Path

from routesae.machine.settings import RUN, Settings, setting


class BlockOptions(Settings):
    """Where this process keeps what it reads from object stores, and how much of it."""

    cache_dir: str | None = setting(
        None,
        RUN,
        "Where blocks read from an object store, and shards on their way to one, are kept.",
        metavar="PATH",
        env="ROUTESAE_CACHE_DIR",
        unset="routesae in the user's cache folder",
    )
    cache_bytes: int = setting(
        10_000_000_000,
        RUN,
        "Bytes of blocks that a process keeps there, such as 500M or 20B (billion).",
        ge=1,
        env="ROUTESAE_CACHE_BYTES",
    )

    @property
    def folder(self) -> Path:
        if self.cache_dir is not None:
            return Path(self.cache_dir)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "routesae"
