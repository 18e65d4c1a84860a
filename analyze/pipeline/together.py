"""Harvest in a process of its own while this one trains on what it writes: `routesae run --follow`."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.machine.stop import Terminated, terminating
from routesae.reporting import FailedRun, Stopped, WrongInput

log = logging.getLogger(__name__)


@contextmanager
def harvesting(settings: HarvestSettings) -> Iterator[None]:
    """While open, a harvest runs; at the end it is done. It is asked to stop if the block fails.

    If it fails, this process gets a SIGTERM, so that a training stops with a checkpoint. Raises FailedRun then.
    """
    process = multiprocessing.get_context("spawn").Process(target=_harvest, args=(settings,))
    is_ending = threading.Event()

    def watch() -> None:
        process.join()
        if process.exitcode and not is_ending.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    process.start()
    watcher = threading.Thread(target=watch, name="harvest-watcher", daemon=True)
    watcher.start()
    try:
        with terminating():
            yield
            watcher.join()
    except (Stopped, Terminated) as stopped:
        if process.exitcode:
            raise FailedRun(f"the harvest ended with exit code {process.exitcode}; begin both again") from stopped
        raise
    finally:
        is_ending.set()
        process.terminate()
        watcher.join()


def _harvest(settings: HarvestSettings) -> None:
    """Of several GPUs take the last, where training takes the first, unless --device says otherwise."""
    os.setsid()  # Ctrl-C is for the parent, which says so by SIGTERM
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: also when the parent is killed
    if settings.device == "auto" and (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[-1]
    try:
        harvest(settings)
    except Stopped as stopped:
        log.warning("%s", stopped)
    except (WrongInput, FailedRun, OSError) as failure:
        log.error("%s", failure)  # the parent fails, and says that this did
        sys.exit(1)
