"""Read small files that anybody may have written: whole, within bounds, or not at all. Write files the same way, and
turn what goes wrong into one line with the remedy.

A cache or an SAE may come from a stranger. Its manifest, records and configurations are JSON, and JSON can ask for
any amount of memory, repeat a key so that two readers disagree, or not be a regular file.
"""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from routesae.reporting import FailedRun, WrongInput, visible

LARGEST_BYTES = 1 << 21  # parsed, this takes up to 30 times as much memory
PARTIAL = ".partial"
_OPEN = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class BadFile(ValueError):
    """A file cannot be read safely. The message says why, without the path."""


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file to read it. Raises BadFile if it is another kind, OSError if it cannot be opened."""
    if not stat.S_ISREG(Path(path).stat().st_mode):  # first, as merely opening a device may do something
        raise BadFile("not a regular file")
    # Without O_NONBLOCK, opening a pipe that somebody has just put there would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise BadFile("not a regular file")


def read_bytes(path: Path | str, largest: int = LARGEST_BYTES) -> bytes:
    """Read a regular file. Raises BadFile if it is another kind or too large, OSError if it cannot be read."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > largest:
            raise BadFile(f"{size:,} bytes, and at most {largest:,} are read")
        return file.read(size)


def read_json(path: Path | str, largest: int = LARGEST_BYTES) -> Any:
    """Read a JSON file. Raises BadFile if it is not plain JSON, OSError if it cannot be read."""
    return parse_json(read_bytes(path, largest))


def file_hash(path: Path | str, kind: Callable[[], Any] = xxhash.xxh3_128) -> str:
    """Hash the bytes of a regular file, a piece at a time. Raises as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, kind).hexdigest()


def parse_json(data: bytes) -> Any:
    """Parse JSON that has no repeated key, no NaN or infinity and no absurd nesting. Raises BadFile otherwise."""
    try:
        return json.loads(data, object_pairs_hook=_table, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise BadFile("nested too deep") from None
    except BadFile:
        raise
    except ValueError as error:
        raise BadFile(f"not JSON: {error}") from None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) != len(pairs):
        names = [name for name, _ in pairs]
        raise BadFile(f"the key {next(name for name in names if names.count(name) > 1)[:40]!r} stands twice")
    return merged


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:20]} is not a finite number")
    return value


def problem_of(error: Exception) -> str:
    """What is wrong with something that was read, on one line: of many things that pydantic found, the first."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    first = errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))[:80]
    return f"{where}: {first['msg'][:120]}, not {repr(first['input'])[:80]}"


@contextmanager
def reading(what: object, remedy: str, library: type[Exception] = OSError) -> Iterator[None]:
    """While open, turn what is wrong with a file that is read into WrongInput: `WHAT cannot be read (why); REMEDY`.

    library: what else a library raises of a damaged file.
    """
    try:
        yield
    except WrongInput:
        raise
    except FileNotFoundError as error:
        raise WrongInput(f"{what} does not exist; {remedy}") from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError, library) as error:
        raise WrongInput(f"{what} cannot be read ({visible(problem_of(error))[:200]}); {remedy}") from error


@contextmanager
def replacing(path: Path | str, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: yields an open file, which takes the place of `path` when the block ends.

    Until then it lies beside `path` under a random name (its `.name`, for libraries that take a path), so that
    neither another process nor a link that a stranger put there meets it. It is on the disk before the rename, unless
    it is not `durable`, because it can be fetched again. After an error it is deleted; what a killed process left is
    deleted by the next writer of `path`. Raises OSError.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        delete_unless_locked(left)
    with _create_locked(path) as file:
        try:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            with suppress(OSError):  # the folder may be gone or read-only by now, which is what the error says
                Path(file.name).unlink()
            raise


def _create_locked(path: Path) -> BinaryIO:
    """Make a partial file of `path` and lock it; make another if a writer took it for a dead one's before that.

    Another of a new name: a second such writer may hold the first one open, and deletes by name.
    """
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
        file = open(str(partial), "x+b", opener=lambda name, flags: os.open(name, flags | _OPEN, 0o666))  # noqa: SIM115
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return file
        file.close()


def delete_unless_locked(partial: Path) -> None:
    """Delete a partial file whose writer is dead: then nobody has its lock."""
    with suppress(OSError), open(os.open(partial, os.O_RDONLY | _OPEN), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        partial.unlink()


def as_json(value: Any) -> str:
    """A value as JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False)


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(as_json(value).encode() + b"\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def signed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with a hash of all the rest, which `read_signed` compares."""
    rest = {name: item for name, item in value.items() if name != "hash"}
    plain = json.loads(json.dumps(_without_nan(rest)))  # as JSON gives it back: a key 3 is "3"
    return {**rest, "hash": xxhash.xxh3_128_hexdigest(json.dumps(plain, sort_keys=True).encode())}


def read_signed(path: Path | str, largest: int = LARGEST_BYTES) -> dict[str, Any]:
    """Read a JSON object that was signed. Raises BadFile if it was altered, OSError if it cannot be read."""
    value = read_json(path, largest)
    if not isinstance(value, dict) or value.get("hash") != signed(value)["hash"]:
        raise BadFile("it is not what was written: its hash is missing or differs")
    return value


@contextmanager
def disk_faults(
    path: Path,
    kept: Callable[[], str],
    has_begun: Callable[[], bool] = lambda: False,
    again: str = "run the same command again",
) -> Iterator[None]:
    """While open, turn an OSError about `path` into FailedRun if the disk is full or the folder is gone or can no
    longer be written, and into WrongInput if it never could. Other errors pass.

    kept: says what the run leaves on the disk. has_begun: whether the run has written anything. Both are called only
    after an error. again: how to go on.
    """
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(str(error.filename))  # a failed write names no file
        if not (named is None or named.is_relative_to(path) or path.is_relative_to(named)):
            raise
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise FailedRun(f"no room left at {path} ({reason}): {kept()}; make room and {again}") from error
        if error.errno in _FORBIDDEN and has_begun():
            raise FailedRun(
                f"{path} can no longer be written ({reason}): {kept()}; make it writable and {again}"
            ) from error
        if error.errno in _FORBIDDEN:
            raise WrongInput(
                f"{path} cannot be written ({reason}); give another folder, or change its permissions"
            ) from error
        if error.errno in (errno.ENOENT, errno.ESTALE) and not (path / "zarr.json").exists():
            with suppress(OSError):  # a writer may have made the folder anew
                path.rmdir()
            raise FailedRun(
                f"{path} was deleted or unmounted while it was written; bring it back and {again}, or begin anew"
            ) from error
        raise


def is_url(text: object) -> bool:
    """Whether it names a place in an object store, or tries to, rather than a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


def refuse_link(path: Path) -> None:
    """Raises WrongInput if a file that is to be written is a symbolic link, which may lead anywhere."""
    if path.is_symlink():
        raise WrongInput(f"{path} is a symbolic link, and routesae does not write through links; delete it")
