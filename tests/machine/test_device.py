"""What is chosen for the CPU that an LM runs on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from routesae.machine.device import free_memory, pick_device
from routesae.reporting import WrongInput

# Tensors of 12 and 24 MB, as a block's activations, made and freed: the page faults of the last five times.
FORWARD_PASSES = """
import resource, sys
import torch
from routesae.machine.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for step in range(15):
    tensors = [torch.full((3_000_000,), 1.0) for _ in range(4)] + [torch.ones(6_000_000)]
    del tensors
    if step == 9:  # by then the heap has the room it needs
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told anything")
def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FORWARD_PASSES, how]
        # glibc moves its own threshold by what it happens to see freed first; this holds it still
        environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072", "THP_MEM_ALLOC_ENABLE": "0"}
        ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(ended.stdout)

    given_back = faults("given back")
    assert given_back > 5 * 12_000_000 // 4096  # a tensor of them each time, or more
    assert faults("kept") < given_back // 10


@pytest.mark.parametrize(
    ("asked", "rank", "picked"),
    [
        ("auto", None, "cuda"),
        ("cuda", None, "cuda"),
        ("auto", "1", "cuda:1"),
        ("cuda", "0", "cuda:0"),
        ("cuda:0", "1", "cuda:0"),  # a number given is meant
        ("cpu", "1", "cpu"),
    ],
)
def test_each_process_of_torchrun_has_a_gpu_of_its_own(
    asked: str, rank: str | None, picked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(pick_device(asked)) == picked


def test_more_processes_than_gpus_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(WrongInput, match=r"cuda:2 is not here: the last CUDA device is cuda:1; start fewer proc"):
        pick_device("auto")


def test_torchrun_on_cpus_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(pick_device("auto")) == "cpu"


def test_a_gpus_free_memory_counts_what_this_process_keeps_and_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (5, 80)), ("memory_reserved", 30), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda:0")) == 5 + 30 - 10
    assert free_memory(torch.device("cpu")) is None
