"""One SAE and a cache in; every latent's best activations with their windows out, in one pass over the cache.

    rule     by the published rule: at most 2 a token class above the threshold, of latents with at most 32 classes
    top      the N strongest
    sample   a uniform sample of all activations, for an honest view of a latent beside its strongest

Shards are read one after the other. At the end of each, what is kept of it gets its window and the latent's
activation on every token of the window, looked up among the shard's activations. Held at any time: what is kept
(at most 64 + N + samples a latent, each some 60 bytes and 4 a token of the window), and one shard's activations at
12 bytes each: 768 a token for k 64.

Dimension letters: L layers, N tokens, F latents, M activations, W tokens a window, R rows: a token's reading of one
layer, P positions of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from routesae.analyze.contexts.best import NO_WINDOW, Activations, Best, hashed
from routesae.analyze.contexts.windows import Vocabulary, Windows, windows
from routesae.harvest.cache.arrays import BadArray
from routesae.harvest.cache.reader import Cache, Shard, damaged
from routesae.reporting import Progress, Report, WrongInput, silent
from routesae.train.loading.batches import BLOCK_ROWS, Batch, Block, Plan, Selection, cut_plans, load
from routesae.train.saes import SAE
from routesae.train.saes.normalise import Hidden
from routesae.train.saes.routers import places_of

LOOKED_UP = 1 << 16  # windows whose activations are looked up at a time


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is collected.

    The rule: `per_class` contexts above `threshold` a token class, of latents with at most `max_classes`. top: the N
    strongest of every latent; None: not those. sample: activations drawn of every latent.
    """

    threshold: float
    per_class: int
    max_classes: int
    top: int | None
    sample: int
    window: int
    seed: int


class Kept(NamedTuple):
    """Activations with their windows, ordered by latent, class (the rule's), falling score, position, layer.

    first_M, after_M: flat positions of each window. activations_MW: the latent's activation on each of its tokens, 0
    behind its end. All on the CPU.
    """

    of: Activations
    first_M: Tensor
    after_M: Tensor
    activations_MW: Tensor


class Collected(NamedTuple):
    """tokens: read. readings: rows the SAE saw, one a token, or one a token and layer for mlsae and random.

    active_F: rows each latent is active on. sum_F, max_F: of its activations. classes_F: token classes above the
    threshold; max_classes + 1 where there are more. one_layer: whether an activation was read from one layer.
    """

    tokens: int
    readings: int
    active_F: Tensor
    sum_F: Tensor
    max_F: Tensor
    classes_F: Tensor
    one_layer: bool
    rule: Kept
    top: Kept | None
    sample: Kept


@torch.no_grad()
def collect(
    sae: SAE, cache: Cache, vocabulary: Vocabulary, wanted: Wanted, *, batch_tokens: int, report: Report = silent
) -> Collected:
    """Read the whole cache once. Raises WrongInput where it holds no token."""
    sae.eval()
    selection = Selection(cache, 0, cache.manifest.rows, sae.recipe.layers)
    if len(selection) == 0:
        raise WrongInput(f"{cache.path} has no kept token; harvest more text")
    collector = Collector(sae, cache, vocabulary, wanted)
    shards = range(len(selection.shards))
    plans = chain.from_iterable(_shard_plans(selection, shard, batch_tokens) for shard in shards)
    done = 0
    with closing(load(selection, plans, batch_tokens, sae.device)) as batches:
        for shard in shards:
            position_n = _stored_positions(selection.shards[shard])
            for plan in _shard_plans(selection, shard, batch_tokens):
                position_N = position_n[plan[0].first : plan[-1].after]
                collector.take(next(batches), position_N)
                done += len(position_N)
                report(Progress("contexts", done, len(selection), "tokens", {}))
            collector.end_shard(selection.shards[shard].record.rows)
    return collector.result()


def _shard_plans(selection: Selection, shard: int, batch_tokens: int) -> Iterator[Plan]:
    """The batches of one shard, in stored order; none holds rows of two shards. All of its rows are selected."""
    count = selection.count(shard)
    firsts = range(0, count, BLOCK_ROWS)
    return cut_plans((Block(shard, first, min(first + BLOCK_ROWS, count)) for first in firsts), batch_tokens)


def _stored_positions(shard: Shard) -> Tensor:
    """int64 [n]: the flat position in tokens of each stored row."""
    try:
        order = shard.read("order").astype(np.int64)
    except BadArray as bad:
        raise damaged(shard.path, bad) from bad
    return torch.from_numpy(order + shard.record.rows[0] * shard.manifest.context)


LookUp = Callable[[Activations, Tensor, Tensor], Tensor]  # (of, position_MW, inside_MW) -> activations_MW


class _Windowed:
    """What one selection keeps, with the windows of what it kept up to the last shard read."""

    def __init__(self, best: Best, window: int):
        self.best, self.window = best, window
        self._first_M = self._after_M = torch.empty(0, dtype=torch.int64)
        self._activations_MW = torch.empty(0, window)

    def end_shard(self, found: Windows, base: int, look_up: LookUp) -> None:
        """found: the windows of the shard's positions, counted from `base`."""
        held = self.best.merge()
        slot_M = held.slot_M.cpu()
        old_M = slot_M != NO_WINDOW
        first_M, after_M = torch.empty_like(slot_M), torch.empty_like(slot_M)
        activations_MW = torch.empty(len(slot_M), self.window)
        first_M[old_M], after_M[old_M] = self._first_M[slot_M[old_M]], self._after_M[slot_M[old_M]]
        activations_MW[old_M] = self._activations_MW[slot_M[old_M]]
        for new_m in torch.nonzero(~old_M).squeeze(1).split(LOOKED_UP):  # type: ignore[no-untyped-call]
            of = held.of.where(new_m.to(held.slot_M.device))
            at_m = (of.position_M - base).cpu().numpy()
            first_m = torch.from_numpy(found.first_P[at_m]) + base
            after_m = torch.from_numpy(found.after_P[at_m]) + base
            position_mW = first_m[:, None] + torch.arange(self.window)
            inside_mW = position_mW < after_m[:, None]
            first_M[new_m], after_M[new_m] = first_m, after_m
            device = held.slot_M.device
            activations_MW[new_m] = look_up(of, position_mW.to(device), inside_mW.to(device)).cpu()
        self._first_M, self._after_M, self._activations_MW = first_M, after_M, activations_MW
        self.best.settle()

    def result(self) -> Kept:
        of = self.best.merge().of
        return Kept(
            Activations(*(column_M.cpu() for column_M in of)), self._first_M, self._after_M, self._activations_MW
        )


class Collector:
    """The pass's state: see the module for what it holds."""

    def __init__(self, sae: SAE, cache: Cache, vocabulary: Vocabulary, wanted: Wanted):
        self.sae, self.cache, self.vocabulary, self.wanted = sae, cache, vocabulary, wanted
        self.latents, self.device = sae.recipe.latents, sae.device
        self.layers = len(sae.recipe.layers)
        self.every_layer = False  # whether each token is read once a layer
        self.one_layer = self.layers == 1
        self.tokens = self.readings = 0
        self.active_F = torch.zeros(self.latents, dtype=torch.int64, device=self.device)
        self.sum_F = torch.zeros(self.latents, dtype=torch.float64, device=self.device)
        self.max_F = torch.zeros(self.latents, dtype=torch.float32, device=self.device)
        self._tokens_ST = cache.tokens()
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rule = self._kept(wanted.per_class, wanted.max_classes)
        self._top = None if wanted.top is None else self._kept(wanted.top, None)
        self._sample = self._kept(wanted.sample, None)

    def _kept(self, each: int, max_classes: int | None) -> _Windowed:
        return _Windowed(
            Best(latents=self.latents, each=each, max_classes=max_classes, device=self.device), self.wanted.window
        )

    def take(self, batch: Batch, position_N: Tensor) -> None:
        """One batch of a shard. position_N: flat positions in tokens, on the CPU."""
        ids_N = self._tokens_ST.reshape(-1)[position_N.numpy()]
        place_N = places_of(torch.from_numpy(ids_N), position_N % self.cache.manifest.context).to(self.device)
        out = self.sae(Hidden(*batch, place_N))
        row_M, latent_M, value_M = out.latents.active()
        n, rows = len(position_N), len(out.x_ND)
        token_M = row_M % n  # rows of a later layer stand behind those of all tokens
        layer_M = torch.div(row_M, n, rounding_mode="floor")
        self.every_layer = rows > n
        self.one_layer |= self.every_layer
        if out.routing_NL is not None and self.sae.recipe.routing == "hard":
            layer_M = out.routing_NL.argmax(1)[token_M]
            self.one_layer = True
        position_M = position_N.to(self.device)[token_M]
        class_M = torch.from_numpy(self.vocabulary.class_V[ids_N]).to(self.device)[token_M]
        found = Activations(latent_M, position_M, layer_M, class_M, value_M)
        self.tokens += n
        self.readings += rows
        self.active_F += torch.bincount(latent_M, minlength=self.latents)
        self.sum_F.index_add_(0, latent_M, value_M.double())
        self.max_F.scatter_reduce_(0, latent_M, value_M, "amax")
        strong = found.where(torch.nonzero(value_M > self.wanted.threshold).squeeze(1))
        self._rule.best.add(strong, strong.value_M)
        if self._top is not None:
            self._top.best.add(found, value_M)
        self._sample.best.add(found, hashed(found, self.latents, self.layers, self.wanted.seed))
        self._keys.append(self._key(latent_M, position_M, layer_M))
        self._values.append(value_M)

    def end_shard(self, rows: tuple[int, int]) -> None:
        """Give what is kept of the shard its windows. rows: its first row of tokens, and the one after its last."""
        if not self._keys:
            return  # none of its tokens was kept
        context = self.cache.manifest.context
        starts = self.cache.document_starts()
        base, after = rows[0] * context, rows[1] * context
        first, last = np.searchsorted(starts, [base, after])
        found = windows(
            np.asarray(self._tokens_ST[slice(*rows)]),
            np.asarray(starts[first:last]) - base,
            vocabulary=self.vocabulary,
            special_ids=self.cache.manifest.special_ids,
            window=self.wanted.window,
        )
        sorted_keys, order = torch.sort(torch.cat(self._keys))
        values = torch.cat(self._values)[order]
        self._keys, self._values = [], []

        def look_up(of: Activations, position_MW: Tensor, inside_MW: Tensor) -> Tensor:
            keys = self._key(of.latent_M[:, None], position_MW, of.layer_M[:, None])[inside_MW]
            at = torch.searchsorted(sorted_keys, keys).clamp(max=max(0, len(sorted_keys) - 1))
            found_MW = torch.zeros(inside_MW.shape, device=keys.device)
            found_MW[inside_MW] = torch.where(sorted_keys[at] == keys, values[at], 0)
            return found_MW

        for kept in self._all():
            kept.end_shard(found, base, look_up)

    def _key(self, latent: Tensor, position: Tensor, layer: Tensor) -> Tensor:
        """One number a latent and row of the shard; along a latent's window they stand close together."""
        manifest = self.cache.manifest
        column = latent * self.layers + layer if self.every_layer else latent
        shard_positions = manifest.shard_rows * manifest.context
        return column * shard_positions + position % shard_positions

    def _all(self) -> list[_Windowed]:
        return [kept for kept in (self._rule, self._top, self._sample) if kept is not None]

    def result(self) -> Collected:
        rule = self._rule.result()
        firsts = torch.ones(len(rule.of.latent_M), dtype=torch.bool)
        same = (rule.of.latent_M[1:] == rule.of.latent_M[:-1]) & (rule.of.class_M[1:] == rule.of.class_M[:-1])
        firsts[1:] = ~same
        classes_F = torch.bincount(rule.of.latent_M[firsts], minlength=self.latents)
        classes_F[self._rule.best.overfull_F.cpu()] = self.wanted.max_classes + 1
        return Collected(
            tokens=self.tokens,
            readings=self.readings,
            active_F=self.active_F.cpu(),
            sum_F=self.sum_F.cpu(),
            max_F=self.max_F.cpu(),
            classes_F=classes_F,
            one_layer=self.one_layer,
            rule=rule,
            top=None if self._top is None else self._top.result(),
            sample=self._sample.result(),
        )
