"""A command in a process of its own: seconds from its start to its end, and the most memory it held.

The peak resident set is what the kernel counted (ru_maxrss), pages of mapped files among them. A child's count starts
at what its parent holds when it is started, so whoever calls this imports nothing heavy. The anonymous part, what the
process allocated itself, is polled, and may miss a peak shorter than the interval.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_mb: float
    anonymous_mb: float
    output: str


def measure(command: Sequence[str]) -> Measured:
    """Raises RuntimeError, with the end of what it printed, where the command fails."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        anonymous: list[float] = [0.0]
        over = threading.Event()
        poller = threading.Thread(target=_poll, args=(process.pid, over, anonymous), daemon=True)
        poller.start()
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        over.set()
        poller.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return Measured(seconds, usage.ru_maxrss * kilobyte / 1e6, max(anonymous), output)


def _poll(pid: int, over: threading.Event, seen: list[float]) -> None:
    while not over.wait(POLL_SECONDS):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it is over, or there is no /proc here
            return
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                seen.append(int(line.split()[1]) * 1024 / 1e6)
