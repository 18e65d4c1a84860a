"""A long run watched: what the rooms report in; out, on standard error, a bar, log lines or lines of JSON, and for
dashboards a status file.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from routesae import __version__
from routesae.reporting import FailedRun, Progress, Report, Stopped, WrongInput

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("routesae")
LOG_LINE_SECONDS = 10.0  # between progress lines where there is no terminal
STATUS_SECONDS = 2.0  # between two writings of the status file
STATUS = "status.json"


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How a run wants to be seen.

    quiet: only warnings, errors and results. as_json: log and progress as a JSON object a line. status: the file to
    keep instead of the command's own.
    """

    quiet: bool = False
    as_json: bool = False
    status: Path | None = None


class Terminated(KeyboardInterrupt):
    """SIGTERM, where no stage has work to bring home first. Not an Exception, so that no library swallows it."""


# --------------------------------------------------------------------------------------------------- log lines


class ToStderr(logging.StreamHandler[Any]):
    """The one handler that the command line adds, to be found again when its format changes."""


class JsonLines(logging.Formatter):
    """A record as one JSON object; of a progress line with its numbers."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        return json_line(record.levelname.lower(), message, **getattr(record, "progress", {}))


def json_line(level: str, message: str, **more: Any) -> str:
    """What a program reads of one event; pid tells the processes of one log apart."""
    head = {"time": _now(), "level": level, "pid": os.getpid(), "message": message}
    return json.dumps({**head, **more}, allow_nan=False)


def configure_logging(watch: Watch) -> None:
    """Log to standard error as `watch` says; may be called again with another. Handlers of a host are left alone."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, handlers=[ToStderr(sys.stderr)])
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ToStderr):
            handler.setFormatter(JsonLines() if watch.as_json else logging.Formatter("%(message)s"))
    logging.captureWarnings(watch.as_json)  # Python's own warnings would be lines that are no JSON
    logging.getLogger("routesae").setLevel(logging.WARNING if watch.quiet else logging.INFO)
    if watch.quiet or watch.as_json:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    for retrying in ("huggingface_hub", "httpx", "httpcore"):  # the last failure is reported, once, as an error
        logging.getLogger(retrying).setLevel(logging.ERROR)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# ---------------------------------------------------------------------------------------------------- progress


class Pace(NamedTuple):
    """rate: units a second since the stage began; None before there is one. seconds_left: at that rate."""

    rate: float | None
    seconds_left: float | None


class Pacer:
    """The pace of the stage that reports; anew where the same work begins on the next SAE."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._began = 0.0
        self._first = self._last = 0

    def __call__(self, now: Progress) -> Pace:
        seconds = time.monotonic()
        if now.stage != self._stage or now.done < self._last:
            self._stage, self._began, self._first = now.stage, seconds, now.done
        self._last = now.done
        done, took = now.done - self._first, seconds - self._began
        if not done or took <= 0:
            return Pace(None, 0.0 if now.done >= now.total else None)
        return Pace(done / took, max(0, now.total - now.done) * took / done)


class Shown(Protocol):
    """A way to show progress to whoever sits at standard error."""

    def show(self, now: Progress, pace: Pace) -> None: ...
    def close(self) -> None: ...


class Lines:
    """A log line every ten seconds, and one at the end of each stage."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    def show(self, now: Progress, pace: Pace) -> None:
        seconds = time.monotonic()
        if seconds - self._last_line < LOG_LINE_SECONDS and now.done != now.total:
            return
        self._last_line = seconds
        facts = dict(now.facts)
        if pace.rate is not None and pace.seconds_left is not None:
            facts |= {f"{now.unit}/s": f"{pace.rate:,.0f}" if pace.rate > 10 else f"{pace.rate:.2f}"}
            facts |= {"left": f"{pace.seconds_left:,.0f} s"}
        shown = "".join(f", {name} {value}" for name, value in facts.items())
        progress = {"progress": described(now, pace)}
        log.info("%s: %s of %s %s%s", now.stage, f"{now.done:,}", f"{now.total:,}", now.unit, shown, extra=progress)

    def close(self) -> None:
        """Nothing is open."""


class Bars:
    """A bar with rate and time left; for a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage: str | None = None

    def show(self, now: Progress, pace: Pace) -> None:
        from tqdm import tqdm

        if self._bar is None or now.stage != self._stage or now.done < self._bar.n:
            self.close()
            scale = now.unit == "tokens"
            self._bar = tqdm(total=now.total, unit=f" {now.unit}", unit_scale=scale, desc=now.stage)
            self._stage = now.stage
        self._bar.set_postfix(now.facts, refresh=False)
        self._bar.update(now.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def described(now: Progress, pace: Pace) -> dict[str, Any]:
    """Progress and pace, as JSON takes them."""
    rate, left = pace
    return {
        "stage": now.stage,
        "done": now.done,
        "total": now.total,
        "unit": now.unit,
        "rate": None if rate is None else float(f"{rate:.4g}"),
        "seconds_left": None if left is None else round(left, 1),
        "facts": dict(now.facts),
    }


# --------------------------------------------------------------------------------------------------- status file


class Status:
    """The status file of one run: written whole, at most every STATUS_SECONDS, and at the end.

    It exists from the first progress on, where its folder does; a run refused for wrong input leaves none. Nothing is
    lost with it, so a disk that does not take it is a warning.
    """

    def __init__(self, path: Path, command: str):
        self.path = path
        self._head = {"routesae": __version__, "command": command, "pid": os.getpid(), "host": socket.gethostname()}
        self._head |= {"started": _now()}
        self._progress: dict[str, Any] = dict.fromkeys(Progress._fields) | {"rate": None, "seconds_left": None}
        self._wrote_at: float | None = None
        self._broken = False

    def update(self, now: Progress, pace: Pace) -> None:
        self._progress = described(now, pace)
        if self._wrote_at is None or time.monotonic() - self._wrote_at >= STATUS_SECONDS:
            self._write("running", None)

    def end(self, error: BaseException | None) -> None:
        """The last word: finished, stopped or failed, and why."""
        if isinstance(error, WrongInput):
            if self._wrote_at is not None:
                self.path.unlink(missing_ok=True)
        elif error is None:  # with nothing to do there is nothing to say, but an older run's last word is out of date
            if self._wrote_at is not None or self._is_outdated():
                self._write("finished", None)
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self._write("stopped", str(error) or None)
        else:
            told = isinstance(error, FailedRun | OSError)
            self._write("failed", str(error) if told else f"{type(error).__name__}: {error}")

    def _is_outdated(self) -> bool:
        try:
            return bool(json.loads(self.path.read_bytes())["state"] != "finished")
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def _write(self, state: str, message: str | None) -> None:
        if self._broken or not self.path.parent.is_dir():
            return
        found = {**self._head, "updated": _now(), "state": state, "message": message, **self._progress}
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(found, indent=2) + "\n")
            partial.replace(self.path)
        except OSError as error:
            self._broken = True
            log.warning("%s is not written any more: %s", self.path, error)
        self._wrote_at = time.monotonic()


def status_in(folder: str | Path, worker: int | None = None) -> Path | None:
    """Where a run that writes into `folder` keeps its status; None where that is no folder of this machine.

    worker: of several that write into the same one, its number; torchrun's are known by their environment.
    """
    return None if "://" in str(folder) else Path(folder) / _status_name(worker)


def status_beside(folder: str | Path, worker: int | None = None) -> Path | None:
    """The same for a cache, which is a Zarr group, and zarr warns of files in groups: shards.status.json."""
    if "://" in str(folder):
        return None
    path = Path(folder).absolute()
    return path.with_name(f"{path.name}.{_status_name(worker)}")


def _status_name(worker: int | None) -> str:
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    number = rank if worker is None else str(worker)
    return STATUS if number is None else f"status-{number}.json"


# ----------------------------------------------------------------------------------------------------- all of it


class Watched:
    """What a run reports to: `report` is the rooms' Report."""

    def __init__(self, shown: Shown | None, status: Status | None):
        self.shown, self.status = shown, status
        self._pacer = Pacer()

    def __enter__(self) -> Report:
        return self.report

    def report(self, now: Progress) -> None:
        pace = self._pacer(now)
        if self.shown is not None:
            self.shown.show(now, pace)
        if self.status is not None:
            self.status.update(now, pace)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown is not None:
            self.shown.close()
        if self.status is not None:
            self.status.end(error)


@contextmanager
def watched(watch: Watch, command: str, status: Path | None = None) -> Iterator[Report]:
    """A Report that shows progress as `watch` says, and keeps the status file of the command.

    While open, SIGTERM raises Terminated, unless a stage that has work to bring home catches it first.
    """
    path = watch.status or status
    bars = sys.stderr.isatty() and not watch.as_json
    shown: Shown | None = None if watch.quiet else Bars() if bars else Lines()
    with _terminated(), Watched(shown, None if path is None else Status(path, command)) as report:
        if not bars:
            yield report
            return
        from tqdm.contrib.logging import logging_redirect_tqdm

        with logging_redirect_tqdm():
            yield report


@contextmanager
def _terminated() -> Iterator[None]:
    def raise_it(number: int, frame: FrameType | None) -> None:
        raise Terminated("stopped by SIGTERM")

    try:
        before = signal.signal(signal.SIGTERM, raise_it)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def message_of(watch: Watch, message: object, code: int) -> str:
    """The last line of a run that ends with `code`."""
    if not watch.as_json:
        return f"routesae: {message}"
    return json_line("warning" if code in (0, 130, 143) else "error", str(message), exit_code=code)
