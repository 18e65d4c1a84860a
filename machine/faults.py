"""Turn what a disk does to a run that writes to it into one line with the remedy."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from routesae.reporting import FailedRun, WrongInput

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


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
