"""An SAE that does not fit one GPU: its parameters, gradients and Adam's moments divided among the ranks by rows.

PyTorch's FSDP2 (`fully_shard`, 2304.11277) does it: a forward pass gathers the parameters, and what follows a
backward pass keeps this rank's rows of the summed gradients. The decoder's rows are latents, so that what is done to
rows (unit norm, its gradient's projection) needs no other rank. Between steps a rank holds 1/world of everything;
during one also the gathered parameters and their gradients, half of what it would hold without.

With `offload` what is kept between steps lies in host memory, pinned where there is a GPU, and Adam runs on the CPU.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from routesae.train.ranks.distributed import is_divided, own_rows
from routesae.train.saes import SAE

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(sae: SAE, device: torch.device, *, offload: bool) -> None:
    """Divide the SAE, in place. Every rank gives the same weights, on `device` all of them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    # Of views among what a forward pass returns, which must not be changed in place; nothing here does.
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
    """Give `into`, divided or not, the values of the whole `tensor`."""
    if not is_divided(into):
        into.copy_(tensor)
        return
    from torch.distributed.tensor import distribute_tensor

    like = cast("DTensor", into)
    # Each rank has all of it, so it takes its rows instead of waiting for rank 0 to send them.
    mesh = like.device_mesh
    held = distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    own_rows(into).copy_(held.to_local())
