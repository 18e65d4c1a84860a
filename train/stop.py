"""Being asked to stop: SIGTERM or Ctrl-C in; a flag that a loop looks at between steps out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

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
