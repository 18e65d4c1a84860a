"""Keep the best few activations of every latent, with their windows, in memory that does not grow with what is read.

    of each latent                    the n with the highest score: its strongest, or a uniform sample if the score is
                                      a hash
    of each token class of a latent   the same, for latents of at most `max_classes` classes; of the others nothing
                                      is kept (the published code's `get_context`, 2503.08200)

Equal scores go by the lower position, then the lower layer, so that what is kept does not depend on how the
activations were batched.

Dimension letters: F latents, M activations, W tokens a window, P positions of a shard.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from routesae.analyze.contexts.windows import Positions

PENDING = 1 << 18  # activations gathered before they are merged: a sort costs as much for few as for many
LOOKED_UP = 1 << 16  # windows whose activations are looked up at a time
LAYER_BITS = 12  # more than any model has layers; 51 are left for positions
NO_WINDOW = -1


class Activations(NamedTuple):
    """M latents that are active, each on one token: all [M].

    position_M: flat, in the cache's tokens. layer_M: index into the SAE's layers that it was read from, or 0 if not
    from one. class_M: number of the token's class. value_M: float32 > 0. score_M: float or int64, what they are kept
    by, higher is better. window_M: number of the window that `Best` holds of it, or NO_WINDOW.
    """

    latent_M: Tensor
    position_M: Tensor
    layer_M: Tensor
    class_M: Tensor
    value_M: Tensor
    score_M: Tensor
    window_M: Tensor

    def where(self, chosen_M: Tensor | slice) -> Self:
        """Those chosen by a mask or by indices."""
        return type(self)(*(column_M[chosen_M] for column_M in self))


class Kept(NamedTuple):
    """Activations on the CPU with their windows.

    first_M, after_M: flat positions of each window. activations_MW: the latent's activation on each of its tokens, 0
    behind its end. kind_M: index into routesae.analyze.contexts.file.KINDS.
    """

    of: Activations
    first_M: Tensor
    after_M: Tensor
    activations_MW: Tensor
    kind_M: Tensor

    def where(self, chosen_M: Tensor | slice) -> Self:
        return type(self)(self.of.where(chosen_M), *(column[chosen_M] for column in self[1:]))


LookUp = Callable[[Activations, Tensor, Tensor], Tensor]  # (of, position_MW, inside_MW) -> activations_MW


class Best:
    """The activations with the highest score, at most `each` a latent or, given max_classes, a token class of one.

    At most latents × each are held, or latents × max_classes × each; between merges PENDING more and a batch. Each
    gets its window at the end of its shard.
    """

    def __init__(self, *, latents: int, each: int, max_classes: int | None, window: int, device: torch.device):
        self.each, self.max_classes, self.window = each, max_classes, window
        self.overfull_F = torch.zeros(latents, dtype=torch.bool, device=device)
        self._floor_F: Tensor | None = None  # the score below which a latent takes no more
        self._parts: list[Activations] = []  # what is held, merged, and what was added since
        self._waiting = 0
        self._first_M = self._after_M = torch.empty(0, dtype=torch.int64)
        self._activations_MW = torch.empty(0, window)

    def add(self, found: Activations) -> None:
        """Consider them."""
        if self.max_classes is not None:
            chosen_M = ~self.overfull_F[found.latent_M]
        elif self._floor_F is not None:
            chosen_M = found.score_M >= self._floor_F[found.latent_M]
        else:
            chosen_M = torch.ones_like(found.latent_M, dtype=torch.bool)
        self._parts.append(found.where(torch.nonzero(chosen_M).squeeze(1)))
        self._waiting += len(self._parts[-1].latent_M)
        if self._waiting > PENDING:
            self.merge()

    def merge(self) -> Activations:
        """What is held, ordered by latent, class (given max_classes), falling score, position, layer."""
        if len(self._parts) > 1 or self._waiting:
            together = joined(self._parts)
            group_M = self._groups(together)
            self._parts, self._waiting = [self._cut(together.where(ranking(together, group_M)))], 0
        return self._parts[0]

    def end_shard(self, windows: tuple[Positions, Positions], base: int, look_up: LookUp) -> None:
        """Give what is held of the shard its windows. windows: first_P and after_P, counted from `base`."""
        held = self.merge()
        window_M = held.window_M.cpu()
        old_M = window_M != NO_WINDOW
        first_M, after_M = torch.empty_like(window_M), torch.empty_like(window_M)
        activations_MW = torch.empty(len(window_M), self.window)
        for new, old in ((first_M, self._first_M), (after_M, self._after_M), (activations_MW, self._activations_MW)):
            new[old_M] = old[window_M[old_M]]
        device = held.window_M.device
        for new_m in torch.nonzero(~old_M).squeeze(1).split(LOOKED_UP):  # type: ignore[no-untyped-call]
            of = held.where(new_m.to(device))
            at_m = (of.position_M - base).cpu().numpy()
            first_M[new_m] = torch.from_numpy(windows[0][at_m]) + base
            after_M[new_m] = torch.from_numpy(windows[1][at_m]) + base
            position_mW = first_M[new_m][:, None] + torch.arange(self.window)
            inside_mW = position_mW < after_M[new_m][:, None]
            activations_MW[new_m] = look_up(of, position_mW.to(device), inside_mW.to(device)).cpu()
        self._first_M, self._after_M, self._activations_MW = first_M, after_M, activations_MW
        self._parts = [held._replace(window_M=torch.arange(len(window_M), device=device))]

    def result(self) -> Kept:
        """What is held after the last shard, in the order of `merge`."""
        of = Activations(*(column_M.cpu() for column_M in self.merge()))
        kind_M = torch.zeros_like(of.latent_M)
        return Kept(of, self._first_M, self._after_M, self._activations_MW, kind_M)

    def _groups(self, of: Activations) -> Tensor:
        """[M]: equal where activations compete."""
        return of.latent_M if self.max_classes is None else (of.latent_M << 32) | of.class_M

    def _cut(self, ordered: Activations) -> Activations:
        rank_M = rank_within(self._groups(ordered))
        if self.max_classes is None:
            last_M = rank_M == self.each - 1
            score_M = ordered.score_M
            lowest = (torch.finfo if score_M.is_floating_point() else torch.iinfo)(score_M.dtype).min
            floor_F = torch.full_like(self.overfull_F, lowest, dtype=score_M.dtype)
            self._floor_F = floor_F.index_copy(0, ordered.latent_M[last_M], score_M[last_M])
            return ordered.where(rank_M < self.each)
        classes_F = torch.bincount(ordered.latent_M[rank_M == 0], minlength=len(self.overfull_F))
        self.overfull_F |= classes_F > self.max_classes
        return ordered.where((rank_M < self.each) & ~self.overfull_F[ordered.latent_M])


def joined(parts: Iterable[Activations]) -> Activations:
    return Activations(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def ranking(of: Activations, group_M: Tensor) -> Tensor:
    """Indices [M] that order by group, falling score, position, layer."""
    order_M = torch.argsort((of.position_M << LAYER_BITS) | of.layer_M)
    order_M = order_M[torch.argsort(of.score_M[order_M], stable=True, descending=True)]
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
