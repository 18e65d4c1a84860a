"""Contexts on disk, beside the SAE they are of: written by `routesae contexts`, for what explains or shows them.

    contexts.parquet   a row a context, ordered by latent, kind and rank, with its tokens and their activations
    latents.parquet    a row a latent, all F of them
    contexts.json      those that were chosen, in the shape of the published RouteSAE code, for people and its tools

Both Parquet files carry the facts of the run in their metadata. Dimension letters: F latents.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from routesae.machine.files import parse_json
from routesae.reporting import WrongInput

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
CONTEXTS, LATENTS, PUBLISHED = "contexts.parquet", "latents.parquet", "contexts.json"
FACTS = b"routesae"
CHOSEN, SAMPLES = "chosen", ("strong", "middle", "weak")
KINDS = (CHOSEN, *SAMPLES)
OPENING, CLOSING = "<ACTIVATED>", "</ACTIVATED>"  # the published code's marks
_READ_ROWS = 4096
MOST_VALUES = 1 << 26  # of a column in a row group, of which one is held in memory at a time


@dataclass(frozen=True, kw_only=True)
class Context:
    """One activation and the text around it.

    kind: "chosen", or the third of the sample it is of. layer: that it was read from; None where it was not one.
    row, position: of the token in the cache's tokens. document: index into its document_starts; None in front of the
    first. at: index of the token in the window. tokens: the window's text, exact when joined. activations: of the
    latent on each of them.
    """

    kind: str
    token_class: str
    activation: float
    layer: int | None
    row: int
    position: int
    document: int | None
    at: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    def marked(self, opening: str = OPENING, closing: str = CLOSING) -> str:
        """The text with marks around the token."""
        before, after = "".join(self.tokens[: self.at]), "".join(self.tokens[self.at + 1 :])
        return f"{before}{opening}{self.tokens[self.at]}{closing}{after}"


@dataclass(frozen=True, kw_only=True)
class LatentSummary:
    """One latent over the whole cache.

    active: rows it is > 0 on (a token is one row, for mlsae and random one a layer). density: their share.
    mean_activation: over those rows. token_classes: above the threshold; max_classes + 1 where there are more.
    kept: whether the published rule keeps it.
    """

    latent: int
    active: int
    density: float
    max_activation: float
    mean_activation: float
    token_classes: int
    kept: bool


@dataclass(frozen=True, kw_only=True)
class LatentContexts:
    """A latent's contexts, strongest first. chosen: () where the rule leaves the latent out.

    samples: thirds of a uniform sample of its activations, under "strong", "middle" and "weak".
    """

    summary: LatentSummary
    chosen: tuple[Context, ...]
    samples: Mapping[str, tuple[Context, ...]]

    @property
    def latent(self) -> int:
        return self.summary.latent


# --------------------------------------------------------------------------------------------------- reading


class ContextsFile:
    """What `routesae contexts` wrote into a folder: facts and summaries at hand, contexts read as they are asked for.

    fingerprint: xxh3-128 of contexts.parquet.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], summaries: tuple[LatentSummary, ...]):
        self.folder, self.facts, self.summaries = folder, facts, summaries
        self.fingerprint = _fingerprint(folder / CONTEXTS)

    def latents(self, wanted: Collection[int] | None = None) -> Iterator[LatentContexts]:
        """Ascending, those that have a context; only `wanted` where given. Raises WrongInput where it is damaged."""
        for latent, rows in groupby(self._rows(wanted), key=itemgetter("latent")):
            if not 0 <= latent < len(self.summaries):
                raise damaged(self.folder / CONTEXTS, ValueError(f"there is no latent {latent}"))
            contexts = [_context(row) for row in rows]
            kinds = {kind: tuple(c for c in contexts if c.kind == kind) for kind in KINDS}
            yield LatentContexts(summary=self.summaries[latent], chosen=kinds.pop(CHOSEN), samples=kinds)

    def _rows(self, wanted: Collection[int] | None) -> Iterator[dict[str, Any]]:
        """In the order of the file, which is the latents'. A row group that holds none of `wanted` is not read."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        ascending = None if wanted is None else sorted(set(wanted))
        try:
            with pq.ParquetFile(self.folder / CONTEXTS) as file:
                for group in range(file.num_row_groups):
                    if ascending is not None and not _has_any(file.metadata.row_group(group), ascending):
                        continue
                    rows = file.read_row_group(group)
                    _require_values(rows)
                    if ascending is not None:
                        rows = rows.filter(pc.is_in(rows["latent"], pa.array(ascending, pa.int32())))
                    for batch in rows.to_batches(max_chunksize=_READ_ROWS):
                        yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(self.folder / CONTEXTS, error) from error


def read_contexts(folder: Path) -> ContextsFile:
    """The contexts in an SAE's folder. Raises WrongInput where there are none, or they are damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = read_facts(folder)
    if facts is None:
        raise WrongInput(f"{folder} has no {CONTEXTS}; make it with routesae contexts --sae {folder}")
    try:
        _require_bounds(folder / CONTEXTS, context_schema())
        _require_bounds(folder / LATENTS, None)
        table = pq.read_table(folder / LATENTS)
        summaries = tuple(LatentSummary(**row) for row in table.to_pylist())
        if [summary.latent for summary in summaries] != list(range(len(summaries))):
            raise ValueError("its latents are not numbered from 0")
    except FileNotFoundError:
        raise WrongInput(f"{folder / LATENTS} is missing; run routesae contexts again") from None
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise damaged(folder / LATENTS, error) from error
    if json.loads((table.schema.metadata or {}).get(FACTS, b"null")) != facts:
        raise WrongInput(f"{folder / LATENTS} and {CONTEXTS} are of two runs; run routesae contexts again")
    return ContextsFile(folder, facts, summaries)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What the contexts in `folder` came from; None where there are none. Raises WrongInput where it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / CONTEXTS
    if not path.is_file():
        return None
    try:
        facts: dict[str, Any] = parse_json((pq.read_metadata(path).metadata or {})[FACTS])
        found = facts["format"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    if found != FORMAT:
        raise WrongInput(f"{path} is of format {found}, not {FORMAT}, the one read here; run routesae contexts again")
    return facts


def _require_bounds(path: Path, schema: pa.Schema | None) -> None:
    """Raises ValueError where a Parquet file has other columns, or claims more than is ever written.

    A few bytes of it can stand for any number of rows.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if schema is not None and not file.schema_arrow.remove_metadata().equals(schema):
            raise ValueError("its columns are others")
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            values = max(group.column(column).num_values for column in range(group.num_columns))
            if not 0 <= group.num_rows <= values <= MOST_VALUES:
                raise ValueError(
                    f"it claims {values:,} values at a time, more than the {MOST_VALUES:,} that are read"
                )


def _require_values(rows: pa.Table) -> None:
    """Raises ValueError where a column that is always filled is not."""
    for name in rows.column_names:
        if name not in ("layer", "document") and rows[name].null_count:
            raise ValueError(f"{name} is missing in a row")


def damaged(path: Path, why: Exception) -> WrongInput:
    reason = (str(why).strip() or type(why).__name__).splitlines()[0]
    return WrongInput(f"{path} cannot be read ({reason}); run routesae contexts again")


def _fingerprint(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()


def _has_any(group: Any, ascending: Sequence[int]) -> bool:
    """Whether a row group, by its metadata, may hold one of the latents. A file without statistics is read whole."""
    found = group.column(context_schema().get_field_index("latent")).statistics
    if found is None or not found.has_min_max:
        return True
    at = bisect_left(ascending, found.min)
    return at < len(ascending) and ascending[at] <= found.max


_LISTS = ("token_ids", "tokens", "activations")


def _context(row: Mapping[str, Any]) -> Context:
    named = {field.name: row[field.name] for field in fields(Context)}
    return Context(**{**named, **{name: tuple(named[name]) for name in _LISTS}})


# --------------------------------------------------------------------------------------------------- writing


def write_contexts(
    folder: Path, facts: Mapping[str, Any], summaries: pa.Table, contexts: Iterator[pa.RecordBatch]
) -> None:
    """Write the three files, each whole or not at all. contexts: whole latents a batch, in the order of the file.

    summaries: the columns of LatentSummary, a row a latent.
    """
    import pyarrow.parquet as pq

    metadata = {FACTS: json.dumps(facts)}
    partial = {name: folder / f".{name}.partial" for name in (CONTEXTS, LATENTS, PUBLISHED)}
    pq.write_table(summaries.replace_schema_metadata(metadata), partial[LATENTS], compression="zstd")
    schema = context_schema().with_metadata(metadata)
    settings = facts["settings"]
    head = {
        "total_latents": facts["chosen"],
        "threshold": settings["threshold"],
        "max_length": settings["window"],
        "max_per_token": settings["per_class"],
        "lines": settings["min_contexts"] - 1,  # the published code keeps latents with more contexts than this
        "routesae": facts,
    }
    with (
        pq.ParquetWriter(partial[CONTEXTS], schema, compression="zstd") as parquet,
        partial[PUBLISHED].open("w", encoding="utf-8") as published,
        tempfile.TemporaryFile("w+", encoding="utf-8") as samples,
    ):
        published.write(json.dumps(head)[:-1] + ',\n"latent_context_map": {')
        comma = ""
        for batch in contexts:
            parquet.write_batch(batch.replace_schema_metadata(metadata))
            for latent, by_class, by_kind in _published(batch.to_pylist()):
                published.write(f'{comma}\n"{latent}": {json.dumps(by_class)}')
                samples.write(f'{comma}\n"{latent}": {json.dumps(by_kind)}')
                comma = ","
        published.write('\n},\n"latent_sample_map": {')
        samples.seek(0)
        for line in samples:
            published.write(line)
        published.write("\n}}\n")
    for name, path in partial.items():
        path.replace(folder / name)


def _published(rows: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Each latent that was chosen: its contexts by token class, and its samples by kind."""
    for latent, of_latent in groupby(rows, key=itemgetter("latent")):
        by_class: dict[str, list[Any]] = {}
        by_kind: dict[str, list[Any]] = {kind: [] for kind in SAMPLES}
        for row in of_latent:
            context = _context(row)
            entry = {"context": context.marked(), "activation": context.activation}
            entry |= {name: getattr(context, name) for name in ("layer", "row", "position", "document")}
            place = by_class.setdefault(context.token_class, []) if context.kind == CHOSEN else by_kind[context.kind]
            place.append(entry)
        if by_class:
            yield latent, dict(sorted(by_class.items())), by_kind


def context_schema() -> pa.Schema:
    """The columns of contexts.parquet."""
    import pyarrow as pa

    return pa.schema(
        [
            ("latent", pa.int32()),
            ("kind", pa.string()),
            ("rank", pa.int32()),
            ("token_class", pa.string()),
            ("activation", pa.float32()),
            ("layer", pa.int16()),
            ("row", pa.int32()),
            ("position", pa.int32()),
            ("document", pa.int64()),
            ("at", pa.int16()),
            ("token_ids", pa.list_(pa.int32())),
            ("tokens", pa.list_(pa.string())),
            ("activations", pa.list_(pa.float32())),
        ]
    )
