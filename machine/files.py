"""Small files that anybody may have written: read whole, within bounds, or refused.

A cache or an SAE may come from a stranger. Its manifest, records and configurations are JSON, and JSON can ask for
any amount of memory, repeat a key so that two readers disagree, or not be a file at all.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import orjson

from routesae.reporting import WrongInput

LARGEST_BYTES = 1 << 21  # parsed, at worst some 30 times as much
DEEPEST = 64  # of nested lists and objects; what is written here has fewer than ten
_NESTED = {dict, list}


class BadFile(ValueError):
    """A file is not one that could be read safely; the message says why, without the path."""


def read_bytes(path: Path | str, largest: int = LARGEST_BYTES) -> bytes:
    """All of a regular file. Raises BadFile where it is none or too large, OSError where it cannot be read."""
    # Not blocking: to open a pipe that somebody put there would otherwise wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadFile("not a regular file")
        if status.st_size > largest:
            raise BadFile(f"{status.st_size:,} bytes, more than the {largest:,} that are read")
        return os.read(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def read_json(path: Path | str, largest: int = LARGEST_BYTES) -> Any:
    """What a JSON file holds. Raises BadFile where it is no plain JSON, OSError where it cannot be read."""
    return parse_json(read_bytes(path, largest))


def parse_json(data: bytes) -> Any:
    """What JSON says, once: no key twice, no NaN or infinity, no nesting beyond reason. Raises BadFile otherwise."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadFile(f"not JSON: {error}") from None
    # A key that is there twice is once in `value`, so there are more colons than keys: only then, or where a string
    # holds one, does it pay to look at each object as it is read. A cache has thousands of records.
    if _keys(value) != data.count(b":"):
        json.loads(data, object_pairs_hook=_without_repeats)
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise BadFile(f"it says {repeated[:40]!r} twice")
    return found


def _keys(value: Any) -> int:
    """How many keys its objects have in all. Raises BadFile where they are nested too deep."""
    keys = 0
    level: list[Any] = [value] if type(value) in _NESTED else []
    for _ in range(DEEPEST):
        inside: list[Any] = []
        for outer in level:
            values = outer
            if type(outer) is dict:
                keys += len(outer)
                values = outer.values()
            inside += [one for one in values if type(one) in _NESTED]
        if not inside:
            return keys
        level = inside
    raise BadFile(f"nested more than {DEEPEST} deep")


def leads_out_of(folder: Path, path: Path) -> bool:
    """Whether `path`, named as something below `folder`, is elsewhere once symbolic links are followed."""
    return not os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def refuse_link(path: Path) -> None:
    """Raises WrongInput where a file that is to be written to is a symbolic link: it may lead anywhere."""
    if path.is_symlink():
        raise WrongInput(f"{path} is a symbolic link, which is not written through; put a file there, or delete it")
