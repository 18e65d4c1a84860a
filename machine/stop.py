"""Being asked to stop: SIGTERM or Ctrl-C in; a flag that a loop looks at between steps, or an end at once, out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from routesae.reporting import Stopped

StopRequest = Callable[[], signal.Signals | None]


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, the first SIGTERM or SIGINT is only noted: the function given says which. A second one interrupts.

    Outside the main thread signals cannot be caught, and the function says None.
    """
    noted: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Terminated(KeyboardInterrupt):
    """No Exception, so that no library that expects failures takes it for one."""


@contextmanager
def ending_at_once(message: str) -> Iterator[None]:
    """While open, SIGTERM ends what is under way as Ctrl-C does, but as Stopped(message) with exit code 0.

    For what has nothing to finish first. Outside the main thread signals cannot be caught, and nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        raise Stopped(message, 0) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_code(request: signal.Signals) -> int:
    """The exit code of a run that was asked to stop and did."""
    return 0 if request == signal.SIGTERM else 130
