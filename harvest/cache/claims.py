"""Divide the work on a cache among harvesters that share its folder: a claim is a lock on a shard, or on the tokens.

    .shard-00003.claim   a lock file (routesae.machine.lock)

Claims only save work; they protect nothing. The owner of a claim may wake up beside its successor after its machine
hung. So whatever a claim is for is written under a random name and committed by a rename that only one can win.
"""

from contextlib import suppress
from pathlib import Path
from typing import Self

from routesae.machine.lock import Lock, Owner


class Claims:
    """The claims in `folder`. Its end as a context ends its own, those of the dead and those on what is done."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.has_taken = False  # any claim, ever
        self._locks: dict[str, Lock] = {}

    def take(self, name: str) -> Lock | None:
        """Claim `name`; return None if it is claimed. Raises OSError if the folder takes no file."""
        lock = self._lock(name)
        if lock.held() or not lock.take():
            return None
        self.has_taken = True
        return lock

    def owner(self, name: str) -> Owner | None:
        """Return who is alive, perhaps this process, and has claimed `name`, or None if it is free."""
        return self._lock(name).look()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lock in self._locks.values():
            lock.release()
        is_cache = (self.folder / "zarr.json").exists()
        for path in self.folder.glob(".*.claim*"):
            with suppress(OSError):  # its owner deletes it just now, or the folder is read-only
                if is_cache and (self.folder / path.name[1:].partition(".")[0]).exists():
                    path.unlink()  # what it was for is done
                else:
                    Lock(path).look()

    def _lock(self, name: str) -> Lock:
        # One object a name: it times how long nobody has renewed another machine's claim.
        return self._locks.setdefault(name, Lock(self.folder / f".{name}.claim"))
