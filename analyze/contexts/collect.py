"""Find the best activations of every latent of every SAE and the text around them, in one pass over the cache.

    rule     by the published rule: at most 2 a token class above the threshold, of latents with at most 32 classes
    top      the N strongest
    sample   a uniform sample of all activations, for an honest view of a latent beside its strongest

Shards are read one after the other. At the end of each, what is kept of it gets its window and the latent's
activation on every token of the window, looked up among the shard's activations. Held at any time, of each SAE: what
is kept (at most 64 + N + samples a latent, each some 60 bytes and 4 a token of the window), and one shard's
activations at 12 bytes each: 768 a token for k 64.

Dimension letters: L layers, N tokens, F latents, M activations, W tokens a window, P positions of a shard.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from routesae.analyze.contexts.best import NO_WINDOW, Activations, Best, Kept, hashed, joined, rank_within, ranking
from routesae.analyze.contexts.file import BINS_PER_OCTAVE, HISTOGRAM, KINDS, SAMPLES, TOP
from routesae.analyze.contexts.groups import Groups
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.contexts.windows import Vocabulary, windows
from routesae.harvest.cache.reader import Cache
from routesae.reporting import Progress, Report, WrongInput, silent
from routesae.train.loading.batches import Block, Plan, Selection, cut_plans, load
from routesae.train.saes import SAE
from routesae.train.saes.normalise import Hidden, places_of


class Collected(NamedTuple):
    """What one pass found.

    tokens: read. readings: inputs that the SAE saw, one a token, or one a token and layer for mlsae and random.
    histogram_FB: how many activations of each latent are in each bin. sum_F, max_F: of its activations. classes_F:
    token classes above the threshold; max_classes + 1 if there are more. kept_F: whether the published rule keeps it.
    layers: of the SAE, or None if no activation was read from a single one. contexts: by latent, kind and strength.
    groups: how often latents are on in documents of each, with --group-by.
    routed_CL: of a routesae, held-out tokens of each class by the layer they are read from; with soft routing a token
    counts for each layer by its weight. If no rows are held out, it is of all tokens.
    """

    tokens: int
    readings: int
    histogram_FB: Tensor
    sum_F: Tensor
    max_F: Tensor
    classes_F: Tensor
    kept_F: Tensor
    layers: tuple[int, ...] | None
    contexts: Kept
    routed_CL: Tensor | None
    groups: Groups | None = None


@torch.no_grad()
def collect(
    saes: Mapping[str, SAE], cache: Cache, vocabulary: Vocabulary, settings: ContextSettings, report: Report = silent
) -> dict[str, Collected]:
    """Read the cache once, for all SAEs. Raises WrongInput if it holds no token."""
    layers = sorted({layer for sae in saes.values() for layer in sae.recipe.layers})
    first = 0 if settings.rows == "all" else cache.manifest.train_rows
    selection = Selection(cache, first, cache.manifest.rows, layers)
    if len(selection) == 0:
        raise WrongInput(
            f"{cache.path} has no kept token in its {settings.rows} rows; harvest more text, or give --rows all"
        )
    device = next(iter(saes.values())).device
    collectors = {name: Collector(sae.eval(), cache, vocabulary, settings) for name, sae in saes.items()}
    shards, size, done = range(len(selection.shards)), settings.batch_tokens, 0
    tokens_P, context = cache.tokens().reshape(-1), cache.manifest.context
    plans = chain.from_iterable(_shard_plans(selection, shard, size) for shard in shards)
    with closing(load(selection, plans, size, device)) as batches:
        for shard in shards:
            position_n = torch.from_numpy(selection.positions(shard))
            for plan in _shard_plans(selection, shard, size):
                position_N = position_n[plan[0].first : plan[-1].after]
                ids_N = torch.from_numpy(tokens_P[position_N.numpy()])
                place_N = places_of(ids_N, position_N % context).to(device)
                hidden = Hidden(*next(batches), place_N, layers=layers)
                for collector in collectors.values():
                    collector.take(hidden, position_N, ids_N)
                done += len(position_N)
                report(Progress("contexts", done, len(selection), "tokens", {}))
            for collector in collectors.values():
                collector.end_shard(selection.shards[shard].record.rows)
    return {name: collector.result() for name, collector in collectors.items()}


def _shard_plans(selection: Selection, shard: int, batch_tokens: int) -> Iterator[Plan]:
    """The batches of one shard, in stored order; none holds rows of two shards. All of its rows are selected."""
    return cut_plans((Block(*row) for row in selection.block_table(range(shard, shard + 1)).tolist()), batch_tokens)


class Collector:
    """The pass's state: see the module for what it holds."""

    def __init__(self, sae: SAE, cache: Cache, vocabulary: Vocabulary, settings: ContextSettings):
        self.sae, self.cache, self.vocabulary, self.settings = sae, cache, vocabulary, settings
        self.latents, self.device = sae.recipe.latents, sae.device
        self.layers, self.bins = len(sae.recipe.layers), len(HISTOGRAM)
        manifest = cache.manifest
        held_out = manifest.train_rows if manifest.train_rows < manifest.rows else 0
        self.first_held_out = held_out * manifest.context
        classes = len(vocabulary.class_names) if sae.recipe.sae == "routesae" else 0
        self.routed_CL = torch.zeros(classes, self.layers, dtype=torch.float64)
        self.every_layer = False  # whether each token is read once a layer
        self.one_layer = self.layers == 1  # whether an activation was read from one layer
        self.tokens = self.readings = 0
        self.histogram_FB = torch.zeros(self.latents, self.bins, dtype=torch.int64, device=self.device)
        self.sum_F = torch.zeros(self.latents, dtype=torch.float64, device=self.device)
        self.max_F = torch.zeros(self.latents, dtype=torch.float32, device=self.device)
        self._tokens_ST = cache.tokens()
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.groups = Groups(cache, settings.group_by, self.latents) if settings.group_by else None
        self._rule = self._best(settings.per_class, settings.max_classes)
        self._top = self._best(settings.top, None)
        self._sample = self._best(len(SAMPLES) * settings.samples, None)

    def _best(self, each: int, max_classes: int | None) -> Best:
        window = self.settings.window
        return Best(latents=self.latents, each=each, max_classes=max_classes, window=window, device=self.device)

    def take(self, hidden: Hidden, position_N: Tensor, ids_N: Tensor) -> None:
        """One batch of a shard. position_N: flat positions in tokens; ids_N: what stands there. Both on the CPU."""
        out = self.sae(hidden)
        row_M, latent_M, value_M = out.latents.active()
        n, rows = len(position_N), len(out.x_ND)
        token_M = row_M % n  # rows of a later layer stand behind those of all tokens
        layer_M = torch.div(row_M, n, rounding_mode="floor")
        self.every_layer = rows > n
        self.one_layer |= self.every_layer
        class_N = torch.from_numpy(self.vocabulary.class_V[ids_N.numpy()])
        if out.routing_NL is not None:
            share_NL = out.routing_NL
            if self.sae.recipe.routing == "hard":
                layer_N = share_NL.argmax(1)
                layer_M, share_NL = layer_N[token_M], torch.nn.functional.one_hot(layer_N, self.layers)
                self.one_layer = True
            held_N = position_N >= self.first_held_out
            self.routed_CL.index_add_(0, class_N[held_N], share_NL.cpu()[held_N].double())
        position_M = position_N.to(self.device)[token_M]
        class_M = class_N.to(self.device)[token_M]
        window_M = torch.full_like(latent_M, NO_WINDOW)
        found = Activations(latent_M, position_M, layer_M, class_M, value_M, value_M, window_M)
        self.tokens += n
        self.readings += rows
        bin_M = (BINS_PER_OCTAVE * value_M.log2()).floor().long() - HISTOGRAM.start
        self.histogram_FB.view(-1).index_add_(
            0, latent_M * self.bins + bin_M.clamp(0, self.bins - 1), torch.ones_like(latent_M)
        )
        self.sum_F.index_add_(0, latent_M, value_M.double())
        self.max_F.scatter_reduce_(0, latent_M, value_M, "amax")
        above = found.where(torch.nonzero(value_M > self.settings.threshold).squeeze(1))
        self._rule.add(above)
        if self.groups is not None:
            self.groups.add(position_N.numpy(), above.latent_M.cpu().numpy(), above.position_M.cpu().numpy())
        self._top.add(found)
        self._sample.add(found._replace(score_M=hashed(found, self.latents, self.layers, self.settings.seed)))
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
        of_shard = windows(
            np.asarray(self._tokens_ST[slice(*rows)]),
            np.asarray(starts[first:last]) - base,
            vocabulary=self.vocabulary,
            special_ids=self.cache.manifest.special_ids,
            window=self.settings.window,
            in_front=self._tokens_ST.reshape(-1)[max(0, base - 64) : base].tolist(),
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

        for best in (self._rule, self._top, self._sample):
            best.end_shard(of_shard, base, look_up)
        if self.groups is not None:
            self.groups.end_shard(after)

    def _key(self, latent: Tensor, position: Tensor, layer: Tensor) -> Tensor:
        """One number a latent and row of the shard; along a latent's window they stand close together."""
        manifest = self.cache.manifest
        column = latent * self.layers + layer if self.every_layer else latent
        shard_positions = manifest.shard_rows * manifest.context
        return column * shard_positions + position % shard_positions

    def result(self) -> Collected:
        rule, settings = self._rule.result(), self.settings
        latent_M, class_M = rule.of.latent_M, rule.of.class_M
        first_of_class_M = torch.ones(len(latent_M), dtype=torch.bool)
        first_of_class_M[1:] = (latent_M[1:] != latent_M[:-1]) | (class_M[1:] != class_M[:-1])
        classes_F = torch.bincount(latent_M[first_of_class_M], minlength=self.latents)
        classes_F[self._rule.overfull_F.cpu()] = settings.max_classes + 1
        contexts_F = torch.bincount(latent_M, minlength=self.latents)
        # The number of these latents is the paper's count of features (2503.08200).
        kept_F = (contexts_F >= settings.min_contexts) & (classes_F <= settings.max_classes)
        chosen, top = rule.where(torch.nonzero(kept_F[latent_M]).squeeze(1)), self._top.result()
        if settings.choose == "top":
            chosen = top
        return Collected(
            tokens=self.tokens,
            readings=self.readings,
            histogram_FB=self.histogram_FB.cpu(),
            sum_F=self.sum_F.cpu(),
            max_F=self.max_F.cpu(),
            classes_F=classes_F,
            kept_F=kept_F,
            layers=self.sae.recipe.layers if self.one_layer else None,
            contexts=_in_order(chosen, top, self._sample.result()),
            routed_CL=self.routed_CL if len(self.routed_CL) else None,
            groups=self.groups,
        )


def _in_order(chosen: Kept, top: Kept, sample: Kept) -> Kept:
    """What was chosen, the strongest and the thirds of the sample, each strongest first, in the order of the file."""
    chosen, top, sample = map(_strongest_first, (chosen, top, sample))
    latent_M = sample.of.latent_M
    size_M = torch.bincount(latent_M)[latent_M]
    third_M = torch.div(rank_within(latent_M) * len(SAMPLES), size_M, rounding_mode="floor")
    top = top._replace(kind_M=torch.full_like(top.kind_M, KINDS.index(TOP)))
    sample = sample._replace(kind_M=third_M + KINDS.index(SAMPLES[0]))
    columns = (torch.cat(parts) for parts in zip(chosen[1:], top[1:], sample[1:], strict=True))
    every = Kept(joined([chosen.of, top.of, sample.of]), *columns)
    return every.where(torch.argsort(every.of.latent_M * len(KINDS) + every.kind_M, stable=True))


def _strongest_first(kept: Kept) -> Kept:
    of = kept.of._replace(score_M=kept.of.value_M)
    return kept._replace(of=of).where(ranking(of, of.latent_M))
