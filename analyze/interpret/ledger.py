"""A file of answers that have been paid for: each is on the disk before the next one counts.

    line 1        {"identity": {…}}: what was asked, of whom, about what; a file goes on only under the same
    line 2 …      one JSON object an answer, in the order they came

A line that a kill or a full disk cut short is dropped when the file is opened again. One process writes at a time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from routesae.harvest.cache.arrays import fsync
from routesae.machine.files import refuse_link
from routesae.reporting import FailedRun, WrongInput


class Ledger:
    """The answers of one file, and the file open for more.

    Raises WrongInput where the file is about something else, is no such file, or another process writes it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, overwrite: bool = False):
        self.path, self.identity = path, dict(identity)
        refuse_link(path)
        new = not path.exists()
        self.file: FileIO = path.open("a+b", buffering=0)
        try:
            self._lock()
            if overwrite:
                self.file.truncate(0)
            self.lines = self._read()
            if self.file.tell() == 0:
                self._append({"identity": self.identity})
            if new:
                fsync(path.parent)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def add(self, line: Mapping[str, Any]) -> None:
        """Put an answer on the disk for good. Raises FailedRun where the disk does not take it."""
        self._append(line)
        self.lines.append(dict(line))

    def _append(self, line: Mapping[str, Any]) -> None:
        written = json.dumps(line).encode() + b"\n"  # ASCII: half a surrogate pair, which a model may write, fits too
        try:
            if self.file.write(written) < len(written):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file.fileno())
        except OSError as error:
            raise FailedRun(f"{self.path} could not be written: {error}; the same command goes on from it") from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WrongInput(f"another process is writing {self.path}; wait for it to end") from None

    def _read(self) -> list[dict[str, Any]]:
        """The answers there. Leaves the file without a torn last line and standing at its end."""
        self.file.seek(0)
        content = self.file.read()
        head, lines = read_lines(self.path, content)
        if head is not None:
            self._require_same(head)
        self.file.truncate(content.rfind(b"\n") + 1)
        self.file.seek(0, os.SEEK_END)
        return lines

    def _require_same(self, identity: Mapping[str, Any]) -> None:
        for name in dict.fromkeys((*self.identity, *identity)):
            before, now = identity.get(name), self.identity.get(name)
            if before != now:
                raise WrongInput(
                    f"{self.path} was begun with {name} {before!r}, now it is {now!r}; go on with that, or give "
                    "--overwrite to lose what it holds"
                )


def read_lines(path: Path, content: bytes) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Identity and answers of a ledger's bytes, without a torn last line; no identity where there is no line.

    Raises WrongInput naming the line that is none.
    """
    found: list[dict[str, Any]] = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or (number == 1 and not isinstance(value.get("identity"), dict)):
            raise WrongInput(f"line {number} of {path} is damaged; take it out by hand, or give --overwrite")
        found.append(value)
    return (found[0]["identity"], found[1:]) if found else (None, [])
