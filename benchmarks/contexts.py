"""How much faster contexts are collected than by a loop over activations, as the published RouteSAE code has it.

    python benchmarks/contexts.py --cache CACHE --sae SAE

The SAE, one over one layer, is run once; both then get the same latents, in turns, and only what they do with them is
timed. The loop visits one activation at a time: counts it, draws it into the sample, and where it is above the
threshold spells its sentence and pushes it onto its token class's heap, or onto the heap of the N strongest.
Its counterpart also looks up every window's activations. Both must choose the same. Medians.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from routesae.analyze.contexts.collect import Collector
from routesae.analyze.contexts.file import KINDS
from routesae.analyze.contexts.run import context_batches
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.inputs.lm import lm_of_cache, load_tokenizer_of
from routesae.harvest.cache.reader import Cache
from routesae.train.folder.checkpoint import load_sae
from routesae.train.loading.batches import Selection, cut_plans, load
from routesae.train.saes import SAE, Recipe
from routesae.train.saes.normalise import Hidden
from routesae.train.saes.sae import Forward

PER_CLASS, MAX_CLASSES, MIN_CONTEXTS, WINDOW, SAMPLE = 2, 32, 5, 64, 15
BATCH_TOKENS = 4096
Chosen = dict[int, list[tuple[float, int]]]  # latent -> its contexts' values and flat positions, ordered


class Stored(NamedTuple):
    """What the SAE gave for a batch, and the batch's flat positions."""

    out: Forward
    position_N: torch.Tensor


class Subject(NamedTuple):
    """What both work on. rows: the cache's tokens, as lists. shards: the batches of each."""

    cache: Cache
    rows: list[list[int]]
    vocabulary: Vocabulary
    recipe: Recipe
    shards: list[list[Stored]]


class Replay:
    """Stands where the SAE does, and gives what it gave, in the same order."""

    def __init__(self, subject: Subject):
        self.recipe, self.device = subject.recipe, torch.device("cpu")
        self.left = iter([batch.out for batches in subject.shards for batch in batches])

    def __call__(self, x: object) -> Forward:
        return next(self.left)


@torch.no_grad()
def run_sae(sae: SAE, cache: Cache, shards: int) -> list[list[Stored]]:
    """Batches of each of the first shards."""
    rows = min(shards * cache.manifest.shard_rows, cache.manifest.rows)
    selection = Selection(cache, 0, rows, sae.recipe.layers)
    found = []
    for at, shard in selection.shards.items():
        blocks = [block for block in selection.blocks() if block.shard == at]
        position_n = torch.from_numpy(shard.read("order") + shard.record.rows[0] * cache.manifest.context).long()
        with closing(load(selection, cut_plans(iter(blocks), BATCH_TOKENS), BATCH_TOKENS, sae.device)) as batches:
            outs = [sae(Hidden(*batch)) for batch in batches]
        found.append([Stored(*pair) for pair in zip(outs, position_n.split(BATCH_TOKENS), strict=True)])
    return found


def vectorised(subject: Subject, threshold: float, top: int | None) -> Chosen:
    """The pass as `routesae contexts` makes it, up to the tables that are written."""
    rule: dict[str, Any] = {"per_class": PER_CLASS, "max_classes": MAX_CLASSES, "min_contexts": MIN_CONTEXTS}
    rule |= {} if top is None else {"top": top}
    settings = ContextSettings(threshold=threshold, samples=SAMPLE // 3, window=WINDOW, **rule)
    sae: Any = Replay(subject)
    collector = Collector(sae, subject.cache, subject.vocabulary, settings)
    for number, batches in enumerate(subject.shards):
        for batch in batches:
            ids_N = torch.from_numpy(subject.cache.tokens().reshape(-1)[batch.position_N.numpy()])
            collector.take(Hidden(torch.zeros(1, len(ids_N), 1)), batch.position_N, ids_N)
        collector.end_shard(subject.cache.manifest.shard_range(number))
    collected = collector.result()
    for _ in context_batches(collected, subject.cache, subject.vocabulary):
        pass
    found: Chosen = defaultdict(list)
    kind = KINDS.index("chosen" if top is None else "top")
    strongest = collected.contexts.of.where(collected.contexts.kind_M == kind)
    columns = (strongest.latent_M.tolist(), strongest.value_M.tolist(), strongest.position_M.tolist())
    for latent, value, position in zip(*columns, strict=True):
        found[latent].append((value, position))
    return found


class Seen:
    """What a loop knows of every latent beside its strongest: counts, sums, largest, and a sample."""

    def __init__(self) -> None:
        self.count: Any = defaultdict(int)
        self.sum: Any = defaultdict(float)
        self.largest: Any = defaultdict(float)
        self.sample: Any = defaultdict(list)
        self.random = random.Random(0)

    def add(self, latent: int, value: float, position: int) -> None:
        self.count[latent] += 1
        self.sum[latent] += value
        self.largest[latent] = max(self.largest[latent], value)
        heapq.heappush(self.sample[latent], (self.random.random(), value, position))
        if len(self.sample[latent]) > SAMPLE:
            heapq.heappop(self.sample[latent])


def plain_rule(subject: Subject, threshold: float) -> Chosen:
    """The published loop, one activation at a time, with what `contexts` counts and samples besides."""
    heaps: Any = defaultdict(lambda: defaultdict(list))
    seen = Seen()
    for batch in (batch for batches in subject.shards for batch in batches):
        dense_NF = batch.out.latents.dense()
        positions = batch.position_N.tolist()
        for n, latent in torch.nonzero(dense_NF).tolist():
            value = dense_NF[n, latent].item()
            seen.add(latent, value, positions[n])
            if value <= threshold:
                continue
            text, token_class = sentence(subject, positions[n])
            heap = heaps[latent][token_class]
            heapq.heappush(heap, (value, -positions[n], text))
            if len(heap) > PER_CLASS:
                heapq.heappop(heap)
    found = {}
    for latent, classes in heaps.items():
        entries = [(value, -negated) for heap in classes.values() for value, negated, _ in heap]
        if len(classes) <= MAX_CLASSES and len(entries) >= MIN_CONTEXTS:
            found[latent] = sorted(entries, key=lambda entry: (-entry[0], entry[1]))
    return found


def plain_top(subject: Subject, top: int) -> Chosen:
    """A heap a latent over every activation; sentences of what is left."""
    heaps: Any = defaultdict(list)
    seen = Seen()
    for batch in (batch for batches in subject.shards for batch in batches):
        dense_NF = batch.out.latents.dense()
        positions = batch.position_N.tolist()
        for n, latent in torch.nonzero(dense_NF).tolist():
            value = dense_NF[n, latent].item()
            seen.add(latent, value, positions[n])
            heapq.heappush(heaps[latent], (value, -positions[n]))
            if len(heaps[latent]) > top:
                heapq.heappop(heaps[latent])
    found = {}
    for latent, heap in heaps.items():
        found[latent] = sorted(
            ((value, -negated) for value, negated in heap), key=lambda entry: (-entry[0], entry[1])
        )
        for _, position in found[latent]:
            sentence(subject, position)
    return found


def sentence(subject: Subject, position: int) -> tuple[str, int]:
    """The text around a position, bounded by sentence ends, and the class of its token."""
    row, at = divmod(position, subject.cache.manifest.context)
    ids = subject.rows[row]
    ends = subject.vocabulary.ends_V
    first, after = at, at + 1
    while first > 0 and not ends[ids[first - 1]]:
        first -= 1
    while after < len(ids) and not ends[ids[after - 1]]:
        after += 1
    if after - first > WINDOW:
        first, after = max(first, at - WINDOW // 2), min(after, at + WINDOW // 2)
    text = "".join(subject.vocabulary.texts[token] for token in ids[first:after])
    return text, int(subject.vocabulary.class_V[ids[at]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=1000, help="how many of the cache's, from the front")
    parser.add_argument("--threshold", type=float, default=2.0)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cache, sae = Cache(args.cache), load_sae(args.sae, torch.device("cpu"))
    vocabulary = Vocabulary(load_tokenizer_of([lm_of_cache(cache)], None))
    subject = Subject(cache, cache.tokens().tolist(), vocabulary, sae.recipe, run_sae(sae, cache, args.shards))
    tokens = sum(len(batch.position_N) for batches in subject.shards for batch in batches)
    print(f"{tokens:,} tokens, {sae.recipe.latents:,} latents; seconds, medians of {args.rounds} rounds")
    for name, top in ((f"rule, threshold {args.threshold:g}", None), (f"top {args.top}", args.top)):
        seconds: dict[str, list[float]] = {"loop": [], "contexts": []}
        for _ in range(args.rounds):
            began = time.perf_counter()
            plain = plain_rule(subject, args.threshold) if top is None else plain_top(subject, top)
            between = time.perf_counter()
            ours = vectorised(subject, args.threshold, top)
            seconds["loop"].append(between - began)
            seconds["contexts"].append(time.perf_counter() - between)
            assert ours == plain, "the two chose different contexts"
        loop, contexts = (statistics.median(seconds[what]) for what in ("loop", "contexts"))
        print(f"{name}: {len(ours):,} latents; loop {loop:.2f}, contexts {contexts:.2f}: {loop / contexts:.1f} times")


if __name__ == "__main__":
    main()
