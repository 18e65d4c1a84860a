"""Activations batch by batch in; the best few of every latent out, in memory that does not grow with what went by.

    of each latent                    the n of the highest score: its strongest, or a uniform sample where the score
                                      is a hash
    of each token class of a latent   the same, for latents of at most `max_classes` classes; of the others nothing
                                      is kept (the published code's `get_context`, 2503.08200)

Equal scores go by the lower position, then the lower layer, so that what is kept does not depend on how the
activations were batched.

Dimension letters: F latents, M activations, W tokens a window.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

PENDING = 1 << 18  # activations gathered before they are merged: a sort costs as much for few as for many
LAYER_BITS = 12  # more than any model has layers; 51 are left for positions
NO_WINDOW = -1


class Activations(NamedTuple):
    """M latents that are active, each on one token: all [M].

    position_M: flat, in the cache's tokens. layer_M: index into the SAE's layers that it was read from; 0 where it
    was not one. class_M: number of the token's class. value_M: float32 > 0.
    """

    latent_M: Tensor
    position_M: Tensor
    layer_M: Tensor
    class_M: Tensor
    value_M: Tensor

    def where(self, chosen_M: Tensor) -> Self:
        """Those chosen by a mask or by indices."""
        return type(self)(*(column_M[chosen_M] for column_M in self))


class Held(NamedTuple):
    """What is kept: activations, the scores they are kept by, and where their windows stand (NO_WINDOW: nowhere)."""

    of: Activations
    score_M: Tensor
    slot_M: Tensor

    def where(self, chosen_M: Tensor) -> Self:
        return type(self)(self.of.where(chosen_M), self.score_M[chosen_M], self.slot_M[chosen_M])


class Best:
    """The activations of the highest score, at most `each` a latent, or a token class of one.

    At most latents × each are held, or latents × max_classes × each; between merges PENDING more and a batch.
    """

    def __init__(self, *, latents: int, each: int, max_classes: int | None, device: torch.device):
        self.each = each
        self.max_classes = max_classes
        self.overfull_F = torch.zeros(latents, dtype=torch.bool, device=device)
        self._floor_F: Tensor | None = None  # the score below which a latent takes no more
        self._held: Held | None = None
        self._pending: list[Held] = []
        self._waiting = 0

    def add(self, found: Activations, score_M: Tensor) -> None:
        """Consider them. score_M: float or int64, higher is better."""
        if self.max_classes is not None:
            wanted_M = ~self.overfull_F[found.latent_M]
        elif self._floor_F is not None:
            wanted_M = score_M >= self._floor_F[found.latent_M]
        else:
            wanted_M = torch.ones_like(score_M, dtype=torch.bool)
        chosen_M = torch.nonzero(wanted_M).squeeze(1)
        slot_M = torch.full_like(chosen_M, NO_WINDOW)
        self._pending.append(Held(found.where(chosen_M), score_M[chosen_M], slot_M))
        self._waiting += len(chosen_M)
        if self._waiting > PENDING:
            self.merge()

    def merge(self) -> Held:
        """What is held, ordered by latent, class (where there are classes), falling score, position, layer."""
        parts = ([self._held] if self._held is not None else []) + self._pending
        assert parts, "nothing was added"
        if self._pending:
            together = Held(
                Activations(*(torch.cat(columns) for columns in zip(*(part.of for part in parts), strict=True))),
                torch.cat([part.score_M for part in parts]),
                torch.cat([part.slot_M for part in parts]),
            )
            self._held = self._cut(together.where(ranking(together.of, together.score_M, self._groups(together.of))))
            self._pending, self._waiting = [], 0
        assert self._held is not None
        return self._held

    def settle(self) -> None:
        """Number the windows of what is held in its order: the caller has put them into that order."""
        held = self.merge()
        self._held = held._replace(slot_M=torch.arange(len(held.slot_M), device=held.slot_M.device))

    def _groups(self, of: Activations) -> Tensor:
        """[M]: equal where activations compete."""
        if self.max_classes is None:
            return of.latent_M
        return (of.latent_M << 32) | of.class_M

    def _cut(self, ordered: Held) -> Held:
        group_M = self._groups(ordered.of)
        rank_M = rank_within(group_M)
        if self.max_classes is None:
            last_M = rank_M == self.each - 1
            full_M = ordered.of.latent_M[last_M]
            lowest = torch.finfo if ordered.score_M.is_floating_point() else torch.iinfo
            floor_F = torch.full_like(self.overfull_F, lowest(ordered.score_M.dtype).min, dtype=ordered.score_M.dtype)
            self._floor_F = floor_F.index_copy(0, full_M, ordered.score_M[last_M])
            return ordered.where(rank_M < self.each)
        classes_F = torch.bincount(ordered.of.latent_M[rank_M == 0], minlength=len(self.overfull_F))
        self.overfull_F |= classes_F > self.max_classes
        return ordered.where((rank_M < self.each) & ~self.overfull_F[ordered.of.latent_M])


def ranking(of: Activations, score_M: Tensor, group_M: Tensor) -> Tensor:
    """Indices [M] that order by group, falling score, position, layer."""
    order_M = torch.argsort((of.position_M << LAYER_BITS) | of.layer_M)
    order_M = order_M[torch.argsort(score_M[order_M], stable=True, descending=True)]
    return order_M[torch.argsort(group_M[order_M], stable=True)]


def rank_within(group_M: Tensor) -> Tensor:
    """[M]: 0, 1, 2 … within each run of equal groups."""
    _, counts = torch.unique_consecutive(group_M, return_counts=True)
    firsts = torch.cumsum(counts, 0) - counts
    return torch.arange(len(group_M), device=group_M.device) - torch.repeat_interleave(firsts, counts)


def hashed(of: Activations, latents: int, layers: int, seed: int) -> Tensor:
    """int64 [M] ≥ 0: a number as good as random for each, fixed by what it is and the seed (splitmix64)."""
    x_M = (of.position_M * layers + of.layer_M) * latents + of.latent_M
    x_M = x_M + _signed((seed + 1) * 0x9E3779B97F4A7C15)
    x_M = (x_M ^ _shifted(x_M, 30)) * _signed(0xBF58476D1CE4E5B9)
    x_M = (x_M ^ _shifted(x_M, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(x_M ^ _shifted(x_M, 31), 1)


def _shifted(x_M: Tensor, bits: int) -> Tensor:
    """x >> bits as if int64 had no sign."""
    return (x_M >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
