"""Which device, which precision an LM runs in on it, and torch's name of a cache's number type."""

from __future__ import annotations

import torch

from routesae.reporting import WrongInput

CACHE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
LM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device: str) -> torch.device:
    """auto: CUDA where there is one. Raises WrongInput for a device that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise WrongInput(f"device {device!r} is none of auto, cpu, cuda, cuda:0 …") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise WrongInput(f"device {device} asked for, but {_cuda_here()}; use --device cpu or auto")
    if picked.type not in ("cpu", "cuda"):
        raise WrongInput(f"device {device!r} is none of auto, cpu, cuda, cuda:0 …")
    return picked


def _cuda_here() -> str:
    count = torch.cuda.device_count()
    return f"the last CUDA device is cuda:{count - 1}" if count else "no CUDA device is to be found"


def pick_lm_dtype(lm_dtype: str, device: torch.device) -> str:
    """auto: bfloat16 on CUDA, float32 on a CPU, where bfloat16 is many times slower."""
    if lm_dtype == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    if lm_dtype not in LM_DTYPES:
        raise WrongInput(f"LM dtype {lm_dtype!r} is none of auto, {', '.join(LM_DTYPES)}")
    return lm_dtype
