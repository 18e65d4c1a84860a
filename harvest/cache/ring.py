"""A ring: a cache of which only some shards lie on the disk at a time (harvest --keep, train --follow).

    shards/followers/zarr.json      a Zarr group; its attributes are a RingState
    shards/followers/NAME.json      a trainer: a Follower, written anew after each of its checkpoints
    shards/followers/NAME.lock      held while that trainer runs
    shards/followers/.ring.lock     held while a trainer registers, and while shards are deleted

Shards below `used` are gone, and only the next `capacity` are written: what lies there is bounded, however many
harvesters write and whichever of them die. `used` is the least that any trainer says it needs, which is what its last
checkpoint needs, so both sides may be killed at any moment. Shards with held-out rows stay.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field

from routesae.harvest.cache.arrays import fsync, group_metadata
from routesae.harvest.cache.manifest import FOLLOWERS, Manifest, RingState, shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.writer import staging
from routesae.machine.files import problem_of, read_json, write_json
from routesae.machine.lock import Lock
from routesae.reporting import FailedRun, WrongInput, human_bytes

log = logging.getLogger(__name__)


class Follower(BaseModel, frozen=True):
    """What a trainer says of itself. needs: the first shard it may still read. updated: when it last said so."""

    saes: str
    needs: int = Field(ge=0)
    updated: datetime


def require_room(keep: int, shard_bytes: int, held_out: int) -> None:
    """Raises WrongInput if a ring would be too small. held_out: how many shards have held-out rows."""
    if max(2, held_out) > keep // max(1, shard_bytes):
        raise WrongInput(
            f"--keep {keep} is {human_bytes(keep)}, and two shards, or those with held-out rows, which stay, take "
            f"{human_bytes(max(2, held_out) * shard_bytes)}; give more, a smaller --held-out, or fewer --shard-tokens"
        )


def write_state(folder: Path, manifest: Manifest, state: RingState) -> None:
    """Make the cache in `folder` a ring, or note how it stands. Raises as `require_room`."""
    require_room(state.keep, manifest.shard_bytes, manifest.shard_count - manifest.first_held_out_shard)
    (folder / FOLLOWERS).mkdir(exist_ok=True)
    write_json(folder / FOLLOWERS / "zarr.json", group_metadata(state.model_dump()))


class Ring:
    """The ring that `cache`, a folder, is. capacity: how many shards may lie there."""

    def __init__(self, cache: Cache):
        state = cache.ring()
        assert state is not None
        self.cache, self.folder, self.keep = cache, cache.folder / FOLLOWERS, state.keep
        self.capacity = state.keep // max(1, cache.manifest.shard_bytes)
        self._locks: dict[Path, Lock] = {}  # one object a trainer: it times how long nobody has renewed the lock
        self._warned = set[tuple[Path, int]]()

    @property
    def used(self) -> int:
        """How many shards are deleted. Raises FailedRun if the ring is gone."""
        if (state := self.cache.ring()) is None:
            raise FailedRun(f"{self.folder} was deleted or unmounted; bring it back and run the same command again")
        return state.used

    def has_room(self, index: int) -> bool:
        """Whether the shard of that index may be written."""
        return index < self.used + self.capacity

    # ---------------------------------------------------------------------------------------------------- trainers

    def register(self, name: str, saes: str, needs: int) -> None:
        """Note a new trainer, or one that is back. Raises WrongInput if what it needs has been deleted."""
        with self._locked():
            if needs < (used := self.used):
                raise WrongInput(
                    f"{self.cache.path} is a ring that has been used up to {shard_name(used - 1)}, and {saes} would "
                    f"need {shard_name(needs)}; train on it from its beginning, or harvest again into a new folder"
                )
            self.note(name, saes, needs)

    def note(self, name: str, saes: str, needs: int) -> None:
        """Write what a trainer needs from now on."""
        follower = Follower(saes=saes, needs=needs, updated=datetime.now(UTC))
        write_json(self.folder / f"{name}.json", follower.model_dump(mode="json"))

    def followers(self) -> dict[Path, Follower]:
        """Every trainer by its file. Raises FailedRun where one cannot be read."""
        found = {}
        for path in sorted(self.folder.glob("[!.]*.json")):
            try:
                if path.name != "zarr.json":
                    found[path] = Follower.model_validate(read_json(path))
            except FileNotFoundError:  # deregistered just now
                continue
            except (OSError, ValueError) as bad:
                raise FailedRun(
                    f"{path} cannot be read ({problem_of(bad)}); delete it if its trainer needs no shard"
                ) from bad
        return found

    def advance(self) -> None:
        """Delete the shards that every trainer has used."""
        manifest = self.cache.manifest
        with self._locked():
            needs = [follower.needs for follower in self.followers().values()]
            used = min([*needs, manifest.first_held_out_shard]) if needs else 0
            if used > self.used:
                write_state(self.cache.folder, manifest, RingState(keep=self.keep, used=used))
            gone = {*map(shard_name, range(self.used))} & self.cache.shards_at.shard_names()
            for name in gone:  # also those that a process did not come to that was killed
                with staging(self.cache.folder, name) as aside:  # out of the cache at once, then deleted
                    (self.cache.folder / name).rename(aside / name)
            fsync(self.cache.folder)

    def holding(self) -> str:
        """The trainers that the ring waits for, in words. Of one that does not run there is a warning, once."""
        followers = self.followers()
        if not followers:
            return f"routesae train --follow --cache {self.cache.path}"
        needs = min(follower.needs for follower in followers.values())
        slowest = {path: follower for path, follower in followers.items() if follower.needs == needs}
        for path, follower in slowest.items():
            lock = self._locks.setdefault(path, Lock(path.with_suffix(".lock")))
            if lock.look() is None and (path, needs) not in self._warned:
                self._warned.add((path, needs))
                log.warning(
                    "%s holds the ring up and does not run: it needs %s since %s; train it with --resume, or delete "
                    "%s and the ring goes on without it",
                    *(follower.saes, shard_name(needs), f"{follower.updated:%Y-%m-%d %H:%M:%S} UTC", path),
                )
        return " and ".join(follower.saes for follower in slowest.values())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = Lock(self.folder / ".ring.lock")
        while not lock.take():
            time.sleep(0.05)
        try:
            yield
        finally:
            lock.release()
