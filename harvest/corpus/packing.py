"""Tokenise and pack the whole corpus onto the disk, before any LM runs over it.

Dimension letters: S rows of tokens, T context, B rows a write.
"""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import kept_positions
from routesae.harvest.corpus.texts import TextCounts, read_documents
from routesae.harvest.corpus.tokens import Fingerprint, framing, pack, tokenize
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import Progress, Report, WrongInput

log = logging.getLogger(__name__)

ROWS_A_WRITE = 4 * arrays.CHUNK_ROWS


def write_tokens(folder: Path, settings: HarvestSettings, tokenizer: Any, report: Report) -> dict[str, Any]:
    """Write tokens/ and document_starts/ below `folder`; return the manifest's fields about them."""
    counts, fingerprint, frame = TextCounts(), Fingerprint(), framing(tokenizer)
    documents = read_documents(
        settings.data,
        text_field=settings.text_field,
        split=settings.split,
        config=settings.data_config,
        min_chars=settings.min_chars,
        seed=settings.seed,
        counts=counts,
    )
    documents_ids = tokenize(fingerprint.hashing(documents), tokenizer, frame)
    wanted = settings.tokens // settings.context  # no document is read beyond what these rows need
    packed = islice(pack(documents_ids, context=settings.context, row_start=frame.row_start), wanted)
    dropped = () if settings.keep_special else frame.special_ids
    starts, chunks = list[int](), list[arrays.ChunkHashes]()
    kept = rows = 0
    with arrays.ArrayWriter(folder / "tokens", (settings.context,), "<i4") as writer:
        while block := list(islice(packed, ROWS_A_WRITE)):
            for row in block:
                starts += [rows * settings.context + start for start in row.document_starts]
                rows += 1
            token_ids_BT = np.stack([row.token_ids_T for row in block])
            is_kept_BT = kept_positions(token_ids_BT, dropped_ids=dropped, skip_positions=settings.skip_positions)
            kept += int(is_kept_BT.sum())
            writer.write(token_ids_BT)
            chunks.append(arrays.chunk_hashes(token_ids_BT))
            facts = {"documents": f"{counts.documents:,}"}
            report(Progress("tokenise", rows * settings.context, settings.tokens, "tokens", facts))
        counts.check_malformed()
        if counts.documents == 0:
            short = f"{counts.short} were empty or shorter than --min-chars {settings.min_chars}"
            raise WrongInput(f"corpus {settings.data} has no document to use; {short}")
        if rows == 0:
            raise WrongInput(
                f"corpus {settings.data} is too small for one row of {settings.context} tokens; "
                "give a smaller --context or more text"
            )
    if rows < wanted:
        held = f"{rows * settings.context:,} tokens, not the {settings.tokens:,} asked for; all of them are used"
        log.warning("%s holds %s", settings.data, held)
    document_starts = np.array(starts, "<i8")
    arrays.write_array(folder / "document_starts", document_starts, chunk_rows=max(1, len(starts)))
    return {
        "rows": rows,
        "kept_tokens": kept,
        "tokens_hash": arrays.hash_of(np.concatenate(chunks)),
        "document_starts_hash": arrays.array_hash(document_starts),
        "special_ids": frame.special_ids,
        "corpus_fingerprint": fingerprint.hexdigest(),
        "documents": len(starts),
        "documents_short": counts.short,
        "documents_malformed": len(counts.malformed),
    }
