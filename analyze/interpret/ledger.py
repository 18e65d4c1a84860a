"""A file of answers that were paid for, each of which is on the disk before the next question.

    line 1        {"identity": {…}}: what was asked of which model; a file is only continued under the same
    line 2 …      one JSON object an answer, in the order they came

A last line that a kill cut short is dropped when the file is opened again. Whoever opens a ledger holds the lock of
its folder.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from routesae.harvest.cache.arrays import fsync
from routesae.machine.files import refuse_link
from routesae.reporting import FailedRun, WrongInput

Line = dict[str, Any]


@dataclass
class Ledger:
    """The answers of one file, and the file open for more."""

    path: Path
    file: FileIO
    lines: list[Line]

    def add(self, line: Mapping[str, Any]) -> None:
        """Put an answer on the disk for good. Raises FailedRun if the disk does not take it."""
        self._append(line)
        self.lines.append(dict(line))

    def _append(self, line: Mapping[str, Any]) -> None:
        written = json.dumps(line).encode() + b"\n"
        end = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(written) < len(written):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file.fileno())
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(end)  # the next answer must not continue half a line
            raise FailedRun(f"{self.path} cannot be written: {error}; the same command continues from it") from error


@contextmanager
def open_ledger(path: Path, identity: Mapping[str, Any], overwrite: bool = False) -> Iterator[Ledger]:
    """The ledger at `path`, made if it is missing.

    Raises WrongInput if the file has another identity, is damaged, or is a symbolic link.
    """
    refuse_link(path)
    is_new = not path.exists()
    with path.open("a+b", buffering=0) as file:
        if overwrite:
            file.truncate(0)
        file.seek(0)
        content = file.read()
        before, lines = read_lines(path, content)
        head = dict(identity) if before is None else before
        for name in dict.fromkeys((*identity, *head)):
            if head.get(name) != identity.get(name):
                raise WrongInput(
                    f"{path} was begun with {name} {head.get(name)!r}, now it is {identity.get(name)!r}; go back to "
                    "that, or give --overwrite to lose what the file holds"
                )
        file.truncate(content.rfind(b"\n") + 1)
        ledger = Ledger(path, file, lines)
        if before is None:
            ledger._append({"identity": dict(identity)})
        if is_new:
            fsync(path.parent)
        yield ledger


def read_lines(path: Path, content: bytes) -> tuple[Line | None, list[Line]]:
    """Identity and answers of a ledger's bytes, without a torn last line. The identity is None if there is no line.

    Raises WrongInput naming a line that is damaged.
    """
    lines: list[Line] = []
    for number, text in enumerate(content.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or (number == 1 and not isinstance(line.get("identity"), dict)):
            raise WrongInput(f"line {number} of {path} is damaged; delete that line, or give --overwrite")
        lines.append(line)
    return (lines[0]["identity"], lines[1:]) if lines else (None, [])
