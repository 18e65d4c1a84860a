"""What this machine has: the device and precision for a model, memory and when it ran out, installed packages."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from routesae.reporting import WrongInput

CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.float16}  # in memory
LM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT_BYTES, _MAPPED_BYTES = 1 << 29, 1 << 25  # the second is the most that glibc takes


def require_packages(what: str, extra: str, *names: str, instead: str = "") -> None:
    """Raises WrongInput where a package of an extra is not installed. instead: what else the user can do."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise WrongInput(f"{what} needs {' and '.join(missing)}: pip install 'routesae[{extra}]'{instead}")


def package_folder(package: str, what: str, version: str) -> Path:
    """Where a package is, which is not imported. Raises WrongInput where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise WrongInput(f"{what} is not installed; pip install --no-deps {version}")
    return Path(spec.origin).parent


def pick_device(device: str) -> torch.device:
    """Return the device called `device`; auto is CUDA if there is any.

    Under torchrun CUDA without a number is the GPU of this process's LOCAL_RANK, or the only one that the launcher
    shows to this process (CUDA_VISIBLE_DEVICES). Raises WrongInput for a device that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    remedy = "use --device cpu or auto"
    count = torch.cuda.device_count()
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        rank, here = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 0))
        shown_alone = count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        # With fewer GPUs than processes all of them are refused: some would only wait for the others.
        device = f"cuda:{0 if shown_alone else max(rank, here - 1) if here > count else rank}"
        remedy = "start fewer processes (--nproc-per-node), or give the --device that all are to share"
    try:
        picked = torch.device(device)
    except RuntimeError:
        picked = torch.device("meta")
    if picked.type not in ("cpu", "cuda"):
        raise WrongInput(f"unknown device {device!r}; give auto, cpu, cuda, cuda:0 …")
    if picked.type == "cuda" and (picked.index or 0) >= count:
        found = f"the last CUDA device is cuda:{count - 1}" if count else "there is no CUDA device"
        raise WrongInput(f"--device {device} is not here: {found}; {remedy}")
    return picked


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that nobody uses, this process's own reserve included; None for the CPU."""
    if device.type == "cpu":
        return None
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def has_bfloat16_units(device: torch.device | str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 natively, and so faster than float32.

    CUDA does from compute capability 8 on; V100 and T4 emulate it. torch before 2.11 cannot say it of a CPU: then
    float32 it is.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))


def pick_lm_dtype(lm_dtype: str, device: torch.device, recorded: object = None) -> str:
    """Return the precision an LM runs in; auto is the recorded one, or else bfloat16 where the device multiplies it.

    Hidden states lose 1e-4 of their variance to it, a thousandth of what an SAE does, and come 2.5 times as fast.
    """
    if lm_dtype == "auto":
        native = "bfloat16" if has_bfloat16_units(device) else "float32"
        return str(recorded) if recorded in list(LM_DTYPES) else native
    if lm_dtype not in LM_DTYPES:
        raise WrongInput(f"unknown --lm-dtype {lm_dtype!r}; give auto, {' or '.join(LM_DTYPES)}")
    return lm_dtype


def keep_freed_memory() -> None:
    """Make this process keep half a GB of what it frees, if its C library is glibc.

    glibc otherwise gives a forward pass's activations back to the kernel, which zeroes them for the next. Depending
    on what it saw freed first, that cost 27 to 126 page faults a token and 3 to 12 % of all CPU time (SmolLM2-135M,
    8 rows of 256 tokens a batch). With this it is one fault.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
