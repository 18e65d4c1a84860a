"""Processes that train one run together: each reads its part of every batch, and all take the same step.

    torchrun --nproc-per-node=4 -m routesae train …

Every rank holds the same weights. Within `Ranks.one_batch` a mean over a rank's rows becomes the mean over the rows
of all ranks, so every number of an objective is the whole batch's and its gradient is this rank's part of the
gradient; `Ranks.sum_gradients` adds the parts up. The ranks therefore take the step one process would take, up to the
order of its sums. With one process nothing here changes a bit.

The process group is PyTorch's: NCCL for GPU tensors, gloo for tensors in host memory.

With --shard an SAE too large for one GPU is divided among the ranks by rows: PyTorch's FSDP2 (`fully_shard`,
2304.11277) gathers the parameters for a forward pass, and after a backward pass each rank keeps its rows of the
summed gradients. A decoder's rows are latents, so row-wise work (unit norm, projecting the gradient) needs no other
rank. Between steps a rank holds 1/world of parameters, gradients and Adam's moments; during a step it also holds
the gathered parameters and their gradients, half of what an undivided run holds. With --cpu-offload what is kept
between steps stays in host memory, pinned if there is a GPU, and Adam runs on the CPU.

Dimension letters: M values of a rank's pairs.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from routesae.machine.device import pick_device
from routesae.reporting import FailedRun, Stopped, WrongInput

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets for each process
PATIENCE = timedelta(days=1)  # on the CPU: rank 0 may verify a whole cache first; a rank that dies is noticed at once
GPU_PATIENCE = timedelta(minutes=10)  # ranks agree on the CPU before each step: on the GPU none is waited for long
SMALL_NUMBERS = 1 << 16  # smaller gradients are sent as one message, since every message costs about the same
KEYS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of floats, by their bytes
_REPORTED = 16  # added to an exit code by rank 0, whose message stands for all

# Tokens of the current batch on this rank and on all ranks; tokens that several ranks read count for each.
_batch: ContextVar[tuple[int, int] | None] = ContextVar("batch", default=None)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; this one is number `rank` of `world`. Only rank 0 writes and reports."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def one_batch(self, local: int, total: int) -> Iterator[None]:
        """While open, `batch_mean` and the like work on a batch of which this rank has `local` of `total` tokens."""
        token = _batch.set((local, total) if self.world > 1 else None)
        try:
            yield
        finally:
            _batch.reset(token)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks, bit for bit the same on each."""
        if self.world == 1:
            return
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        small = [grad for grad in grads if grad.numel() < SMALL_NUMBERS]
        with _peer_errors():
            pending = [dist.all_reduce(grad, async_op=True) for grad in grads if grad.numel() >= SMALL_NUMBERS]
            if small:
                joined = torch.cat([grad.flatten() for grad in small])
                dist.all_reduce(joined)
                totals = torch.split_with_sizes(joined, [grad.numel() for grad in small])
                for grad, total in zip(small, totals, strict=True):
                    grad.copy_(total.view_as(grad))
            for work in pending:
                assert work is not None
                work.wait()

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with rank 0's, on every rank."""
        if self.world > 1:
            with _peer_errors():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        """Return rank 0's numbers on every rank; each rank passes equally many."""
        values = torch.tensor(numbers, dtype=torch.float64)
        self.share([values])
        return values.tolist() if self.world > 1 else list(numbers)

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers. Waits for the other processes, not for their GPUs."""
        return number if self.world == 1 else int(_reduce(torch.tensor(number), dist.ReduceOp.MAX))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """If one rank fails inside, end all of them with its exit code. Ranks must not wait for each other inside."""
        try:
            yield
        except (WrongInput, FailedRun, OSError) as failure:
            code = 2 if isinstance(failure, WrongInput) else 1
            if self.largest(code + _REPORTED * self.first) > _REPORTED and not self.first:
                raise Stopped("", code) from failure  # most likely for the same reason, which rank 0 reports
            raise
        if agreed := self.largest(0):
            raise Stopped("", agreed % _REPORTED)  # the rank that failed reports why

    def device(self, requested: str) -> torch.device:
        """This rank's device, a GPU each. Raises WrongInput if there are too few GPUs."""
        if self.world > 1 and requested.startswith("cuda:"):
            raise WrongInput(f"--device {requested} is one GPU for {self.world} processes; give --device cuda")
        return pick_device(requested)


ALONE = Ranks()


@contextmanager
def joined_ranks(device: str, *, dividing: bool = False) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or be the only one; leave the process group at the end.

    device: as it is asked for. dividing: make a process group for a lone process too, as sharding needs one.
    Raises WrongInput if torch is too old to divide an SAE, FailedRun if the other processes cannot be reached.
    """
    if dividing:
        from torch.distributed.fsdp import FSDPModule

        if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):  # pytorch/pytorch#155915, of June 2025
            raise WrongInput(f"--shard and --cpu-offload need a later torch than {torch.__version__}; upgrade it")
    launched = all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1
    if not launched and not dividing:
        yield ALONE
        return
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else ALONE
    picked = torch.device("cpu")
    with suppress(WrongInput):  # raised again where all ranks pick theirs, and end together
        picked = ranks.device(device)
    options: dict[str, Any] = {"backend": "gloo", "timeout": PATIENCE}
    if cuda := picked.type == "cuda":
        gpu = torch.device("cuda", picked.index or 0)
        torch.cuda.set_device(gpu)  # before anything is on a GPU, or every rank has a context on the first one too
        options = {"backend": "cpu:gloo,cuda:nccl", "timeout": GPU_PATIENCE, "device_id": gpu}
    if not launched:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    with _peer_errors():
        dist.init_process_group(**options)
        if cuda:
            cast("Any", dist.group.WORLD)._get_backend(torch.device("cpu"))._set_default_timeout(PATIENCE)
    if not ranks.first:
        logging.getLogger("routesae").setLevel(logging.WARNING)  # rank 0 logs for all
    try:
        yield ranks
    except BaseException:
        if not cuda:  # NCCL would wait for what the failed run left pending; the process is about to end anyway
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Raises FailedRun for PyTorch's errors when another rank is gone, WrongInput for NCCL's about a shared GPU."""
    try:
        yield
    except RuntimeError as error:
        if "Duplicate GPU" in str(error):
            raise WrongInput("two processes share a GPU; start fewer (--nproc-per-node)") from error
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise FailedRun(
            f"another process of this run is gone or cannot be reached ({reason}); add --resume to continue the run"
        ) from error


def _reduce(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
    with _peer_errors():
        dist.all_reduce(tensor, how)
    return tensor


# ----------------------------------------------------------------------------- parameters divided among the ranks


def is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Gather all of a tensor on every rank; every rank must call it."""
    if not is_divided(tensor):
        return tensor
    # Gathered on the device where the ranks exchange rows, even if the rows are kept in host memory.
    return cast("DTensor", tensor.to(tensor.device_mesh.device_type)).full_tensor()


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds, in the same memory."""
    return tensor.to_local() if is_divided(tensor) else tensor


def shard(sae: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Divide the SAE in place. Every rank must pass the same weights, whole and on `device`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    # It warns that views returned by a forward pass must not be changed in place; nothing here does that.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    divided = fully_shard(sae, mesh=mesh, offload_policy=policy)
    divided.set_gradient_divide_factor(1.0)  # each rank's gradient is its part of the sum already
    divided.set_force_sum_reduction_for_comms(True)


def copy_whole(into: Tensor, tensor: Tensor) -> None:
    """Copy the whole `tensor` into `into`, which may be divided."""
    if not is_divided(into):
        into.copy_(tensor)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh = into.device_mesh
    # Every rank has all of it, so each takes its own rows instead of waiting for rank 0 to send them.
    held = distribute_tensor(tensor.to(mesh.device_type), mesh, into.placements, src_data_rank=None)
    into.to_local().copy_(held.to_local())


# ----------------------------------------------------------------------------------- the batch, if ranks divide it


class _BatchMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, share: float) -> Tensor:
        ctx.share = share
        return _reduce(mean * share)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.share, None


def batch_mean(mean: Tensor) -> Tensor:
    """Turn means over this rank's rows into means over the whole batch; the gradient is this rank's part of it."""
    batch = _batch.get()
    if batch is None:
        return mean
    return _BatchMean.apply(mean, batch[0] / batch[1])  # type: ignore[no-any-return, no-untyped-call]


def batch_rows(rows: int) -> int:
    """How many rows all ranks have if this one has `rows`, as many for every token."""
    batch = _batch.get()
    return rows if batch is None else rows * batch[1] // batch[0]


def batch_sum(counts: Tensor) -> Tensor:
    """The sum over the ranks; no gradient."""
    return counts if _batch.get() is None else _reduce(counts.clone())


def batch_least(values: Tensor) -> Tensor:
    """The elementwise minimum over the ranks; no gradient."""
    return values if _batch.get() is None else _reduce(values.clone(), dist.ReduceOp.MIN)


def batch_kth_largest(values_M: Tensor, k: int) -> Tensor:
    """The k-th largest of the values of all ranks, which is to be above 0; 0 between ranks if it is not. No gradient.

    Ranks find it bit by bit from the top, and so exchange counts rather than values. Nobody waits for a device.
    """
    # As integers positive floats keep their order, and are sorted faster.
    keys_M = values_M.flatten().view(KEYS[values_M.element_size()]).sort().values
    if _batch.get() is None:
        return keys_M[-k].view(values_M.dtype)
    found = keys_M.new_zeros(1)
    for bit in reversed(range(8 * values_M.element_size() - 1)):
        higher = found | 1 << bit
        at_least = batch_sum(len(keys_M) - torch.searchsorted(keys_M, higher))
        found = torch.where(at_least >= k, higher, found)
    return found.view(values_M.dtype)[0]
