"""Harvest in a process of its own while this one trains on what it writes: `routesae run --follow`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from routesae.harvest.settings import HarvestSettings
from routesae.machine.stop import Terminated, terminating
from routesae.reporting import FailedRun, Stopped

# On Linux the harvest gets a SIGTERM when its parent dies, even if that was killed.
CHILD = (
    "import ctypes, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 15); "
    "from routesae.cli import main; main(prog_name='routesae')"
)


@contextmanager
def harvesting(settings: HarvestSettings) -> Iterator[None]:
    """While open, a harvest runs; at the end it is done. It is asked to stop if the block fails.

    If it fails, this process gets a SIGTERM, so that a training stops with a checkpoint. Raises FailedRun then.
    """
    command = [sys.executable, "-c", CHILD, "--quiet", "harvest", *settings.to_flags()]
    process = subprocess.Popen(command, env=_environment(settings), start_new_session=True)  # Ctrl-C is for us alone
    is_ending = threading.Event()

    def watch() -> None:
        if process.wait() and not is_ending.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, name="harvest-watcher", daemon=True)
    watcher.start()
    try:
        with terminating():
            yield
            watcher.join()
    except (Stopped, Terminated) as stopped:
        if process.poll():
            raise FailedRun(
                f"the harvest beside this ended with exit code {process.returncode}, for the reason above; the same "
                "command goes on with both"
            ) from stopped
        raise
    finally:
        is_ending.set()
        process.terminate()
        watcher.join()


def _environment(settings: HarvestSettings) -> dict[str, str]:
    """Of several GPUs the harvest gets the last, and training the first, unless --device says otherwise."""
    environment, count = dict(os.environ), torch.cuda.device_count()
    if settings.device == "auto" and count > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[-1]
    return environment
