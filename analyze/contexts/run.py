"""Run `routesae contexts`: write into each SAE's folder the text that its latents are active on.

No LM is loaded: hidden states and tokens come from the cache. Three tables are made from what one pass collected: a
row for each context, a row for each latent, and where tokens are routed.

Dimension letters: F latents, M contexts, W tokens a window.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from routesae import __version__
from routesae.analyze.contexts.best import rank_within
from routesae.analyze.contexts.collect import Collected, collect
from routesae.analyze.contexts.file import (
    CHOSEN,
    FORMAT,
    HISTOGRAM,
    KINDS,
    context_schema,
    latent_schema,
    read_facts,
    write_contexts,
)
from routesae.analyze.contexts.settings import ContextSettings
from routesae.analyze.contexts.windows import Vocabulary
from routesae.analyze.inputs.lm import lm_of_cache, load_tokenizer_of
from routesae.analyze.inputs.saes import OpenSAE, open_saes, sae_identity
from routesae.harvest.cache.reader import Cache
from routesae.machine.device import pick_device
from routesae.reporting import Report, Table, WrongInput, silent

log = logging.getLogger(__name__)

RULE = ("rows", "threshold", "per_class", "max_classes", "min_contexts", "choose", "top", "window", "samples", "seed")
CLASSES = 40  # of tokens, of which it is told where they are routed
BATCH_CONTEXTS = 4096  # contexts of an Arrow batch, and those of one latent more


def contexts(settings: ContextSettings, report: Report = silent) -> Table:
    """Write the contexts of every SAE asked for. One from the hub gets a folder of its own under `out`.

    Returns a row for each. Features: latents that the published rule keeps. chosen: latents in contexts.json.
    contexts: rows of contexts.parquet, the strongest and samples included. written: the folder. groups: of
    --group-by, see routesae.analyze.contexts.groups. Raises WrongInput if cache, SAEs and tokenizer do not belong
    together.
    """
    cache = Cache(settings.cache)
    cache.require_whole()
    if cache.ring() and settings.rows == "all":
        log.info("%s is a ring, so contexts are of its held-out rows alone", cache.path)
        settings = settings.replace(rows="held-out")
    opened = open_saes(settings.saes, Path(settings.out), cache, pick_device(settings.device))
    for one in opened.values():
        nearest = next(place for place in (one.beside, *one.beside.absolute().parents) if place.is_dir())
        if not os.access(nearest, os.W_OK):  # said before the cache is read
            raise WrongInput(f"{nearest} is read-only, and contexts go there; change that, or copy the SAE elsewhere")
    made_from = {name: _facts(settings, name, sae, cache) for name, sae in opened.items()}
    if not settings.overwrite:
        for name, one in opened.items():
            _require_same_results(one.beside, made_from[name])
    vocabulary = Vocabulary(load_tokenizer_of([lm_of_cache(cache)], settings.model))
    saes, rows = {name: one.sae for name, one in opened.items()}, Table()
    found = collect(saes, cache, vocabulary, settings, report)
    for name, one in opened.items():
        collected = found.pop(name)
        kept, features, strongest = collected.contexts, int(collected.kept_F.sum()), float(collected.max_F.max())
        if settings.choose == "rule" and features == 0:
            log.warning(
                "%s: the rule keeps no latent; the strongest activation is %.1f: give a --threshold well below it",
                name,
                strongest,
            )
        chosen = len(np.unique(kept.of.latent_M[kept.kind_M == KINDS.index(CHOSEN)].numpy()))
        counts = {"tokens": collected.tokens, "readings": collected.readings, "features": features, "chosen": chosen}
        facts = {**made_from[name], **counts, "routes": routes_table(collected, cache, vocabulary, one.sae.layers)}
        batches = context_batches(collected, cache, vocabulary)
        place = write_contexts(one.beside, facts, latent_table(collected), batches)
        row = {"sae": name, "latents": len(collected.kept_F), "Features": features, "chosen": chosen}
        rows.append({**row, "contexts": len(kept.kind_M), "strongest": strongest, "written": str(place)})
        if collected.groups is not None:
            rows[-1]["groups"] = collected.groups.strongest()
            for one in rows[-1]["groups"]:
                classes = dict.fromkeys(kept.of.class_M[kept.of.latent_M == one["latent"]].tolist())
                one["words"] = ", ".join(vocabulary.class_texts[token_class].strip() for token_class in classes)[:24]
    return rows


def _facts(settings: ContextSettings, name: str, sae: OpenSAE, cache: Cache) -> dict[str, Any]:
    """What an SAE's contexts are made from, known before they are."""
    return {
        "format": FORMAT,
        "routesae": __version__,
        # How it was run is left out: the contexts are the same.
        "settings": {name: getattr(settings, name) for name in RULE},
        "cache": {"path": cache.storage.address, **cache.manifest.to_dict()},
        "sae": {"name": name, "folder": str(sae.folder.resolve()), **sae_identity(sae.sae)},
    }


def _require_same_results(folder: Path, now: Mapping[str, Any]) -> None:
    """Raises WrongInput if there are contexts of this corpus in `folder` that would be others afterwards."""
    before = None
    with suppress(WrongInput):  # damaged: nobody can read them
        before = read_facts(folder, now["cache"]["tokens_hash"])
    if before is None:
        return
    changed = [
        f"--{name.replace('_', '-')} {before['settings'].get(name)}, now {now['settings'][name]}"
        for name in RULE
        if before["settings"].get(name) != now["settings"][name]
    ]
    if changed:
        raise WrongInput(f"{folder} has contexts of {'; '.join(changed)}; give --overwrite to replace them")


def context_batches(collected: Collected, cache: Cache, vocabulary: Vocabulary) -> Iterator[pa.RecordBatch]:
    """The rows of contexts.parquet, whole latents a batch."""
    tokens = np.asarray(cache.tokens()).reshape(-1)
    document_starts, documents, manifest = np.asarray(cache.document_starts()), cache.documents(), cache.manifest
    roles, role_names = cache.roles().reshape(-1), pa.array([None, *manifest.roles], pa.string())
    class_names, unknown = pa.array(vocabulary.class_names), dict.fromkeys(documents.column_names)
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
        # One by one: take() would join the dictionaries of all row groups, which fails where they are over 2 GB.
        rows = {one: documents.slice(one, 1).to_pylist()[0] for one in set(document_M[document_M >= 0].tolist())}
        said = [rows.get(one, unknown) for one in document_M.tolist()]
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
