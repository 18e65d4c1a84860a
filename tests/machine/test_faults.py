"""What a disk does to a run is one line with the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from routesae.machine.files import disk_faults
from routesae.reporting import FailedRun, WrongInput, is_out_of_memory


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, FailedRun, r"no room left at OUT \(No space left on device\): 3 shards; make room"),
        (errno.EDQUOT, FailedRun, r"no room left at OUT \(Disk quota exceeded\)"),
        (errno.EACCES, WrongInput, r"OUT cannot be written \(Permission denied\)"),
        (errno.EROFS, WrongInput, r"OUT cannot be written \(Read-only file system\)"),
        (errno.ESTALE, FailedRun, "OUT was deleted or unmounted"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_what_a_disk_says_is_told_with_the_remedy(
    number: int, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    for named in (None, str(out / "shard-00001"), str(tmp_path)):
        with (
            pytest.raises(kind, match=message.replace("OUT", str(out))) as told,
            disk_faults(out, lambda: "3 shards"),
        ):
            raise OSError(number, os.strerror(number), named)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_becomes_read_only_in_mid_run_is_a_failed_run(number: int, tmp_path: Path) -> None:
    with (
        pytest.raises(FailedRun, match=r"can no longer be written \(.*\): 3 shards; make it writable"),
        disk_faults(tmp_path, lambda: "3 shards", lambda: True),
    ):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))


def test_what_another_file_suffers_is_not_laid_on_the_cache(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_faults(tmp_path / "shards", lambda: ""):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/corpus.jsonl")


def test_how_to_go_on_is_what_the_run_says(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EROFS):
        again = r"make (room|it writable) and give --resume$"
        with (
            pytest.raises(FailedRun, match=again),
            disk_faults(tmp_path, lambda: "kept", lambda: True, "give --resume"),
        ):
            raise OSError(number, "full")


@pytest.mark.parametrize(
    "ask",
    [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: bytearray(1 << 50)],
    ids=["torch", "np", "py"],
)
def test_memory_that_the_host_has_not_got_is_known_by_what_is_raised(ask: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        ask()
    assert is_out_of_memory(raised.value)


def test_memory_of_a_gpu_is_known_by_what_is_raised_and_nothing_else_is() -> None:
    for said in (
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(said))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    for other in (RuntimeError("a shape is wrong"), ValueError("out of memory"), OSError(errno.ENOSPC, "full")):
        assert not is_out_of_memory(other)
