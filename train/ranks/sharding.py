"""Sharding for an SAE too large for one GPU: parameters, gradients and Adam's moments divided among ranks by rows.

PyTorch's FSDP2 (`fully_shard`, 2304.11277) does it: a forward pass gathers the parameters, and after a backward pass
each rank keeps its rows of the summed gradients. A decoder's rows are latents, so row-wise work (unit norm,
projecting the gradient) needs no other rank. Between steps a rank holds 1/world of everything; during a step it also
holds the gathered parameters and their gradients, half of what an undivided run holds.

With `offload` what is kept between steps stays in host memory, pinned if there is a GPU, and Adam runs on the CPU.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from routesae.train.ranks.distributed import is_divided, local_rows

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(sae: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Divide the SAE in place. Every rank must pass the same weights, whole and on `device`."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    # It warns that views returned by a forward pass must not be changed in place; nothing here does that.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: dict[str, Any] = {}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    fully_shard(sae, mesh=mesh, **options)
    divided = cast("FSDPModule", sae)
    divided.set_gradient_divide_factor(1.0)  # each rank's gradient is its part of the sum already
    divided.set_force_sum_reduction_for_comms(True)


def copy_whole(into: Tensor, tensor: Tensor) -> None:
    """Copy the whole `tensor` into `into`, which may be divided."""
    if not is_divided(into):
        into.copy_(tensor)
        return
    from torch.distributed.tensor import distribute_tensor

    like = cast("DTensor", into)
    mesh = like.device_mesh
    # Every rank has all of it, so each takes its own rows instead of waiting for rank 0 to send them.
    held = distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    local_rows(into).copy_(held.to_local())
