"""A file of answers that were paid for, each of which is on the disk before the next question.

    line 1        {"identity": {…}, "hash": …}: what was asked of which model; a file is only continued under the same
    line 2 …      {…, "hash": …}: an answer each, in the order they came

The hash at the end of a line is the xxh3-64 of what stands before it, so that a damaged line is noticed. Behind the
last line room is reserved, as zeros, for the answers under way. A last line that a kill cut short is dropped. Whoever
opens a ledger holds the lock of its folder.
"""

import errno
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from routesae.analyze.interpret.answers import Explanation, Predictions
from routesae.analyze.interpret.settings import MODES
from routesae.harvest.cache.arrays import fsync
from routesae.machine.files import parse_json, read_bytes, reading, refuse_link
from routesae.reporting import FailedRun, WrongInput

log = logging.getLogger(__name__)

Line = dict[str, Any]
ANSWERED, UNPARSED, UNANSWERED = "answered", "unparsed", "unanswered"
LINES, SUMMARY = "interpretations.jsonl", "interpretations.json"
LARGEST_BYTES = 1 << 30
REMEDY = "bring the file back from a copy, or give --overwrite to set aside what the folder has"
HASHED = re.compile(rb'(.+), "hash": "([0-9a-f]{16})"\}', re.DOTALL)


class _Asked(BaseModel):
    """What every answer's line must say; those of a scoring ledger say more."""

    model_config = ConfigDict(strict=True)
    latent: NonNegativeInt
    outcome: Literal["answered", "unparsed", "unanswered"]
    reason: str | None
    input_tokens: NonNegativeInt
    output_tokens: NonNegativeInt
    max_output_tokens: int


class _Scored(_Asked):
    digest: str
    batch: NonNegativeInt
    batches: NonNegativeInt
    truth: list[bool]


class Ledger:
    """The answers of one file, and the file open for more. size: bytes of its lines."""

    def __init__(self, path: Path, file: int, lines: list[Line], size: int):
        self.path, self.lines, self._file, self._size = path, lines, file, size

    def reserve(self, size: int) -> None:
        """Take so many bytes of the disk behind the last line. Raises FailedRun if it has not so many."""
        try:
            os.posix_fallocate(self._file, self._size, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that reserves nothing
                self._fail(error)

    def add(self, line: Mapping[str, Any]) -> None:
        """Put an answer on the disk for good. Raises FailedRun if the disk does not take it."""
        body = json.dumps(line).encode()[:-1]
        written = body + b', "hash": "%s"}\n' % xxhash.xxh3_64_hexdigest(body).encode()
        try:
            if os.pwrite(self._file, written, self._size) < len(written):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            self._fail(error)
        self._size += len(written)
        self.lines.append(dict(line))

    def _fail(self, error: OSError) -> None:
        raise FailedRun(f"{self.path} cannot be written: {error}; the same command continues from it") from error


@contextmanager
def open_ledger(path: Path, identity: Mapping[str, Any]) -> Iterator[Ledger]:
    """The ledger at `path`, made if it is missing.

    Raises WrongInput if the file has another identity, is damaged, or is not a regular file.
    """
    refuse_link(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "rb+", buffering=0) as file:
        before, lines, size = read_ledger(path)
        ledger = Ledger(path, file.fileno(), lines, size)
        if before is None:
            before = dict(identity)
            ledger.add({"identity": before})
            ledger.lines.clear()
            fsync(path.parent)
        for name in dict.fromkeys((*identity, *before)):
            if before.get(name) != identity.get(name):
                raise WrongInput(
                    f"{path} was begun with {name} {before.get(name)!r}, now it is {identity.get(name)!r}; go back "
                    "to that, or give --overwrite to set aside what the folder has"
                )
        try:
            yield ledger
        finally:
            with suppress(OSError):  # of what was reserved
                file.truncate(ledger._size)


def read_ledger(path: Path) -> tuple[Line | None, list[Line], int]:
    """Identity and answers, and how many bytes they take; the identity is None if there is no line.

    Raises WrongInput naming a line that is damaged.
    """
    with reading(path, REMEDY):
        content = read_bytes(path, LARGEST_BYTES).rstrip(b"\0")
    *texts, torn = content.split(b"\n")
    if torn:
        log.warning("the last line of %s was cut short and is dropped; its question is asked again", path)
    lines: list[Line] = []
    for number, text in enumerate(texts, 1):
        with reading(f"line {number} of {path}", f"delete it, or {REMEDY}"):
            lines.append(_read_line(text, path.name == LINES, is_head=number == 1))
    identity = lines[0]["identity"] if lines else None
    return identity, lines[1:], len(content) - len(torn)


def _read_line(text: bytes, explains: bool, *, is_head: bool) -> Line:
    """Raises ValueError if it is not as it was written, or says not what it must."""
    hashed = HASHED.fullmatch(text)
    if hashed is None or xxhash.xxh3_64_hexdigest(hashed[1]).encode() != hashed[2]:
        raise ValueError("its hash differs")
    line: Line = parse_json(hashed[1] + b"}")
    if is_head:
        if not isinstance(line.get("identity"), dict):
            raise ValueError("it has no identity")
        return line
    (_Asked if explains else _Scored).model_validate(line)
    if line["outcome"] == ANSWERED:
        (Explanation if explains else Predictions).model_validate(line)
        if not explains and len(line["predictions"]) != len(line["truth"]):
            raise ValueError(f"{len(line['predictions'])} predictions for {len(line['truth'])} texts")
    return line


def set_aside(folder: Path) -> None:
    """Rename what interpret wrote into `folder`, so that the names say which model was asked."""
    for old in (folder / name for name in (LINES, SUMMARY, *(f"{mode}.jsonl" for mode in MODES))):
        if old.is_file():
            content, model = read_bytes(old, LARGEST_BYTES), "unknown"
            with suppress(ValueError, KeyError, TypeError):
                head = content if old.name == SUMMARY else content.partition(b"\n")[0]
                model = re.sub(r"[^\w.-]+", "-", str(parse_json(head)["identity"]["model"]))[:60]
            new = old.with_name(f"{old.stem}.{model}-{xxhash.xxh3_64_hexdigest(content)}{old.suffix}")
            old.rename(new)
            log.warning("%s was set aside as %s", old, new.name)
