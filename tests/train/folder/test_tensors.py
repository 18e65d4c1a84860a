"""Safetensors files written and read here are those of the safetensors package; damaged ones are refused."""

from __future__ import annotations

import errno
import json
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from routesae.machine.files import BadFile
from routesae.train.folder.tensors import DTYPES, read_tensors, write_tensors

WEIGHTS = {"W_enc": torch.randn(3, 5).T, "W_dec": torch.randn(5, 3), "b": torch.zeros(()), "é": torch.zeros(0, 2)}


def test_the_bytes_are_those_the_safetensors_package_writes(tmp_path: Path) -> None:
    write_tensors(tmp_path / "ours", WEIGHTS)
    save_file({name: tensor.contiguous() for name, tensor in WEIGHTS.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_of_every_type_and_metadata_come_back_and_open_in_the_package(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).view(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    write_tensors(tmp_path / "a", tensors, {"format": "2"})
    back = read_tensors(tmp_path / "a")
    theirs = load_file(tmp_path / "a")
    for found in (back.tensors, theirs):
        assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
            name: (t.dtype, t.tolist()) for name, t in tensors.items()
        }
    assert back.metadata == {"format": "2"}
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata().keys() == {"format", "xxh3_128"}


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).to(dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "a", metadata={"a": "b"})
    back = read_tensors(tmp_path / "a")
    assert {name: t.tolist() for name, t in back.tensors.items()} == {name: t.tolist() for name, t in tensors.items()}
    assert back.metadata == {"a": "b"}


def test_the_hash_is_of_the_files_bytes_both_ways(tmp_path: Path) -> None:
    written = write_tensors(tmp_path / "a", WEIGHTS)
    assert written == read_tensors(tmp_path / "a").hash == xxhash.xxh3_128((tmp_path / "a").read_bytes()).hexdigest()


def test_the_hash_is_of_what_was_read_though_the_file_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is overwritten in place after it was read changes neither the tensors nor their hash."""
    written = write_tensors(tmp_path / "a", WEIGHTS)
    back = read_tensors(tmp_path / "a")
    with (tmp_path / "a").open("r+b") as file:
        file.seek(-60, os.SEEK_END)
        file.write(b"\xff" * 60)
    assert torch.equal(back.tensors["W_dec"], WEIGHTS["W_dec"])
    assert back.hash == written != read_tensors(tmp_path / "a").hash


def test_a_tensor_that_shares_memory_or_is_strided_is_written_as_it_looks(tmp_path: Path) -> None:
    one = torch.randn(4)
    tensors = {"a": one, "b": one, "expanded": torch.ones(()).expand(3), "part": torch.randn(4, 4)[:, 1]}
    write_tensors(tmp_path / "a", tensors)
    for name, tensor in read_tensors(tmp_path / "a").tensors.items():
        assert torch.equal(tensor, tensors[name])


def test_a_full_disk_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    """As /dev/full does it; RLIMIT_FSIZE would do for all the process."""

    class Full(Tensor):
        def detach(self) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_tensors(tmp_path / "a", {"a": torch.ones(3).as_subclass(Full)})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- damage


def test_every_cut_is_refused_or_is_no_safetensors_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", WEIGHTS, {"a": "b"})
    data = (tmp_path / "a").read_bytes()
    for keep in range(len(data)):
        (tmp_path / "a").write_bytes(data[:keep])
        with pytest.raises(BadFile):
            read_tensors(tmp_path / "a")
    (tmp_path / "a").write_bytes(data + b"\0")
    with pytest.raises(BadFile, match="after its last tensor"):
        read_tensors(tmp_path / "a")


def test_every_flipped_bit_is_refused_or_changes_the_hash(tmp_path: Path) -> None:
    written = write_tensors(tmp_path / "a", WEIGHTS, {"a": "b"})
    data = (tmp_path / "a").read_bytes()
    rng = random.Random(0)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        (tmp_path / "a").write_bytes(flipped)
        with suppress(BadFile):
            assert read_tensors(tmp_path / "a").hash != written


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        [],
        "text",
        {"a": 1},
        {"a": {}},
        entry(dtype="F31"),
        entry(dtype=["F32"]),
        entry(shape=[3]),
        entry(shape=[-2]),
        entry(shape=[2**40, 2**40]),
        entry(shape=[10**40]),
        entry(shape="2"),
        entry(shape=[2.0]),
        entry(shape=[1] * 1000),
        entry(shape=[0, 2**59, 2**59], data_offsets=[0, 0]),
        entry(data_offsets=[0, 8, 8]),
        entry(data_offsets=[0]),
        entry(data_offsets=[4, 12]),
        entry(data_offsets=[8, 0]),
        {**entry(), "b": entry()["a"]},
        {**entry(), "__metadata__": {"xxh3_128": 1}},
        {**entry(), "__metadata__": []},
    ],
    ids=str,
)
def test_a_header_that_a_stranger_made_up_is_refused(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(BadFile):
        read_tensors(tmp_path / "a")


def test_a_header_of_any_length_takes_no_memory(tmp_path: Path) -> None:
    for length in (2**63, 2**40, 100):
        (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(BadFile, match="not a safetensors file"):
            read_tensors(tmp_path / "a")
    (tmp_path / "a").write_bytes((2**30).to_bytes(8, "little"))
    os.truncate(tmp_path / "a", 2**31)
    with pytest.raises(BadFile, match="not a safetensors file"):
        read_tensors(tmp_path / "a")


def test_what_is_not_a_regular_file_of_bounded_size_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 43)
    for name, why in {"pipe": "regular", "zero": "regular", ".": "regular", "huge": "memory"}.items():
        with pytest.raises(BadFile, match=why):
            read_tensors(tmp_path / name)
