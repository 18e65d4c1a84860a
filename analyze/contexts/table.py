"""Make the tables that are written from what one pass collected: a row for each context, a row for each latent, and
where tokens are routed.

Dimension letters: F latents, M contexts, W tokens a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from routesae.analyze.contexts.best import rank_within
from routesae.analyze.contexts.collect import Collected
from routesae.analyze.contexts.file import HISTOGRAM, KINDS, context_schema, latent_schema
from routesae.analyze.contexts.windows import Vocabulary
from routesae.harvest.cache.reader import Cache

if TYPE_CHECKING:
    import pyarrow as pa

CLASSES = 40  # of tokens, of which it is told where they are routed
BATCH_CONTEXTS = 4096  # contexts of an Arrow batch, and those of one latent more


def context_batches(collected: Collected, cache: Cache, vocabulary: Vocabulary) -> Iterator[pa.RecordBatch]:
    """The rows of contexts.parquet, whole latents a batch."""
    import pyarrow as pa

    tokens = np.asarray(cache.tokens()).reshape(-1)
    document_starts, documents, manifest = np.asarray(cache.document_starts()), cache.documents(), cache.manifest
    roles, role_names = cache.roles().reshape(-1), pa.array([None, *manifest.roles], pa.string())
    class_names = pa.array(vocabulary.class_names)
    latent_M = collected.contexts.of.latent_M.numpy()
    last_of_latent = np.flatnonzero(np.diff(latent_M, append=-1)) + 1
    start = 0
    while start < len(latent_M):
        enough = min(start + BATCH_CONTEXTS, len(latent_M))
        after = int(last_of_latent[np.searchsorted(last_of_latent, enough)])
        kept = collected.contexts.where(slice(start, after))
        start = after
        of, first_M, after_M = kept.of, kept.first_M.numpy(), kept.after_M.numpy()
        position_M = of.position_M.numpy()
        document_M = np.searchsorted(document_starts, position_M, "right") - 1
        lengths_M = after_M - first_M
        starts_M = np.cumsum(lengths_M) - lengths_M  # of each window among those of the batch, one behind the other
        token_ids = tokens[np.repeat(first_M - starts_M, lengths_M) + np.arange(lengths_M.sum())]
        inside_MW = np.arange(kept.activations_MW.shape[1]) < lengths_M[:, None]

        def lists(values: Any, kind: pa.DataType, lengths_M: Any = lengths_M) -> pa.ListArray:
            offsets = pa.array(np.append(0, np.cumsum(lengths_M)), pa.int32())
            return pa.ListArray.from_arrays(offsets, pa.array(values, kind))

        layers = collected.layers
        said = documents.take(pa.array(document_M, pa.int64(), mask=document_M < 0)).to_pylist()
        columns = {
            "latent": of.latent_M.numpy(),
            "kind": pa.array(KINDS).take(pa.array(kept.kind_M.numpy())),
            "rank": rank_within(of.latent_M * len(KINDS) + kept.kind_M).numpy(),
            "token_class": class_names.take(pa.array(of.class_M.numpy())),
            "activation": of.value_M.numpy(),
            "layer": pa.nulls(len(first_M)) if layers is None else np.array(layers)[of.layer_M.numpy()],
            "row": position_M // manifest.context,
            "position": position_M % manifest.context,
            "document": pa.array(document_M, pa.int64(), mask=document_M < 0),
            "role": role_names.take(pa.array(roles[position_M])),
            "place": pa.array([one["place"] for one in said]),
            "fields": [[(name, one[name]) for name in manifest.keep_fields if one[name] is not None] for one in said],
            "at": position_M - first_M,
            "token_ids": lists(token_ids, pa.int32()),
            "tokens": lists(vocabulary.pieces(token_ids, lengths_M), pa.string()),
            "activations": lists(kept.activations_MW.numpy()[inside_MW], pa.float32()),
        }
        schema = context_schema()
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def routes_table(collected: Collected, cache: Cache, vocabulary: Vocabulary, layers: Sequence[int]) -> dict[str, Any]:
    """Of a routesae, to which layers it sends the tokens of the most frequent classes; {} of others.

    counts: tokens of each class; shares: of them at each layer. held_out: whether only held-out tokens were counted.
    """
    if collected.routed_CL is None:
        return {}
    count_C = collected.routed_CL.sum(1).round().long()
    top = [c for c in count_C.argsort(descending=True, stable=True)[:CLASSES].tolist() if count_C[c]]
    return {
        "layers": list(layers),
        "tokens": int(count_C.sum()),
        "held_out": cache.manifest.train_rows < cache.manifest.rows,
        "classes": [vocabulary.class_texts[c] for c in top],
        "counts": [int(count_C[c]) for c in top],
        "shares": [[round(share, 4) for share in (collected.routed_CL[c] / count_C[c]).tolist()] for c in top],
    }


def latent_table(collected: Collected) -> pa.Table:
    """The rows of latents.parquet: routesae.analyze.contexts.file.LatentSummary."""
    import pyarrow as pa

    histogram_FB = collected.histogram_FB.numpy()
    active_F = histogram_FB.sum(1)
    first_F, end_F = (histogram_FB > 0).argmax(1), histogram_FB.shape[1] - (histogram_FB[:, ::-1] > 0).argmax(1)
    columns = {
        "latent": np.arange(len(active_F)),
        "active": active_F,
        "density": active_F / collected.readings,
        "max_activation": collected.max_F.numpy(),
        "mean_activation": collected.sum_F.numpy() / active_F.clip(min=1),
        "token_classes": collected.classes_F.numpy(),
        "kept": collected.kept_F.numpy(),
        "histogram_first": first_F + HISTOGRAM.start,
        "histogram": [
            bins[first:end] if bins.any() else bins[:0]
            for bins, first, end in zip(histogram_FB, first_F, end_F, strict=True)
        ],
    }
    schema = latent_schema()
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
