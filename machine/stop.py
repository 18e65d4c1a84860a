"""Handle SIGTERM and Ctrl-C: note them for a loop that looks between steps, or end at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from routesae.reporting import Stopped

StopRequest = Callable[[], signal.Signals | None]


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, the first SIGTERM or SIGINT is only noted, and the yielded function returns it. A second one
    interrupts.

    Outside the main thread signals cannot be caught, and the function returns None.
    """
    noted: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(signal.Signals(number))

    with _handlers(note, signal.SIGTERM, signal.SIGINT):
        yield lambda: noted[0] if noted else None


class Terminated(KeyboardInterrupt):
    """SIGTERM, where no stage has work to save first. Not an Exception, so that no library that expects failures
    catches it.
    """


def terminating() -> AbstractContextManager[None]:
    """While open, SIGTERM raises Terminated, but outside the main thread, where signals cannot be caught."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated("stopped by SIGTERM")

    return _handlers(end, signal.SIGTERM)


@contextmanager
def ending_at_once(message: str) -> Iterator[None]:
    """While open, SIGTERM ends what is under way as Ctrl-C does, but as Stopped(message) with exit code 0."""
    try:
        with terminating():
            yield
    except Terminated:
        raise Stopped(message, 0) from None


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def stop_code(request: signal.Signals) -> int:
    """The exit code of a run that was asked to stop and did."""
    return 0 if request == signal.SIGTERM else 130
