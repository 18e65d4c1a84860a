"""What is chosen for the CPU that an LM runs on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Tensors of 12 and 24 MB, as a block's activations, made and freed: the page faults of the last twenty times.
FORWARD_PASSES = """
import resource, sys
import torch
from routesae.harvest.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for step in range(30):
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
    assert given_back > 20 * 12_000_000 // 4096  # a tensor of them each time, or more
    assert faults("kept") < given_back // 10
