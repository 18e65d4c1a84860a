"""What one pass collected in; the tables that are written out: a row a context, a row a latent.

Dimension letters: F latents, M contexts, W tokens a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from routesae.analyze.contexts.best import rank_within, ranking
from routesae.analyze.contexts.collect import Collected, Kept
from routesae.analyze.contexts.file import KINDS, SAMPLES, context_schema
from routesae.analyze.contexts.windows import Vocabulary
from routesae.harvest.cache.manifest import Ids
from routesae.harvest.cache.reader import Cache

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_CONTEXTS = 4096  # contexts of an Arrow batch, and those of one latent more

Ints = npt.NDArray[np.int64]


class Source(NamedTuple):
    """What the windows are read from. layers: of the SAE; None: no activation was read from one of them."""

    tokens: Ids
    document_starts: Ints
    context: int
    vocabulary: Vocabulary
    class_names: pa.Array
    layers: tuple[int, ...] | None


class Chosen(NamedTuple):
    """Contexts in the order of the file. kind_M: index into KINDS. rank_M: within latent and kind."""

    kept: Kept
    kind_M: Tensor
    rank_M: Tensor


def kept_by_rule(collected: Collected, *, max_classes: int, min_contexts: int) -> Tensor:
    """bool [F]: latents with at least `min_contexts` contexts above the threshold, at most 2 a token class, of at
    most `max_classes` token classes. Their number is the paper's count of features (2503.08200)."""
    contexts_F = torch.bincount(collected.rule.of.latent_M, minlength=len(collected.active_F))
    return (contexts_F >= min_contexts) & (collected.classes_F <= max_classes)


def choose(collected: Collected, kept_F: Tensor) -> Chosen:
    """The N strongest where they were asked for, else what the rule keeps; and the thirds of the sample."""
    by_rule = collected.rule
    if collected.top is not None:
        strongest = collected.top
    else:
        strongest = _where(by_rule, torch.nonzero(kept_F[by_rule.of.latent_M]).squeeze(1))
    strongest, sample = _strongest_first(strongest), _strongest_first(collected.sample)
    latent_M = sample.of.latent_M
    size_M = torch.bincount(latent_M, minlength=len(kept_F))[latent_M]
    third_M = torch.div(rank_within(latent_M) * len(SAMPLES), size_M.clamp(min=1), rounding_mode="floor")
    both = Kept(
        type(sample.of)(*(torch.cat(columns) for columns in zip(strongest.of, sample.of, strict=True))),
        torch.cat([strongest.first_M, sample.first_M]),
        torch.cat([strongest.after_M, sample.after_M]),
        torch.cat([strongest.activations_MW, sample.activations_MW]),
    )
    kind_M = torch.cat([torch.zeros_like(strongest.of.latent_M), third_M + 1])
    group_M = both.of.latent_M * len(KINDS) + kind_M
    order_M = torch.argsort(group_M, stable=True)
    return Chosen(_where(both, order_M), kind_M[order_M], rank_within(group_M[order_M]))


def _strongest_first(kept: Kept) -> Kept:
    return _where(kept, ranking(kept.of, kept.of.value_M, kept.of.latent_M))


def _where(kept: Kept, chosen_M: Tensor) -> Kept:
    return Kept(kept.of.where(chosen_M), *(column[chosen_M] for column in kept[1:]))


def context_batches(
    chosen: Chosen, cache: Cache, vocabulary: Vocabulary, layers: tuple[int, ...] | None
) -> Iterator[pa.RecordBatch]:
    """The rows of contexts.parquet, whole latents a batch. layers: of the SAE; None: not read from one of them."""
    import pyarrow as pa

    source = Source(
        np.asarray(cache.tokens()).reshape(-1),
        np.asarray(cache.document_starts()),
        cache.manifest.context,
        vocabulary,
        pa.array(vocabulary.class_names),
        layers,
    )
    latent_M = chosen.kept.of.latent_M.numpy()
    last_of_latent = np.flatnonzero(np.diff(latent_M, append=-1)) + 1
    start = 0
    while start < len(latent_M):
        wanted = min(start + BATCH_CONTEXTS, len(latent_M))
        after = int(last_of_latent[np.searchsorted(last_of_latent, wanted)])
        yield _batch(chosen, slice(start, after), source)
        start = after


def _batch(chosen: Chosen, rows: slice, source: Source) -> pa.RecordBatch:
    import pyarrow as pa

    of = chosen.kept.of
    position_M = of.position_M[rows].numpy()
    first_M, after_M = chosen.kept.first_M[rows].numpy(), chosen.kept.after_M[rows].numpy()
    lengths_M = after_M - first_M
    offsets = pa.array(np.append(0, np.cumsum(lengths_M)), pa.int32())
    inside_MW = np.arange(chosen.kept.activations_MW.shape[1]) < lengths_M[:, None]
    places = np.repeat(first_M - np.append(0, np.cumsum(lengths_M)[:-1]), lengths_M) + np.arange(lengths_M.sum())
    token_ids = source.tokens[places]
    pieces = source.vocabulary.pieces(token_ids, lengths_M)
    document_M = np.searchsorted(source.document_starts, position_M, "right") - 1
    layer_M = None if source.layers is None else np.array(source.layers, np.int16)[of.layer_M[rows].numpy()]
    columns = {
        "latent": of.latent_M[rows].numpy(),
        "kind": pa.array(KINDS).take(pa.array(chosen.kind_M[rows].numpy())),
        "rank": chosen.rank_M[rows].numpy(),
        "token_class": source.class_names.take(pa.array(of.class_M[rows].numpy())),
        "activation": of.value_M[rows].numpy(),
        "layer": pa.nulls(len(position_M), pa.int16()) if layer_M is None else layer_M,
        "row": position_M // source.context,
        "position": position_M % source.context,
        "document": pa.array(document_M, pa.int64(), mask=document_M < 0),
        "at": position_M - first_M,
        "token_ids": pa.ListArray.from_arrays(offsets, pa.array(token_ids, pa.int32())),
        "tokens": pa.ListArray.from_arrays(offsets, pa.array(pieces, pa.string())),
        "activations": pa.ListArray.from_arrays(
            offsets, pa.array(chosen.kept.activations_MW[rows].numpy()[inside_MW], pa.float32())
        ),
    }
    schema = context_schema()
    typed = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for field, column in zip(schema, columns.values(), strict=True)
    ]
    return pa.RecordBatch.from_arrays(typed, schema=schema)


def latent_table(collected: Collected, kept_F: Tensor) -> pa.Table:
    """The rows of latents.parquet: routesae.analyze.contexts.file.LatentSummary."""
    import pyarrow as pa

    active_F = collected.active_F
    return pa.table(
        {
            "latent": pa.array(np.arange(len(active_F)), pa.int32()),
            "active": active_F.numpy(),
            "density": (active_F.double() / collected.readings).numpy(),
            "max_activation": collected.max_F.numpy(),
            "mean_activation": (collected.sum_F / active_F.clamp(min=1)).numpy(),
            "token_classes": pa.array(collected.classes_F.numpy(), pa.int32()),
            "kept": kept_F.numpy(),
        }
    )
