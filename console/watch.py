"""Shows how far a long run has come: a bar, log lines or lines of JSON on standard error, and a status file."""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from routesae import __version__
from routesae.console.options import Watch
from routesae.console.terminal import columns, styled
from routesae.machine.files import read_bytes, write_json
from routesae.machine.stop import terminating
from routesae.reporting import FailedRun, Progress, Report, Stopped, WrongInput, shortened, visible

log = logging.getLogger("routesae")
LOG_LINE_SECONDS = 10.0  # between progress lines where there is no terminal
STATUS_SECONDS = 2.0  # between two writings of the status file
NAME_LENGTHS = (60, 40, 30, 24, 18, 14, 10, 7)  # characters of a name, tried in this order until a bar fits


class ToStderr(logging.StreamHandler[Any]):
    """The handler that the command line adds: a class of its own, so that it is recognised later."""


class TextLines(logging.Formatter):
    """Formats a log record as text that does not act on the terminal. A record of this package is one line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        ours = record.name.startswith("routesae") and not record.exc_info
        shown = visible(text) if ours else "\n".join(map(visible, text.rstrip("\n").split("\n")))
        return styled(shown, sys.stderr, fg="yellow") if ours and record.levelno >= logging.WARNING else shown


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
            handler.setFormatter(JsonLines() if watch.log_json else TextLines())
    logging.captureWarnings(True)  # Python's own warnings go the same way
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


class Bars:
    """Shows progress as a bar with time left and figures, for a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None  # a tqdm, of one stage
        self._stage: str | None = None

    def show(self, now: Progress, paced: dict[str, Any]) -> None:
        from tqdm.auto import tqdm  # in a notebook its own bar

        if self._bar is None or now.stage != self._stage or now.done < self._bar.n:
            self.close()
            self._bar = tqdm(total=now.total, bar_format="{desc}{bar}", desc=visible(now.stage))
            self._stage = now.stage
        head = f"{100 * now.done / max(1, now.total):3.0f}%"
        if paced["seconds_left"] is not None:
            head += f" {tqdm.format_interval(paced['seconds_left'])} left"
        self._bar.ncols = columns() - 1
        stage, facts = fitted(visible(now.stage), now.facts, self._bar.ncols - len(f" {head} "))
        self._bar.set_description_str(f"{stage} {head}{facts} ", refresh=False)
        self._bar.update(now.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def fitted(stage: str, facts: Mapping[str, str], room: int) -> tuple[str, str]:
    """A stage and its figures in `room` columns: names are shortened first, then the last figures left out."""
    for most in range(len(facts), -1, -1):
        for length in NAME_LENGTHS:
            some = list(facts.items())[:most]
            shown = "".join(f" {shortened(visible(name), length)}={visible(value)}" for name, value in some)
            short = shortened(stage, max(12, length))
            if len(short) + len(shown) <= room:
                return short, shown
    return short, ""


class Status:
    """The status file of one run, written whole at most every STATUS_SECONDS and at the end.

    It appears with the first progress, if its folder exists; a run refused for wrong input leaves none. A disk that
    does not take it causes a warning only.
    """

    def __init__(self, path: Path | None, command: str):
        self.path = path
        self._head = {"routesae": __version__, "command": command, "pid": os.getpid(), "host": socket.gethostname()}
        self._head |= {"started": _now()}
        self._progress: dict[str, Any] = dict.fromkeys((*Progress._fields, "rate", "seconds_left"))
        self._wrote_at: float | None = None

    def update(self, paced: dict[str, Any]) -> None:
        self._progress = paced
        if self._wrote_at is None or time.monotonic() - self._wrote_at >= STATUS_SECONDS:
            self._write("running", None)

    def end(self, error: BaseException | None) -> None:
        """Write how the run ended: finished, stopped or failed, and why."""
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        state = "finished" if error is None else "stopped" if stopped else "failed"
        known = error is None or stopped or isinstance(error, FailedRun | OSError)
        message = (str(error or "") or None) if known else f"{type(error).__name__}: {error}"
        self._write("refused" if isinstance(error, WrongInput) else state, message)

    def _has_ended(self) -> bool:
        """Whether there is no status, or one of a run that finished, rather than one that a killed run left."""
        assert self.path is not None
        return not self.path.exists() or b'"finished"' in read_bytes(self.path)

    def _write(self, state: str, message: str | None) -> None:
        if self.path is None or (state == "refused" and self._wrote_at is None):
            return
        content = {**self._head, "updated": _now(), "state": state, "message": message, **self._progress}
        try:
            if state == "refused":
                self.path.unlink(missing_ok=True)
            elif state == "finished" and self._wrote_at is None and self._has_ended():
                pass  # it had nothing to do
            elif self.path.parent.is_dir():
                write_json(self.path, content)
        except (OSError, ValueError) as error:
            log.warning("%s is no longer written: %s", self.path, error)
            self.path = None
        self._wrote_at = time.monotonic()


def status_path(command: str, settings: Any) -> Path | None:
    """The status file of a command that fills a folder on a disk, or None. Of several workers each has its own.

    That of a cache lies beside it, because zarr warns of files in its groups. Of torchrun's processes that train, the
    first reports for all.
    """
    rank, alone = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") == "1"
    fills = ("harvest", "train", "ablation", "contexts", "interpret", "run")
    if command not in fills or "://" in str(settings.out) or (command == "train" and rank != "0"):
        return None
    saes: tuple[str, ...] = settings.saes if command in ("contexts", "interpret") else ()
    folder = Path(saes[0] if len(saes) == 1 and Path(saes[0]).is_dir() else settings.out)
    worker = settings.worker if command == "harvest" else None
    number = worker if worker is not None else None if alone else rank
    name = "status.json" if number is None else f"status-{number}.json"
    return folder.absolute().with_name(f"{folder.absolute().name}.{name}") if command == "harvest" else folder / name


@contextmanager
def watched(watch: Watch, command: str, status: Path | None = None) -> Iterator[Report]:
    """A Report that shows progress as `watch` says, and keeps the command's status file.

    While open, SIGTERM raises Terminated, unless a stage that has work to save catches it first. No fault of the
    terminal or of the status file ends the run, or hides what ended it.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    bars, on_terminal = Bars(), sys.stderr.isatty() and not (watch.quiet or watch.log_json)
    show = (lambda *_: None) if watch.quiet else bars.show if on_terminal else Lines().show
    file, pacer = Status(Path(watch.status) if watch.status else status, command), Pacer()

    def report(now: Progress) -> None:
        paced = pacer(now)
        with suppress(OSError):  # a terminal that is gone
            show(now, paced)
        file.update(paced)

    ended: BaseException | None = None
    try:
        with terminating(), logging_redirect_tqdm() if on_terminal else nullcontext():
            yield report
    except BaseException as error:
        ended = error
        raise
    finally:
        with suppress(OSError):
            bars.close()
        file.end(ended)
