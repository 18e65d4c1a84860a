"""Processes that train together: a batch divided among them in; numbers and gradients of the whole batch out.

    torchrun --nproc-per-node=4 -m routesae train …

Every rank holds the same weights and reads its own rows of each batch. Within `Ranks.one_batch` a mean over a rank's
rows becomes the mean over those of all ranks, so that each number of an objective is the whole batch's, and its
gradient this rank's part of the gradient. `Ranks.sum_gradients` adds the parts up. So the ranks take the step that
one process would take, up to the order of its sums. Where there is one process, nothing here changes a bit.

The process group is PyTorch's: NCCL for what lies on GPUs, gloo for what lies in host memory.

Dimension letters: M values of a rank's pairs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from routesae.machine.device import pick_device
from routesae.reporting import FailedRun, Stopped, WrongInput

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets for each process
PATIENCE = timedelta(days=1)  # rank 0 may check a whole cache or write for long; who dies is noticed at once
SMALL_NUMBERS = 1 << 16  # gradients of fewer are sent as one, since each message costs about the same
_SAID = 16  # added to an exit code by rank 0, whose message stands for all


class _Batch(NamedTuple):
    """A batch in work. own, whole: its tokens on this rank and on all of them, those that several ranks have counted
    for each."""

    own: int
    whole: int


_batch: ContextVar[_Batch | None] = ContextVar("batch", default=None)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, of which this is number `rank` of `world`. Rank 0 alone writes and reports."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @contextmanager
    def one_batch(self, own: int, whole: int) -> Iterator[None]:
        """While open, `batch_mean` and the like see the batch of which this rank has `own` of `whole` tokens."""
        token = _batch.set(_Batch(own, whole) if self.world > 1 else None)
        try:
            yield
        finally:
            _batch.reset(token)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes the sum over the ranks, bit for bit the same on each."""
        if self.world == 1:
            return
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        large = [grad for grad in grads if grad.numel() >= SMALL_NUMBERS]
        small = [grad for grad in grads if grad.numel() < SMALL_NUMBERS]
        with _named_loss():
            under_way = [dist.all_reduce(grad, async_op=True) for grad in large]
            if small:
                joined = torch.cat([grad.flatten() for grad in small])
                dist.all_reduce(joined)
                totals = torch.split_with_sizes(joined, [grad.numel() for grad in small])
                for grad, total in zip(small, totals, strict=True):
                    grad.copy_(total.view_as(grad))
            for work in under_way:
                assert work is not None
                work.wait()

    def share(self, tensors: Sequence[Tensor]) -> None:
        """The tensors of rank 0, in place, on every rank."""
        if self.world > 1:
            with _named_loss():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def told(self, numbers: Sequence[float]) -> list[float]:
        """Rank 0's numbers, as many as each rank gives."""
        values = torch.tensor(numbers, dtype=torch.float64)
        self.share([values])
        return values.tolist() if self.world > 1 else list(numbers)

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers. Waits for the other processes, not for their GPUs."""
        if self.world == 1:
            return number
        value = torch.tensor(number)
        _reduce(value, dist.ReduceOp.MAX)
        return int(value)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Where one rank fails inside, all end, with its exit code; inside, ranks must not wait for each other."""
        try:
            yield
        except (WrongInput, FailedRun, OSError) as failure:
            code = 2 if isinstance(failure, WrongInput) else 1
            if self.largest(code + _SAID * self.first) > _SAID and not self.first:
                raise Stopped("", code) from failure  # most likely for the same reason, which rank 0 says
            raise
        if agreed := self.largest(0):
            raise Stopped("", agreed % _SAID)  # the rank that failed says why

    def device(self, asked: str) -> torch.device:
        """This rank's device: a GPU each. Raises WrongInput where there are too few."""
        if self.world > 1 and asked.startswith("cuda:"):
            raise WrongInput(f"--device {asked} is one GPU for {self.world} processes; give --device cuda")
        return pick_device(asked)


ALONE = Ranks()


@contextmanager
def joined_ranks(*, group: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone, and until the end their process group.

    group: have one also where this process is alone, as sharding needs.
    Raises FailedRun where the other processes cannot be reached.
    """
    launched = all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1
    if not launched and not group:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if launched:
        with _named_loss():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            dist.init_process_group(backend, timeout=PATIENCE)
        ranks = Ranks(dist.get_rank(), dist.get_world_size())
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        ranks = ALONE
    if not ranks.first:  # rank 0 says what there is to say
        logging.getLogger("routesae").setLevel(logging.WARNING)
    try:
        yield ranks
    except BaseException:
        if not torch.cuda.is_available():  # NCCL would wait for what a failed run left under way; the end of the
            dist.destroy_process_group()  # process, which follows, does not
        raise
    dist.destroy_process_group()


@contextmanager
def _named_loss() -> Iterator[None]:
    """Of another rank: PyTorch raises RuntimeError, with a message about sockets."""
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise FailedRun(
            f"another process of this run is gone or cannot be reached ({reason}); the same with --resume goes on"
        ) from error


def _reduce(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
    with _named_loss():
        dist.all_reduce(tensor, how)
    return tensor


# ----------------------------------------------------- of parameters that are divided (routesae.train.ranks.sharding)


def is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank, each of which must ask."""
    if not is_divided(tensor):
        return tensor
    divided = cast("DTensor", tensor)
    # Gathered where the ranks exchange their rows, though what they hold may lie in host memory.
    gathered: Tensor = cast("DTensor", divided.to(divided.device_mesh.device_type)).full_tensor()
    return gathered


def own_rows(tensor: Tensor) -> Tensor:
    """What this rank holds of it, in the same memory."""
    return cast("DTensor", tensor).to_local() if is_divided(tensor) else tensor


# --------------------------------------------------------------------------- of the batch that is divided, if one is


class _BatchMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, share: float) -> Tensor:
        ctx.share = share
        return _reduce(mean * share)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.share, None


def batch_mean(mean: Tensor) -> Tensor:
    """Of means over this rank's rows, those over all rows of the batch. The gradient is this rank's part of it."""
    batch = _batch.get()
    if batch is None:
        return mean
    return _BatchMean.apply(mean, batch.own / batch.whole)  # type: ignore[no-any-return, no-untyped-call]


def batch_rows(rows: int) -> int:
    """How many rows all ranks have where this one has `rows`, as many for every token."""
    batch = _batch.get()
    return rows if batch is None else rows * batch.whole // batch.own


def batch_sum(counts: Tensor) -> Tensor:
    """The sum over the ranks; no gradient."""
    return counts if _batch.get() is None else _reduce(counts.clone())


def batch_least(values: Tensor) -> Tensor:
    """The least over the ranks, number by number; no gradient."""
    return values if _batch.get() is None else _reduce(values.clone(), dist.ReduceOp.MIN)


def batch_kth_largest(values_M: Tensor, k: int) -> Tensor:
    """The k-th largest of the positive values of all ranks, which have at least k.

    Read digit by digit from the top, as in a radix sort, so that ranks exchange counts of digits and not the values.
    """
    if _batch.get() is None:
        return torch.kthvalue(-values_M, k).values.neg()
    assert values_M.dtype == torch.float32
    keys_M = values_M.view(torch.int32)  # as integers, positive numbers keep their order
    found, left = 0, k
    for shift, digits in ((20, 2048), (10, 1024), (0, 1024)):
        rest_M = keys_M >> shift
        alike_M = rest_M[rest_M.div(digits, rounding_mode="floor") == found] % digits
        at_least = batch_sum(torch.bincount(alike_M, minlength=digits)).flip(0).cumsum(0).tolist()
        above = next(i for i, count in enumerate(at_least) if count >= left)
        left -= at_least[above - 1] if above else 0
        found = found * digits + digits - 1 - above
    return torch.tensor(found, dtype=torch.int32, device=values_M.device).view(torch.float32)
