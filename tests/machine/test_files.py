"""Files are written whole or not at all, under a name nobody can guess, and never through a link."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from routesae.machine import files
from routesae.machine.files import BadFile, read_signed, replacing, signed, write_json

KILLED = """
import os, sys
from routesae.machine.files import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
"""


def write_and_raise(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("path", [str, Path])
def test_a_file_appears_whole_when_the_block_ends_and_not_before(tmp_path: Path, path: Callable[[Path], str]) -> None:
    (tmp_path / "a.json").write_bytes(b"old")
    with replacing(path(tmp_path / "a.json")) as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "a.json").read_bytes() == b"old"
        assert Path(file.name).read_bytes() == b"new"  # for libraries that take a path
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert names(tmp_path) == ["a.json"]


def test_every_writing_has_another_name_of_64_random_bits(tmp_path: Path) -> None:
    seen = set()
    for _ in range(20):
        with replacing(tmp_path / "a") as file:
            seen.add(Path(file.name).name)
    assert len(seen) == 20
    assert all(re.fullmatch(r"\.a\.[0-9a-f]{16}\.partial", name) for name in seen)


@pytest.mark.parametrize("link", [".a.partial", "a.partial", "a"])
def test_what_a_link_names_is_not_written(link: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / link).symlink_to(tmp_path / "mine")
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a").read_text() == "new"
    assert not (tmp_path / "a").is_symlink()


def test_a_link_at_the_random_name_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.guessed.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError), replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "mine").read_text() == "mine"


def test_an_error_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            write_and_raise(tmp_path / "a", error)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_the_error_that_is_raised_is_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a disk that became read-only does not let the partial file go either."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(f"unlink {path}")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="read-only"), replacing(tmp_path / "a"):
        raise OSError("read-only")


def test_what_a_killed_writer_left_goes_with_the_next_and_another_files_stays(tmp_path: Path) -> None:
    for name in ("a", "b", "[ab]"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], check=False)
    left = names(tmp_path)
    assert [name[:3] for name in left] == [".[a", ".a.", ".b."]
    with replacing(tmp_path / "[ab]"):
        pass  # its name is no pattern
    assert names(tmp_path) == [*left[1:], "[ab]"]
    with replacing(tmp_path / "a"):
        pass
    assert names(tmp_path) == [left[2], "[ab]", "a"]


def test_two_writers_of_one_file_do_not_meet_and_the_last_one_wins(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first:
        with replacing(tmp_path / "a") as second:
            first.write(b"first")
            second.write(b"second")
        assert (tmp_path / "a").read_bytes() == b"second"
        assert Path(first.name).exists()
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_a_writer_whose_file_was_swept_before_it_was_locked_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer that looks just then sees a partial file that nobody has locked."""
    real, swept = fcntl.flock, []

    def sweep(file: int, operation: int) -> None:
        if not swept:
            swept.extend(tmp_path.glob(".a.*"))
            swept[0].unlink()
        real(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", sweep)
    with replacing(tmp_path / "a") as file:
        swept[0].unlink(missing_ok=True)  # by a second such writer, which had the swept file open
        file.write(b"whole")
    assert swept
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_many_threads_that_write_one_file_never_fail(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(30):
                write_json(tmp_path / "a.json", {"number": number})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_that_of_any_new_file(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), replacing(tmp_path / "absent" / "a"):
        pass


def test_a_flipped_bit_of_a_signed_file_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = signed({"score": 3.25, "shares": {3: 0.5, 12: float("nan")}, "names": ("a", "b"), "none": None})
    write_json(path, value)
    written, expected = path.read_bytes(), read_signed(path)
    assert expected == {"score": 3.25, "shares": {"3": 0.5, "12": None}, "names": ["a", "b"], "none": None} | {
        "hash": value["hash"]
    }
    noticed = 0
    for bit in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert read_signed(path) == expected
        except BadFile:
            noticed += 1
    assert noticed > 7 * len(written)
    for other in ({"score": 3.25}, [1], {**value, "score": 4}):
        write_json(path, other)
        with pytest.raises(BadFile, match="its hash is missing or differs"):
            read_signed(path)
