"""Contexts that no SAE was run for, written as `routesae contexts` writes them, and SAEs of other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from routesae.analyze.contexts.file import FORMAT, context_schema, latent_schema, write_contexts
from routesae.train.folder.checkpoint import load_sae, save_sae

TOKENS_HASH = "0123456789abcdef"


def write_made_up(
    folder: Path, rows: Iterable[Sequence[Mapping[str, Any]]], latents: Mapping[str, Any], **facts: Any
) -> Path:
    """Write contexts, whole latents a batch of rows, into an SAE's folder. latents: columns of LatentSummary."""
    count = len(latents["latent"])
    columns = {"density": [0.01] * count, "histogram_first": [4] * count, "histogram": [[3, 2, 1]] * count, **latents}
    schema = latent_schema()
    table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    made_from: dict[str, Any] = {
        "format": FORMAT,
        "settings": {"threshold": 2.0, "window": 64, "per_class": 2, "min_contexts": 5, "choose": "rule"},
        "cache": {"path": "/nowhere", "tokens_hash": TOKENS_HASH, "corpus": "made up"},
        "sae": {"folder": str(folder), "weights": {}},
        "readings": 100_000,
        "features": count,
        "chosen": count,
    }
    batches = (pa.RecordBatch.from_pylist(list(of_batch), context_schema()) for of_batch in rows)
    return write_contexts(folder, {**made_from, **facts}, table, batches)


def retrain(folder: Path) -> None:
    """Put an SAE of other weights in the place of the one in a folder, as another training does."""
    sae = load_sae(folder, torch.device("cpu"))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.mul_(1.5)
    save_sae(folder, sae, {})
