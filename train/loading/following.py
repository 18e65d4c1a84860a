"""Follow a cache that is still being written: wait for its shards, and tell a ring which of them are used."""

import glob
import logging
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import accumulate, islice
from pathlib import Path

import torch
import xxhash

from routesae.harvest.cache.claims import Claims
from routesae.harvest.cache.manifest import shard_name
from routesae.harvest.cache.reader import Cache
from routesae.harvest.cache.ring import Ring
from routesae.harvest.cache.writer import is_uncommitted
from routesae.machine.files import is_url, read_json
from routesae.machine.lock import hold
from routesae.machine.stop import StopRequest, stop_code
from routesae.reporting import FailedRun, Stopped, WrongInput, human_bytes, shortened
from routesae.train.loading.batches import Batches, Plan, Selection, Window, load

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
ENDED_SECONDS = 120.0  # without a harvester, where the status beside the cache says that the last one ended early
SILENT_SECONDS = 900.0  # without a harvester and without a new shard; a large LM is loaded meanwhile


def begun_cache(path: str) -> Cache:
    """The cache at `path`, once its tokens are there. Raises WrongInput if something else is."""
    wait, folder = _Wait(path, time.time()), Path(path)
    while not is_url(path) and (not folder.exists() or (folder.is_dir() and is_uncommitted(folder))):
        wait.turn(f"the tokens of {path}")
    return Cache(path)


class Following:
    """One trainer on a growing selection, whose windows it takes in order."""

    def __init__(self, selection: Selection, windows: Sequence[Window], total_steps: int):
        self.selection, self.windows, self.cache = selection, windows, selection.cache
        self.ring = Ring(self.cache) if self.cache.ring() else None
        self._ends = [min(end, total_steps) for end in accumulate(len(one.batch_tokens) for one in windows)]
        self._name = self._saes = ""  # under which it is registered
        self._noted, self._since = 0, time.time()
        if total_steps > self._ends[-1]:
            once = f"--follow sees the {len(selection):,} tokens that there are once"
            raise WrongInput(f"{once}; give fewer --tokens")
        most = max(len(one.shards) for one in windows)
        if self.ring and most > self.ring.capacity:
            needed, keep = map(human_bytes, (most * self.cache.manifest.shard_bytes, self.ring.keep))
            raise WrongInput(
                f"--window {most} takes {needed}, and the ring {self.cache.path} holds {keep}; give a smaller "
                "--window, or harvest with more --keep"
            )

    def register(self, folders: Sequence[Path], begun: int, stack: ExitStack) -> None:
        """Take this trainer's place on the ring, if there is one, until the stack ends; its file stays."""
        if self.ring:
            self._saes = f"{folders[0]} and {len(folders) - 1} more" if len(folders) > 1 else str(folders[0])
            of = xxhash.xxh3_64_hexdigest(" ".join(str(folder.resolve()) for folder in folders).encode())
            self._name, self._noted = f"{folders[0].name}-{of[:8]}", self.needs(begun)
            lock = self.ring.folder / f"{self._name}.lock"
            stack.enter_context(hold(lock, f"the place of {self._saes} on the ring {self.cache.path}"))
            self.ring.register(self._name, self._saes, self._noted)
            self.ring.advance()  # a kill may have come between its last checkpoint and this

    def needs(self, step: int) -> int:
        """The first shard that is read after step `step`."""
        at = bisect_right(self._ends, step)
        return self.windows[at].shards.start if at < len(self.windows) else len(self.selection.indices)

    def is_full(self, step: int) -> bool:
        """Whether so much of the ring was used since the last checkpoint that another is due."""
        most = max(len(self.windows[0].shards), self.ring.capacity // 2) if self.ring else len(self.selection.indices)
        return self.needs(step) - self._noted >= most

    def passed(self, step: int) -> None:
        """Tell the ring, after a checkpoint of step `step`, what is still needed."""
        self._noted = self.needs(step)
        if self.ring and self._name:
            self.ring.note(self._name, self._saes, self._noted)
            self.ring.advance()

    def batches(
        self, plans: Iterator[Plan], begun: int, most: int, device: torch.device, stop: StopRequest
    ) -> Batches:
        """The batches of the plans after step `begun`, see `load`. The files of a window are closed with it.

        Raises Stopped while it waits, if `stop` says so or if nobody seems to harvest any more.
        """
        for window, end in zip(self.windows, self._ends, strict=True):
            if begun < end:
                self.open(window, stop)
                with closing(load(self.selection, islice(plans, end - begun), most, device)) as batches:
                    yield from batches
                begun = end

    def open(self, window: Window, stop: StopRequest = lambda: None) -> None:
        """Wait for the shards of a window, and open them."""
        self.wait(window.shards, stop)
        self.selection.open(window.shards)

    def wait(self, indices: range, stop: StopRequest = lambda: None) -> None:
        """Wait until the shards of those indices are there. Raises as `batches`, and FailedRun if one was deleted."""
        wait, last = _Wait(str(self.cache.path), self._since), 0
        while left := [index for index in self.cache.missing() if index in indices]:
            if request := stop():
                raise Stopped("", stop_code(request))
            what = f"{shard_name(left[0])} and {len(left) - 1} more" if len(left) > 1 else shard_name(left[0])
            for_room = self.ring is not None and not self.ring.has_room(left[-1])
            if self.ring and for_room:
                what = f"room on the ring for {what}, after {self.ring.holding()}"
            wait.turn(what, alive=for_room or len(left) != last)
            last = len(left)
        if self.ring and indices and indices[0] < self.ring.used:
            name = shard_name(indices[0])
            raise FailedRun(f"{name} was deleted: this trainer is no longer named in {self.ring.folder}; begin again")


class _Wait:
    """A wait for what a harvester makes in the folder `path`. since: when the trainer began, in time.time()."""

    def __init__(self, path: str, since: float):
        self._folder, self._since = None if is_url(path) else Path(path).absolute(), since
        self._claims = Claims(self._folder or Path())
        self._said, self._alive_at = "", time.monotonic()

    def turn(self, what: str, alive: bool = False) -> None:
        """Sleep for a moment. alive: there is a sign of a harvester. Raises Stopped if there was none for long."""
        if what != self._said:
            log.info("waiting for %s", what)
            self._said = what
        claims, ended = self._folder.glob(".*.claim") if self._folder else (), self._ended()
        if alive or any(self._claims.owner(path.name[1:-6]) for path in claims):
            self._alive_at = time.monotonic()
        elif time.monotonic() - self._alive_at > (ENDED_SECONDS if ended else SILENT_SECONDS):
            why = ended or f"nobody has worked on it for {SILENT_SECONDS:.0f} s"
            again = "run the same routesae harvest again, and this with --resume"
            raise Stopped(f"stopped waiting for {what}: {why}; {again}", 0)
        time.sleep(POLL_SECONDS)

    def _ended(self) -> str | None:
        """What the status file of a harvest says that has ended too early since the trainer began."""
        folder = self._folder or Path()
        for file in folder.parent.glob(f"{glob.escape(folder.name)}.status*.json"):
            with suppress(OSError, ValueError):
                status = read_json(file)
                if status["state"] in ("failed", "stopped") and file.stat().st_mtime >= self._since:
                    return f"the harvest {status['state']} ({shortened(str(status['message']))})"
        return None
