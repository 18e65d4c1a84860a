"""What a disk does to a run that writes to it: an OSError in; one line with the remedy out."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from routesae.reporting import FailedRun, WrongInput

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def disk_faults(path: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Say of an OSError about `path` what to do: FailedRun for a full disk or a folder that went away, WrongInput for
    one that cannot be written. Others pass.

    kept: what stays of the run, in words; asked for only then.
    """
    try:
        yield
    except OSError as error:
        if not _is_about(error, path):
            raise
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise FailedRun(
                f"no room left at {path} ({reason}): {kept()}; make room, and the same command goes on"
            ) from error
        if error.errno in _FORBIDDEN:
            raise WrongInput(
                f"{path} cannot be written ({reason}); give a folder that can be, or change its permissions"
            ) from error
        if error.errno in (errno.ENOENT, errno.ESTALE) and not (path / "zarr.json").exists():
            with suppress(OSError):  # a writer may have made the folder anew
                path.rmdir()
            raise FailedRun(
                f"{path} went away while it was written; bring it back, and the same command goes on, or begins anew"
            ) from error
        raise


def _is_about(error: OSError, path: Path) -> bool:
    """A write that fails names no file."""
    if error.filename is None:
        return True
    named = Path(str(error.filename))
    return path in (named, *named.parents) or named in path.parents
