"""Read and write the contexts of an SAE, in a folder of its own for each corpus.

    contexts/CORPUS-HASH/
      contexts.parquet   a row a context, ordered by latent, kind and rank, with its tokens and their activations
      latents.parquet    a row a latent, all F of them
      contexts.json      those that were chosen, in the shape of the published RouteSAE code, for people and its tools
      facts.json         what all three were made from, and their hashes; written last

Dimension letters: F latents.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
from pydantic import AliasPath, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from routesae.machine.files import file_hash, read_signed, reading, refuse_link, replacing, signed, write_json
from routesae.reporting import WrongInput, visible

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 3  # 2 did not say where documents are from
FOLDER, CONTEXTS, LATENTS, PUBLISHED = "contexts", "contexts.parquet", "latents.parquet", "contexts.json"
PARTS = (CONTEXTS, LATENTS, PUBLISHED)
FACTS = "facts.json"
REMEDY = "run routesae contexts again"
CHOSEN, TOP, SAMPLES = "chosen", "top", ("strong", "middle", "weak")
KINDS = (CHOSEN, TOP, *SAMPLES)
BINS_PER_OCTAVE = 4
HISTOGRAM = range(-8 * BINS_PER_OCTAVE, 16 * BINS_PER_OCTAVE)  # bins: activations from 2^-8 to 2^16
OPENING, CLOSING = "<ACTIVATED>", "</ACTIVATED>"  # the published code's marks
MOST_VALUES = 1 << 26  # of a column in a row group, of which few are held in memory at a time


@dataclass(frozen=True, kw_only=True)
class Context:
    """One activation and the text around it.

    kind: "chosen", "top", or the third of the sample it is in. layer: that it was read from, or None.
    row, position: of the token in the cache's tokens. document: index into its document_starts, or None in front of
    the first. role: of the message that spells the token, or None. place, fields: where its document is from, and
    what was kept. at: index of the token in the window. tokens: the window's text, exact when joined. activations:
    of the latent on each of them.
    """

    kind: str
    token_class: str
    activation: float
    layer: int | None
    row: int
    position: int
    document: int | None
    role: str | None = None
    place: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    at: int
    token_ids: Sequence[int]
    tokens: Sequence[str]
    activations: Sequence[float]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Context:
        values = {name: row[name] for name in cls.__dataclass_fields__}
        context = cls(**{**values, "fields": dict(row["fields"] or ())})
        if not 0 <= context.at < len(context.tokens) == len(context.token_ids) == len(context.activations):
            raise ValueError(f"latent {row['latent']} has a context of no token, or of uneven lists")
        return context

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def word(self) -> str:
        """The text of the token, with that of the others that share characters with it."""
        return "".join(self.tokens[self._word.start : self._word.stop])

    @cached_property
    def _word(self) -> range:
        return next(word for word in words_of(self.tokens) if self.at in word)

    def marked(self, opening: str = OPENING, closing: str = CLOSING) -> str:
        """The text with marks around the word."""
        before, behind = "".join(self.tokens[: self._word.start]), "".join(self.tokens[self._word.stop :])
        return f"{before}{opening}{self.word}{closing}{behind}"


def words_of(tokens: Sequence[str]) -> list[range]:
    """Divide tokens into words, at the ends of characters: ranges of one token, or of all that share characters.

    A character is what a reader takes for one, a grapheme cluster (Unicode UAX 29) such as नि or が. Where several
    tokens make one, the last of them has its text and the others have none.
    """
    if all(tokens) and all(token.isascii() for token in tokens):
        return [range(at, at + 1) for at in range(len(tokens))]
    ends = {character.end() for character in regex.finditer(r"\X", "".join(tokens))}
    words, first, begin, end = [], 0, 0, 0
    for at, token in enumerate(tokens):
        end += len(token)
        if end > begin and end in ends:
            words.append(range(first, at + 1))
            first, begin = at + 1, end
    if first < len(tokens):
        words.append(range(words.pop().start if words else 0, len(tokens)))
    return words


@dataclass(frozen=True, kw_only=True)
class LatentSummary:
    """One latent over the whole cache.

    active: readings it is > 0 on (a token is one, for mlsae and random one a layer). density: their share.
    mean_activation: over them. token_classes: above the threshold, or max_classes + 1 if there are more. kept: by the
    published rule. histogram: how many of them are in bins histogram_first, histogram_first + 1 …; bin b holds those
    from 2^(b/4) to 2^((b+1)/4), the lowest and highest of HISTOGRAM also what is beyond.
    """

    latent: int
    active: int
    density: float
    max_activation: float
    mean_activation: float
    token_classes: int
    kept: bool
    histogram_first: int
    histogram: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class LatentContexts:
    """A latent's contexts, strongest first.

    chosen: by the rule, which may leave the latent out, or the strongest. top: the strongest of all. samples: thirds
    of a uniform sample of its activations, under "strong", "middle" and "weak".
    """

    summary: LatentSummary
    chosen: tuple[Context, ...]
    top: tuple[Context, ...]
    samples: Mapping[str, tuple[Context, ...]]

    @property
    def latent(self) -> int:
        return self.summary.latent


class Facts(BaseModel):
    """What facts.json must say; the rest of it is not looked at."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    path: str = Field(validation_alias=AliasPath("cache", "path"))
    tokens_hash: str = Field(validation_alias=AliasPath("cache", "tokens_hash"))
    corpus: str = Field(validation_alias=AliasPath("cache", "corpus"))
    threshold: float = Field(validation_alias=AliasPath("settings", "threshold"))
    choose: str = Field(validation_alias=AliasPath("settings", "choose"))
    folder: str = Field(validation_alias=AliasPath("sae", "folder"))
    weights: dict[str, str] = Field(validation_alias=AliasPath("sae", "weights"))
    readings: PositiveInt
    features: NonNegativeInt
    hashes: dict[str, str]


class ContextsFile:
    """What `routesae contexts` wrote of an SAE: facts and summaries at hand, contexts read as they are asked for.

    folder: the SAE's. place: theirs. fingerprint: xxh3-128 of contexts.parquet.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], summaries: tuple[LatentSummary, ...]):
        self.folder, self.facts, self.summaries = folder, facts, summaries
        self.place = place_of(folder, facts["cache"])
        self.fingerprint: str = facts["hashes"][CONTEXTS]

    def latents(self, selected: Collection[int] | None = None) -> Iterator[LatentContexts]:
        """Those that have a context, ascending; only `selected` ones if given. Raises WrongInput on damage."""
        import pyarrow as pa

        with reading(self.place / CONTEXTS, REMEDY, pa.ArrowException):
            for latent, rows in groupby(self._rows(selected), key=itemgetter("latent")):
                if not 0 <= latent < len(self.summaries):
                    raise ValueError(f"there is no latent {latent}")
                contexts = [Context.of_row(row) for row in rows]
                kinds = {kind: tuple(c for c in contexts if c.kind == kind) for kind in KINDS}
                chosen, top = kinds.pop(CHOSEN), kinds.pop(TOP)
                yield LatentContexts(summary=self.summaries[latent], chosen=chosen, top=top, samples=kinds)

    def _rows(self, selected: Collection[int] | None) -> Iterator[dict[str, Any]]:
        """In the order of the file, which is the latents'. A row group without a selected latent is not read."""
        import pyarrow.compute as pc
        import pyarrow.dataset as ds

        # Without these bounds Arrow reads most of the file ahead.
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True, pre_buffer=False)
        how = ds.ParquetFileFormat(default_fragment_scan_options=options)
        ahead: dict[str, Any] = {"batch_size": 4096, "batch_readahead": 1, "fragment_readahead": 1}
        wanted = None if selected is None else pc.field("latent").isin(sorted(set(selected)))
        for batch in ds.dataset(self.place / CONTEXTS, format=how).to_batches(filter=wanted, **ahead):
            for name in batch.schema.names:
                if name not in ("layer", "document", "role", "place", "fields") and batch[name].null_count:
                    raise ValueError(f"{name} is missing in a row")
            yield from batch.to_pylist()


def place_of(folder: Path, cache: Mapping[str, Any]) -> Path:
    """The folder of an SAE's contexts of a corpus. cache: its manifest, as a mapping."""
    name = re.sub(r"[^\w.-]+", "-", Path(str(cache["corpus"])).name, flags=re.ASCII).strip("-.")[:40]
    return folder / FOLDER / f"{name or 'corpus'}-{cache['tokens_hash'][:8]}"


def read_contexts(folder: Path, tokens_hash: str | None = None) -> ContextsFile | None:
    """The contexts in an SAE's folder, or None, see `read_facts`. Raises WrongInput if they are damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = read_facts(folder, tokens_hash)
    if facts is None:
        return None
    place = place_of(folder, facts["cache"])
    for name, schema in ((CONTEXTS, context_schema()), (LATENTS, latent_schema()), (PUBLISHED, None)):
        with reading(place / name, REMEDY, pa.ArrowException):
            if file_hash(place / name) != facts["hashes"].get(name):
                raise ValueError(f"it is not the one that {FACTS} is about")
            if schema is not None:
                _require_bounds(place / name, schema)
    with reading(place / LATENTS, REMEDY, pa.ArrowException):
        table = pq.read_table(place / LATENTS, page_checksum_verification=True)
        if any(column.null_count for column in table.columns):
            raise ValueError("a value is missing")
        summaries = tuple(LatentSummary(**row) for row in table.to_pylist())
        if [summary.latent for summary in summaries] != list(range(len(summaries))):
            raise ValueError("its latents are not numbered from 0")
    return ContextsFile(folder, facts, summaries)


def read_facts(folder: Path, tokens_hash: str | None = None) -> dict[str, Any] | None:
    """What an SAE's contexts came from, or None if there are none.

    tokens_hash: of the corpus; without it there must be contexts of one corpus only. Raises WrongInput if they are of
    several, or damaged.
    """
    places = sorted(path.parent for path in folder.glob(f"{FOLDER}/*/{FACTS}"))
    if tokens_hash is not None:
        places = [place for place in places if place.name.endswith(f"-{tokens_hash[:8]}")]
    if len(places) > 1:
        names = ", ".join(visible(place.name) for place in places)
        raise WrongInput(f"{folder} has contexts of several corpora, {names}; say which with --cache")
    if not places:
        return None
    with reading(places[0] / FACTS, REMEDY):
        facts = read_signed(places[0] / FACTS)
        if facts.get("format") != FORMAT:
            raise ValueError(f"it has format {facts.get('format')!r}, and only {FORMAT} is read")
        Facts.model_validate(facts)
        if place_of(folder, facts["cache"]) != places[0]:
            raise ValueError("it is in the folder of another corpus")
        return facts


def _require_bounds(path: Path, schema: pa.Schema) -> None:
    """Raises ValueError if a Parquet file has other columns, or claims more than is ever written.

    A few bytes of it can stand for any number of rows.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.remove_metadata().equals(schema):
            raise ValueError("its columns are others")
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            values = max(group.column(column).num_values for column in range(group.num_columns))
            if not 0 <= group.num_rows <= values <= MOST_VALUES:
                raise ValueError(f"it claims {values:,} values at a time, and at most {MOST_VALUES:,} are read")


def write_contexts(
    folder: Path, facts: Mapping[str, Any], summaries: pa.Table, contexts: Iterator[pa.RecordBatch]
) -> Path:
    """Write the files of a corpus into an SAE's folder, the facts last, and return where they are.

    summaries: the columns of LatentSummary, a row a latent. contexts: whole latents a batch, in the file's order.
    """
    import pyarrow.parquet as pq

    place = place_of(folder, facts["cache"])
    refuse_link(place.parent)
    refuse_link(place)
    place.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    settings = facts["settings"]
    head = {
        "total_latents": facts["chosen"],
        "threshold": settings["threshold"],
        "max_length": settings["window"],
        "max_per_token": settings["per_class"],
        "lines": settings["min_contexts"] - 1,  # the published code keeps latents with more contexts than this
        "routesae": facts,
    }
    with ExitStack() as stack:
        files = {name: stack.enter_context(replacing(place / name)) for name in PARTS}
        pq.write_table(summaries, files[LATENTS], **how)
        published = files[PUBLISHED]
        with (
            pq.ParquetWriter(files[CONTEXTS], context_schema(), **how) as parquet,
            tempfile.TemporaryFile() as samples,
        ):
            published.write(f'{json.dumps(head)[:-1]},\n"latent_context_map": {{'.encode())
            comma = ""
            for batch in contexts:
                parquet.write_batch(batch)
                for latent, by_class, by_kind in _published(batch.to_pylist()):
                    published.write(f'{comma}\n"{latent}": {json.dumps(by_class)}'.encode())
                    samples.write(f'{comma}\n"{latent}": {json.dumps(by_kind)}'.encode())
                    comma = ","
            published.write(b'\n},\n"latent_sample_map": {')
            samples.seek(0)
            shutil.copyfileobj(samples, published)
            published.write(b"\n}}\n")
        for file in files.values():
            file.flush()
        hashes = {name: file_hash(Path(file.name)) for name, file in files.items()}
    write_json(place / FACTS, signed({**facts, "hashes": hashes}))
    return place


def _published(rows: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Each latent that was chosen: its contexts by token class, and its samples by kind."""
    for latent, of_latent in groupby(rows, key=itemgetter("latent")):
        by_class: dict[str, list[Any]] = {}
        by_kind: dict[str, list[Any]] = {kind: [] for kind in SAMPLES}
        for row in of_latent:
            if row["kind"] == TOP:
                continue
            context = Context.of_row(row)
            entry = {"context": context.marked(), "activation": context.activation}
            entry |= {
                name: getattr(context, name) for name in ("layer", "row", "position", "document", "role", "place")
            }
            entry |= {"fields": dict(context.fields)}
            if context.kind == CHOSEN:
                by_class.setdefault(context.token_class, []).append(entry)
            else:
                by_kind[context.kind].append(entry)
        if by_class:
            yield latent, dict(sorted(by_class.items())), by_kind


def context_schema() -> pa.Schema:
    """The columns of contexts.parquet."""
    import pyarrow as pa

    columns = {
        pa.int32(): ("latent", "rank", "row", "position"),
        pa.string(): ("kind", "token_class", "role", "place"),
        pa.map_(pa.string(), pa.string()): ("fields",),
        pa.int16(): ("layer", "at"),
        pa.int64(): ("document",),
        pa.float32(): ("activation",),
        pa.list_(pa.int32()): ("token_ids",),
        pa.list_(pa.string()): ("tokens",),
        pa.list_(pa.float32()): ("activations",),
    }
    return pa.schema([(name, kind) for kind, names in columns.items() for name in names])


def latent_schema() -> pa.Schema:
    """The columns of latents.parquet: those of LatentSummary."""
    import pyarrow as pa

    columns = {
        pa.int32(): ("latent", "token_classes"),
        pa.int64(): ("active",),
        pa.float64(): ("density", "mean_activation"),
        pa.float32(): ("max_activation",),
        pa.bool_(): ("kept",),
        pa.int16(): ("histogram_first",),
        pa.list_(pa.int64()): ("histogram",),
    }
    return pa.schema([(name, kind) for kind, names in columns.items() for name in names])
