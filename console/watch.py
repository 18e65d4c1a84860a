"""Shows how far a long run has come: a bar, log lines or lines of JSON on standard error, and a status file."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from routesae import __version__
from routesae.machine.files import write_json
from routesae.machine.settings import RUN, Settings, setting
from routesae.reporting import FailedRun, Progress, Report, Stopped, WrongInput

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("routesae")
LOG_LINE_SECONDS = 10.0  # between progress lines where there is no terminal
STATUS_SECONDS = 2.0  # between two writings of the status file
STATUS = "status.json"


class Watch(Settings):
    """How a run is watched."""

    quiet: bool = setting(False, RUN, "Only warnings, errors and results.")
    log_json: bool = setting(False, RUN, "Log and progress on standard error as a JSON object a line.")
    status: str | None = setting(
        None,
        RUN,
        "File that says in JSON how far the run is.",
        metavar="PATH",
        unset="status.json in the folder that is filled",
    )

    def check(self) -> None:
        if self.status is not None and not Path(self.status).absolute().parent.is_dir():
            raise WrongInput(f"--status {self.status}: there is no folder {Path(self.status).parent} to write it to")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where no stage has work to bring home first. Not an Exception, so that no library swallows it."""


class ToStderr(logging.StreamHandler[Any]):
    """The handler that the command line adds: a class of its own, so that it is recognised later."""


class JsonLines(logging.Formatter):
    """Formats a log record as one JSON object, with the numbers of a progress line."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        return json_line(record.levelname.lower(), message, **getattr(record, "progress", {}))


def json_line(level: str, message: str, **more: Any) -> str:
    """One event as a line of JSON. pid tells apart processes that share a log."""
    head = {"time": _now(), "level": level, "pid": os.getpid(), "message": message}
    return json.dumps({**head, **more}, allow_nan=False)


def configure_logging(watch: Watch) -> None:
    """Log to standard error as `watch` says. May be called again; handlers of a host program are left alone."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, handlers=[ToStderr(sys.stderr)])
    for handler in logging.getLogger().handlers:
        if isinstance(handler, ToStderr):
            handler.setFormatter(JsonLines() if watch.log_json else logging.Formatter("%(message)s"))
    logging.captureWarnings(watch.log_json)  # Python's own warnings would not be JSON
    logging.getLogger("routesae").setLevel(logging.WARNING if watch.quiet else logging.INFO)
    if watch.quiet or watch.log_json:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
    for retrying in ("huggingface_hub", "httpx", "httpcore"):  # the last failure is reported, once, as an error
        logging.getLogger(retrying).setLevel(logging.ERROR)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Pacer:
    """Adds the pace to what a stage reports. It starts anew when the same stage begins on the next SAE."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._began = 0.0
        self._first = self._last = 0

    def __call__(self, now: Progress) -> dict[str, Any]:
        """The progress for JSON: rate in units a second since the stage began, seconds_left at that rate, or None."""
        seconds = time.monotonic()
        if now.stage != self._stage or now.done < self._last:
            self._stage, self._began, self._first = now.stage, seconds, now.done
        self._last = now.done
        done, took = now.done - self._first, seconds - self._began
        pace: dict[str, Any] = {"rate": None, "seconds_left": 0.0 if now.done >= now.total else None}
        if done and took > 0:
            left = max(0, now.total - now.done) * took / done
            pace = {"rate": float(f"{done / took:.4g}"), "seconds_left": round(left, 1)}
        return {**now._asdict(), "facts": dict(now.facts), **pace}


class Lines:
    """Shows progress as a log line every ten seconds, and one at the end of each stage."""

    def __init__(self) -> None:
        self._last_line = time.monotonic()

    def show(self, now: Progress, paced: dict[str, Any]) -> None:
        seconds = time.monotonic()
        if seconds - self._last_line < LOG_LINE_SECONDS and now.done != now.total:
            return
        self._last_line = seconds
        facts, rate = dict(now.facts), paced["rate"]
        if rate is not None:
            facts |= {f"{now.unit}/s": f"{rate:,.0f}" if rate > 10 else f"{rate:.2f}"}
            facts |= {"left": f"{paced['seconds_left']:,.0f} s"}
        shown = "".join(f", {name} {value}" for name, value in facts.items())
        done = f"{now.done:,} of {now.total:,} {now.unit}"
        log.info("%s: %s%s", now.stage, done, shown, extra={"progress": paced})

    def close(self) -> None:
        """Nothing to close."""


class Bars:
    """Shows progress as a bar with rate and time left, for a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage: str | None = None

    def show(self, now: Progress, paced: dict[str, Any]) -> None:
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


class Status:
    """The status file of one run, written whole at most every STATUS_SECONDS and at the end.

    It appears with the first progress, if its folder exists; a run refused for wrong input leaves none. A disk that
    does not take it causes a warning only.
    """

    def __init__(self, path: Path, command: str):
        self.path = path
        self._head = {"routesae": __version__, "command": command, "pid": os.getpid(), "host": socket.gethostname()}
        self._head |= {"started": _now()}
        self._progress: dict[str, Any] = dict.fromkeys((*Progress._fields, "rate", "seconds_left"))
        self._wrote_at: float | None = None
        self._broken = False

    def update(self, paced: dict[str, Any]) -> None:
        self._progress = paced
        if self._wrote_at is None or time.monotonic() - self._wrote_at >= STATUS_SECONDS:
            self._write("running", None)

    def end(self, error: BaseException | None) -> None:
        """Write how the run ended: finished, stopped or failed, and why."""
        if isinstance(error, WrongInput):
            if self._wrote_at is not None:
                self.path.unlink(missing_ok=True)
        elif error is None:  # a run with nothing to do writes none, but corrects what an older run left
            if self._wrote_at is not None or (self.path.is_file() and b'"finished"' not in self.path.read_bytes()):
                self._write("finished", None)
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self._write("stopped", str(error) or None)
        else:
            explained = isinstance(error, FailedRun | OSError)
            self._write("failed", str(error) if explained else f"{type(error).__name__}: {error}")

    def _write(self, state: str, message: str | None) -> None:
        if self._broken or not self.path.parent.is_dir():
            return
        content = {**self._head, "updated": _now(), "state": state, "message": message, **self._progress}
        try:
            write_json(self.path, content)
        except OSError as error:
            self._broken = True
            log.warning("%s is no longer written: %s", self.path, error)
        self._wrote_at = time.monotonic()


def status_in(folder: str | Path, worker: int | None = None) -> Path | None:
    """Where a run that writes into `folder` keeps its status, or None where that is a URL.

    worker: the number of this one of several that write into the same folder; torchrun's are in the environment.
    """
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    number = rank if worker is None else str(worker)
    return None if "://" in str(folder) else Path(folder) / (STATUS if number is None else f"status-{number}.json")


def status_beside(folder: str | Path, worker: int | None = None) -> Path | None:
    """The same for a cache: shards.status.json beside shards/, because zarr warns of files in its groups."""
    inside = status_in(folder, worker)
    return inside and inside.parent.absolute().with_name(f"{inside.parent.absolute().name}.{inside.name}")


@contextmanager
def watched(watch: Watch, command: str, status: Path | None = None) -> Iterator[Report]:
    """A Report that shows progress as `watch` says, and keeps the command's status file.

    While open, SIGTERM raises Terminated, unless a stage that has work to save catches it first.
    """
    path = Path(watch.status) if watch.status else status
    bars = sys.stderr.isatty() and not watch.log_json
    display = None if watch.quiet else Bars() if bars else Lines()
    file, pacer = None if path is None else Status(path, command), Pacer()

    def report(now: Progress) -> None:
        paced = pacer(now)
        if display is not None:
            display.show(now, paced)
        if file is not None:
            file.update(paced)

    ended: BaseException | None = None
    try:
        with ExitStack() as stack:
            stack.enter_context(_terminated())
            if bars:
                from tqdm.contrib.logging import logging_redirect_tqdm

                stack.enter_context(logging_redirect_tqdm())
            yield report
    except BaseException as error:
        ended = error
        raise
    finally:
        if display is not None:
            display.close()
        if file is not None:
            file.end(ended)


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
    if not watch.log_json:
        return f"routesae: {message}"
    return json_line("warning" if code in (0, 130, 143) else "error", str(message), exit_code=code)
