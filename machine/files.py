"""Read small files that anybody may have written: whole, within bounds, or not at all. Write JSON.

A cache or an SAE may come from a stranger. Its manifest, records and configurations are JSON, and JSON can ask for
any amount of memory, repeat a key so that two readers disagree, or not be a regular file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from routesae.reporting import WrongInput

LARGEST_BYTES = 1 << 21  # parsed, this takes up to 30 times as much memory


class BadFile(ValueError):
    """A file cannot be read safely. The message says why, without the path."""


def read_bytes(path: Path | str, largest: int = LARGEST_BYTES) -> bytes:
    """Read a regular file. Raises BadFile if it is another kind or too large, OSError if it cannot be read."""
    # Without O_NONBLOCK, opening a pipe that somebody put there would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadFile("not a regular file")
        if status.st_size > largest:
            raise BadFile(f"{status.st_size:,} bytes, and at most {largest:,} are read")
        return os.read(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def read_json(path: Path | str, largest: int = LARGEST_BYTES) -> Any:
    """Read a JSON file. Raises BadFile if it is not plain JSON, OSError if it cannot be read."""
    return parse_json(read_bytes(path, largest))


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


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as JSON, whole or not at all. JSON has no NaN and no infinity: they become null."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n")
    partial.replace(path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def leads_out_of(folder: Path, path: Path) -> bool:
    """Whether `path`, which names something below `folder`, leads elsewhere once symbolic links are followed."""
    return not os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def refuse_link(path: Path) -> None:
    """Raises WrongInput if a file that is to be written is a symbolic link, which may lead anywhere."""
    if path.is_symlink():
        raise WrongInput(f"{path} is a symbolic link, and routesae does not write through links; delete it")
