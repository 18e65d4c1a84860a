"""`routesae …` as a process of its own that starts at once: forked from one that has torch and transformers.

Tests of signals, kills, streams and ranks need a process; they do not need the seconds in which it imports. What a
command imports, and what an interpreter does at its end, is for tests that start a Python.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

HEAVY = ["torch", "transformers.models.llama.modeling_llama", "openai", "routesae.tests.processes"]
HEAVY += ["routesae.harvest.run", "routesae.train.run", "routesae.analyze.interpret"]
_numbers = itertools.count()


@functools.cache
def server() -> ForkServerContext:
    """One for all tests of this process; it ends with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="routesae-processes-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _main(arguments: list[str], cwd: Path, environment: dict[str, str], output: Path, errors: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for file, descriptor in ((output, 1), (errors, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    # A shell that starts its jobs in the background has them ignore SIGINT, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from routesae.cli import main

    try:
        main(arguments, prog_name="routesae")
    finally:
        atexit._run_exitfuncs()


class Ended(NamedTuple):
    """stdout and stderr: whole, as text."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """A running `routesae …`, with those methods of subprocess.Popen that tests use."""

    def __init__(self, *arguments: object, cwd: Path, environment: Mapping[str, str] | None = None):
        """environment: what is added to this process's."""
        name = _folder() / str(next(_numbers))
        self.files = name.with_suffix(".stdout"), name.with_suffix(".stderr")
        for file in self.files:
            file.touch()
        environment = {**os.environ, **(environment or {})}
        command = (list(map(str, arguments)), cwd, environment, *self.files)
        self._process = server().Process(target=_main, args=command)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code, negative where a signal ended it. Raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("routesae", timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and to stderr by its end."""
        self.wait(timeout)
        output, errors = (file.read_text() for file in self.files)
        return output, errors

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_command(*arguments: object, cwd: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """The command from its start to its end, of at most two minutes."""
    command = Command(*arguments, cwd=cwd, environment=environment)
    try:
        output, errors = command.communicate(timeout=120)
    finally:
        command.kill()
    assert command.returncode is not None
    return Ended(command.returncode, output, errors)
