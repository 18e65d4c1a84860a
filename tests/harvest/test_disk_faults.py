"""Disks that are full, folders that cannot be written or went away: one line with the remedy, and nothing lost."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from routesae.harvest.cache import arrays
from routesae.harvest.cache.verify import verify
from routesae.harvest.run import harvest
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import FailedRun, Progress, WrongInput

Settings = Callable[..., HarvestSettings]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes beyond it fail as on a full disk do: with an error, after what still fitted was written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_costs_nothing_committed(
    tiny_settings: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    settings = tiny_settings(out=str(out))
    whole = harvest(tiny_settings(out=str(tmp_path / "whole")))
    harvest(settings)
    for index in (1, 2, 3):
        shutil.rmtree(out / f"shard-0000{index}")
    kept = contents(out)
    with files_of_at_most(90_000), pytest.raises(FailedRun, match="no room left at") as failed:  # a layer has 120 kB
        harvest(settings)
    assert "2 of 5 shards are there; make room and run the same command again" in str(failed.value)
    assert "\n" not in str(failed.value)
    assert contents(out) == kept  # what did not fit is gone too: no claim, nothing half written
    assert not list(out.glob(".*"))
    assert verify(str(out)).problems == [f"shard-0000{index}: missing" for index in (1, 2, 3)]
    harvest(settings)
    assert contents(out) == contents(whole.path)


def test_a_file_that_is_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    """In its rows, its padding or its index: what is written last may be taken in part, without a word."""
    rows = np.zeros((300, 8), "<f2")
    arrays.write_array(tmp_path / "whole", rows)
    size = arrays.data_file(tmp_path / "whole", 2).stat().st_size
    for cut in (1, rows.nbytes - 1, rows.nbytes, rows.nbytes + 1, size - 40, size - 4, size - 1):
        with files_of_at_most(cut), pytest.raises(OSError, match="File too large"):
            arrays.write_array(tmp_path / str(cut), rows)
    with files_of_at_most(size):
        arrays.write_array(tmp_path / "fits", rows)


def test_a_disk_too_full_for_the_tokens_leaves_nothing(tiny_settings: Settings, tmp_path: Path) -> None:
    with files_of_at_most(10_000), pytest.raises(FailedRun, match=r"no room left at .*: nothing is written yet"):
        harvest(tiny_settings(out=str(tmp_path / "shards")))
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("stage", ["tokenise", "harvest"])
def test_a_folder_that_goes_away_is_named(stage: str, tiny_settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "shards"

    def report(now: Progress) -> None:
        if now.stage == stage and now.done >= 2048:
            shutil.rmtree(out, ignore_errors=True)

    with pytest.raises(FailedRun, match=rf"{out} was deleted or unmounted while it was written; bring it back"):
        harvest(tiny_settings(out=str(out)), report)
    assert not out.exists()


def test_a_folder_that_goes_away_in_mid_shard_leaves_no_half_shard_in_its_place(
    begun: Path, tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer makes the folders of its next array anew, so the shard would lack those before."""
    shutil.rmtree(begun / "shard-00002")
    write_array = arrays.write_array

    def vanishing(folder: Path, *arguments: object, **options: object) -> None:
        if folder.name == "layer_04":
            shutil.rmtree(begun)
        write_array(folder, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(arrays, "WRITERS", 1)  # else an earlier array, still being written, may be what fails
    monkeypatch.setattr(arrays, "write_array", vanishing)
    with pytest.raises(FailedRun, match="was deleted or unmounted"):
        harvest(tiny_settings(out=str(begun)))
    assert not list(begun.rglob("shard-*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_wrong_input(
    begun: Path, tiny_settings: Settings, tmp_path: Path
) -> None:
    shutil.rmtree(begun / "shard-00002")
    kept = contents(begun)
    begun.chmod(0o555)
    tmp_path.chmod(0o555)
    try:
        for out in (begun, tmp_path / "new"):
            with pytest.raises(WrongInput, match="cannot be written"):
                harvest(tiny_settings(out=str(out)))
    finally:
        tmp_path.chmod(0o755)
        begun.chmod(0o755)
    assert contents(begun) == kept
