"""Follow a cache that is still being written: wait for its shards, and tell a ring which of them are used."""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path

import torch
import xxhash

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.ring import Ring
from routesae.harvest.cache.storage import is_url
from routesae.harvest.cache.writer import is_uncommitted
from routesae.machine.files import read_json
from routesae.machine.lock import hold
from routesae.machine.stop import StopRequest, stop_code
from routesae.reporting import FailedRun, Stopped, WrongInput, human_bytes, shortened
from routesae.train.loading.batches import Batches, Plan, Selection, Window, load

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
ENDED_SECONDS = 30.0  # without a harvester, where the status beside the cache says that the last one ended early
SILENT_SECONDS = 900.0  # without a harvester and without a new shard; a large LM is loaded meanwhile


def begun_cache(path: str) -> Cache:
    """The cache at `path`, once its tokens are there. Raises WrongInput where none is begun for long."""
    wait = _Wait(path, time.time())
    while True:
        try:
            return Cache(path)
        except WrongInput:
            folder = Path(path)
            if is_url(path) or (folder.exists() and not (folder.is_dir() and is_uncommitted(folder))):
                raise
            try:
                wait.turn(f"the tokens of {path}")
            except Stopped:
                raise WrongInput(f"{path} is no cache, and no harvest began one; start routesae harvest") from None


class Following:
    """One trainer on a growing selection, whose windows it takes in order."""

    def __init__(self, selection: Selection, windows: Sequence[Window], total_steps: int):
        self.selection, self.windows, self.total_steps = selection, windows, total_steps
        self.cache = selection.cache
        self.ring = Ring(self.cache) if self.cache.ring() else None
        self._note: Callable[[int], None] | None = None
        self._noted, self._since = 0, time.time()
        if self.ring is not None and (most := max(len(one.shards) for one in windows)) > self.ring.capacity:
            needed, keep = (human_bytes(part) for part in (most * self.ring.shard_bytes, self.ring.state.keep))
            raise WrongInput(
                f"--window {most} takes {needed}, and the ring {self.cache.path} holds {keep}; give a smaller "
                "--window, or harvest with more --keep"
            )

    def register(self, folders: Sequence[Path], begun: int, stack: ExitStack) -> None:
        """Take this trainer's place on the ring, if there is one, until the stack ends; its file stays."""
        if self.ring is None:
            return
        saes = str(folders[0]) if len(folders) == 1 else f"{folders[0]} and {len(folders) - 1} more"
        of = xxhash.xxh3_64_hexdigest(" ".join(str(folder.resolve()) for folder in folders).encode())
        ring, name = self.ring, f"{folders[0].name}-{of[:8]}"
        stack.enter_context(hold(ring.folder / f"{name}.lock", f"the place of {saes} on the ring {self.cache.path}"))
        self._noted = self.needs(begun)
        ring.register(name, saes, self._noted)
        ring.advance()  # a kill may have come between its last checkpoint and this
        self._note = lambda needs: ring.note(name, saes, needs)

    def needs(self, step: int) -> int:
        """The first shard that is read after step `step`."""
        left = step if step < self.total_steps else sum(window.steps for window in self.windows)
        for window in self.windows:
            if left < window.steps:
                return window.shards.start
            left -= window.steps
        return len(self.selection.indices)

    def is_full(self, step: int) -> bool:
        """Whether so much of the ring was used since the last checkpoint that another is due."""
        if self.ring is None:
            return False
        used = self.needs(step) - self._noted
        return used >= max(len(self.windows[0].shards), self.ring.capacity // 2)

    def passed(self, step: int) -> None:
        """Tell the ring, after a checkpoint of step `step`, what is still needed."""
        needs = self.needs(step)
        if self.ring is not None and self._note is not None and needs > self._noted:
            self._note(needs)
            self.ring.advance()
        self._noted = needs

    def batches(
        self, plans: Iterator[Plan], begun: int, most: int, device: torch.device, stop: StopRequest
    ) -> Batches:
        """The batches of the plans after step `begun`, see `load`. The files of a window are closed with it.

        Raises Stopped while it waits, if `stop` says so or if nobody seems to harvest any more.
        """
        after = 0
        for window in self.windows:
            first, after = max(after, begun), after + window.steps
            if begun < after and first < self.total_steps:
                self.open(window, stop)
                with closing(load(self.selection, islice(plans, after - first), most, device)) as batches:
                    yield from batches

    def open(self, window: Window, stop: StopRequest = lambda: None) -> None:
        """Wait for the shards of a window, and open them."""
        self.wait(window.shards, stop)
        self.selection.open(window.shards)

    def wait(self, indices: Sequence[int], stop: StopRequest = lambda: None) -> None:
        """Wait until the shards of those indices are there. Raises as `batches`, and FailedRun if one was deleted."""
        wait, last = _Wait(str(self.cache.path), self._since), -1
        while left := sorted(set(indices) & set(self.cache.missing())):
            if request := stop():
                raise Stopped("", stop_code(request))
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            for_room = self.ring is not None and not self.ring.has_room(left[-1])
            behind = (
                f", for which the ring has no room before {self.ring.holding()}" if self.ring and for_room else ""
            )
            wait.turn(f"{shard_name(left[0])}{more}{behind}", alive=for_room or last != len(left))
            last = len(left)
        if self.ring is not None and indices and min(indices) < self.ring.state.used:
            name = shard_name(min(indices))
            raise FailedRun(f"{name} was deleted: this trainer is no longer named in {self.ring.folder}; begin again")


class _Wait:
    """A wait for what a harvester makes in the folder `path`. since: when the trainer began, in time.time()."""

    def __init__(self, path: str, since: float):
        self._path, self._since = path, since
        self._folder = None if is_url(path) else Path(path)
        self._claims = Claims(self._folder or Path())
        self._said, self._alive_at = "", time.monotonic()

    def turn(self, what: str, alive: bool = False) -> None:
        """Sleep for a moment. alive: there is a sign of a harvester. Raises Stopped if there was none for long."""
        if what != self._said:
            log.info("waiting for %s", what)
            self._said = what
        claims = self._folder.glob(".*.claim") if self._folder else ()
        ended = self._ended()
        if alive or any(self._claims.owner(path.name[1:-6]) for path in claims):
            self._alive_at = time.monotonic()
        elif time.monotonic() - self._alive_at > (ENDED_SECONDS if ended else SILENT_SECONDS):
            why = ended or f"nobody has worked on it for {SILENT_SECONDS:.0f} s"
            raise Stopped(
                f"stopped waiting for {what}: {why}; run the same routesae harvest again, and this with --resume", 0
            )
        time.sleep(POLL_SECONDS)

    def _ended(self) -> str | None:
        """What the status file of a harvest says that has ended too early since the trainer began."""
        folder = (self._folder or Path()).absolute()
        for file in folder.parent.glob(f"{glob.escape(folder.name)}.status*.json"):
            with suppress(OSError, ValueError):
                status = read_json(file)
                if status["state"] in ("failed", "stopped") and file.stat().st_mtime >= self._since:
                    return f"the harvest {status['state']} ({shortened(str(status['message']))})"
        return None
