"""Tokenise and pack the whole corpus onto the disk, before any LM runs over it.

Dimension letters: S rows of tokens, T context, B rows a write.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from routesae.harvest.cache import arrays
from routesae.harvest.cache.manifest import DOCUMENTS, ROLES, STARTS, TOKENS, kept_positions
from routesae.harvest.cache.reader import LARGEST_DOCUMENTS
from routesae.harvest.corpus.texts import TextCounts, read_documents
from routesae.harvest.corpus.tokens import Framing, Tokenised, framing, hashing, pack, tokenize
from routesae.harvest.settings import PROVENANCE, HarvestSettings
from routesae.machine.files import file_hash
from routesae.reporting import Progress, Report, WrongInput, human_bytes

log = logging.getLogger(__name__)

ROWS_A_WRITE = 4 * arrays.CHUNK_ROWS
# Less what Parquet writes at the end: 200 bytes a column and write.
MOST_DOCUMENT_BYTES = LARGEST_DOCUMENTS - (1 << 28)


def write_tokens(folder: Path, settings: HarvestSettings, tokenizer: Any, report: Report) -> dict[str, Any]:
    """Write all that a cache has beside its shards below `folder`; return the manifest's fields about it.

    Raises WrongInput for a corpus that gives nothing to keep, and as `read_documents`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame, fingerprint, roles = framing(tokenizer), xxhash.xxh3_128(), dict[str, int]()
    counts = {data: TextCounts() for data in settings.data}
    documents = hashing(_mixed(settings, tokenizer, frame, counts, roles), fingerprint)
    packed = pack(documents, context=settings.context, row_start=frame.row_start)
    packed = islice(packed, settings.tokens // settings.context)  # no document is read beyond what these rows need
    keeps: dict[str, Any] = {name: getattr(settings, name) for name in ("skip_positions", "keep_roles")}
    keeps["dropped_ids"] = () if settings.keep_special else frame.special_ids
    starts, chunks, fields_seen = list[int](), list[tuple[arrays.ChunkHashes, arrays.ChunkHashes]](), set[str]()
    kept = rows = 0
    schema = pa.schema([(name, pa.string()) for name in (*PROVENANCE, *settings.keep_fields)])
    with (
        arrays.ArrayWriter(folder / TOKENS, (settings.context,), "<i4") as tokens,
        arrays.ArrayWriter(folder / ROLES, (settings.context,), "|u1") as of_tokens,
        pq.ParquetWriter(folder / "documents", schema, compression="zstd") as provenance,
    ):
        while block := list(islice(packed, ROWS_A_WRITE)):
            begun = [(number, *start) for number, row in enumerate(block, rows) for start in row.starts]
            starts += [number * settings.context + position for number, position, _ in begun]
            places = [{"data": one.data, "place": one.place, **one.fields} for _, _, one in begun]
            provenance.write_table(pa.Table.from_pylist(places, schema))
            if (folder / "documents").stat().st_size > MOST_DOCUMENT_BYTES:
                fields, most = ",".join(settings.keep_fields) or "(none)", human_bytes(MOST_DOCUMENT_BYTES)
                raise WrongInput(
                    f"--keep-fields {fields} and the places of {len(starts):,} documents take over {most}, the most "
                    "that is read of a cache; keep fewer or shorter fields, or give fewer --tokens"
                )
            fields_seen |= {name for place in places for name, value in place.items() if value is not None}
            if rows == 0:  # what no document has is refused at the end, which may be hours away
                _remark_on_slips("--keep-fields", set(settings.keep_fields) - fields_seen, len(starts))
                _remark_on_slips("--keep-roles", set(settings.keep_roles) - set(roles), len(starts))
            token_ids_BT = np.stack([row.token_ids_T for row in block])
            roles_BT = np.stack([row.roles_T for row in block])
            kept += int(kept_positions(token_ids_BT, roles_ST=roles_BT, roles=tuple(roles), **keeps).sum())
            tokens.write(token_ids_BT)
            of_tokens.write(roles_BT)
            chunks.append((arrays.chunk_hashes(token_ids_BT), arrays.chunk_hashes(roles_BT)))
            rows += len(block)
            facts = {"documents": f"{sum(count.documents for count in counts.values()):,}"}
            report(Progress("tokenise", rows * settings.context, settings.tokens, "tokens", facts))
    _require_use(settings, counts, rows, kept, fields_seen, [*roles])
    document_starts = np.array(starts, "<i8")
    arrays.write_array(folder / STARTS, document_starts, chunk_rows=max(1, len(starts)))
    (folder / "documents").rename(folder / DOCUMENTS)
    tokens_hash, roles_hash = (arrays.hash_of(np.concatenate(hashes)) for hashes in zip(*chunks, strict=True))
    return {
        "rows": rows,
        "kept_tokens": kept,
        "tokens_hash": tokens_hash,
        "roles_hash": roles_hash,
        "document_starts_hash": arrays.array_hash(document_starts),
        "documents_hash": file_hash(folder / DOCUMENTS, xxhash.xxh3_64),
        "special_ids": frame.special_ids,
        "roles": tuple(roles),
        "corpus_fingerprint": fingerprint.hexdigest(),
        "documents": len(starts),
        "documents_short": sum(count.short for count in counts.values()),
        "documents_malformed": sum(len(count.malformed) for count in counts.values()),
    }


def _remark_on_slips(flag: str, absent: set[str], seen: int) -> None:
    """Warn of names that none of the documents seen so far has."""
    for name in sorted(absent):
        log.warning("%s %s: none of the first %d documents has it; if it is misspelt, stop now", flag, name, seen)


def _require_use(
    settings: HarvestSettings, counts: dict[str, TextCounts], rows: int, kept: int, fields: set[str], roles: list[str]
) -> None:
    """Raise WrongInput if the corpora gave nothing to keep, FailedRun if too much of one is malformed.

    rows: how many were packed, and kept: positions of them. fields, roles: those that some document has.
    """
    corpus, wanted = settings.corpus, settings.tokens // settings.context
    for data, count in counts.items():
        count.check_malformed()
        if count.documents == 0 and rows < wanted:
            short = f"{count.short} were empty or shorter than --min-chars {settings.min_chars}"
            raise WrongInput(f"corpus {data} has no document to use; {short}")
    if rows == 0:
        few = f"too small for one row of {settings.context} tokens; give a smaller --context or more text"
        raise WrongInput(f"corpus {corpus} is {few}")
    if absent := set(settings.keep_fields).difference(fields):
        raise WrongInput(f"--keep-fields {min(absent)}: no document of {corpus} has that field")
    if absent := set(settings.keep_roles).difference(roles):
        there = ", ".join(roles) or "no conversations"
        raise WrongInput(f"--keep-roles {min(absent)}: no token is of such a role; {corpus} has {there}")
    if kept == 0:
        raise WrongInput(f"corpus {corpus} has no token to keep: all are special, or left out by --skip-positions")
    if rows < wanted:
        held = f"{rows * settings.context:,} tokens, not the {settings.tokens:,} asked for; all of them are used"
        log.warning("%s holds %s", corpus, held)


def _mixed(
    settings: HarvestSettings, tokenizer: Any, frame: Framing, counts: dict[str, TextCounts], roles: dict[str, int]
) -> Iterator[Tokenised]:
    """The documents of the corpora: each time the next of the one that has least of its share of the tokens.

    It ends with the corpus that ends first, so that the shares are those asked for, to within a document each.
    """
    asked: dict[str, Any] = {"roles": roles, "needs_roles": bool(settings.keep_roles)}
    sources = {
        data: tokenize(read_documents(data, settings, count), tokenizer, frame, counts=count, **asked)
        for data, count in counts.items()
    }
    shares = dict(zip(sources, settings.mix or (1.0,), strict=True))
    taken = dict.fromkeys(sources, 0.0)  # tokens over the share
    while True:
        source = min(taken, key=lambda name: taken[name])  # of equals the first
        if (document := next(sources[source], None)) is None:
            if len(sources) > 1:
                log.warning("%s has no more documents: the mix ends with it", source)
            return
        taken[source] += len(document.token_ids_T) / shares[source]
        yield document
