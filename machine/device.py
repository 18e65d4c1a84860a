"""Which device, which precision an LM runs in on it, torch's name of a cache's number type, the CPU's allocator."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from routesae.reporting import WrongInput

CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.float16}  # in memory
LM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT_BYTES, _MAPPED_BYTES = 1 << 29, 1 << 25  # the second is the most that glibc takes


def pick_device(device: str) -> torch.device:
    """auto: CUDA where there is one. Under torchrun CUDA without a number is the GPU of this process's LOCAL_RANK.

    Raises WrongInput for a device that is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    remedy = "use --device cpu or auto"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        remedy = "start fewer processes (--nproc-per-node), or give the --device that all are to share"
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise WrongInput(f"device {device!r} is none of auto, cpu, cuda, cuda:0 …") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise WrongInput(f"device {device} asked for, but {_cuda_here()}; {remedy}")
    if picked.type not in ("cpu", "cuda"):
        raise WrongInput(f"device {device!r} is none of auto, cpu, cuda, cuda:0 …")
    return picked


def _cuda_here() -> str:
    count = torch.cuda.device_count()
    return f"the last CUDA device is cuda:{count - 1}" if count else "no CUDA device is to be found"


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles; without them it is slower than float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def pick_lm_dtype(lm_dtype: str, device: torch.device, tiles: bool = False) -> str:
    """auto: bfloat16 on CUDA and on a CPU with `tiles`, float32 on another, where bfloat16 is many times slower."""
    if lm_dtype == "auto":
        return "bfloat16" if device.type == "cuda" or tiles else "float32"
    if lm_dtype not in LM_DTYPES:
        raise WrongInput(f"LM dtype {lm_dtype!r} is none of auto, {', '.join(LM_DTYPES)}")
    return lm_dtype


def keep_freed_memory() -> None:
    """Have this process keep half a GB of what it frees, where its C library is glibc; elsewhere nothing happens.

    glibc otherwise gives a forward pass's activations back to the kernel, which zeroes them for the next: by what
    it happened to see freed first, 27 to 126 page faults a token and 3 to 12 % of all CPU time (SmolLM2-135M, 8 rows
    of 256 tokens a batch). With this, one.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
