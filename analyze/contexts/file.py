"""Read and write the contexts of an SAE, in the SAE's folder.

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

import regex

from routesae.analyze.inputs.identity import file_hash
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
MOST_VALUES = 1 << 26  # of a column in a row group, of which one is held in memory at a time


@dataclass(frozen=True, kw_only=True)
class Context:
    """One activation and the text around it.

    kind: "chosen", or the third of the sample it is in. layer: that it was read from, or None if it was not one.
    row, position: of the token in the cache's tokens. document: index into its document_starts, or None in front of
    the first. at: index of the token in the window. tokens: the window's text, exact when joined. activations: of the
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

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Context:
        values = {field.name: row[field.name] for field in fields(cls)}
        listed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**listed)

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def word(self) -> str:
        """The text of the token, with that of the others that share characters with it."""
        (word,) = (word for word in words_of(self.tokens) if self.at in word)
        return "".join(self.tokens[word.start : word.stop])

    def marked(self, opening: str = OPENING, closing: str = CLOSING) -> str:
        """The text with marks around the word."""
        (word,) = (word for word in words_of(self.tokens) if self.at in word)
        before, behind = "".join(self.tokens[: word.start]), "".join(self.tokens[word.stop :])
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
    published rule.
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
    """A latent's contexts, strongest first. chosen: empty if the rule leaves the latent out.

    samples: thirds of a uniform sample of its activations, under "strong", "middle" and "weak".
    """

    summary: LatentSummary
    chosen: tuple[Context, ...]
    samples: Mapping[str, tuple[Context, ...]]

    @property
    def latent(self) -> int:
        return self.summary.latent


class ContextsFile:
    """What `routesae contexts` wrote into a folder: facts and summaries at hand, contexts read as they are asked for.

    fingerprint: xxh3-128 of contexts.parquet.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], summaries: tuple[LatentSummary, ...]):
        self.folder, self.facts, self.summaries = folder, facts, summaries
        self.fingerprint = file_hash(folder / CONTEXTS)

    def latents(self, selected: Collection[int] | None = None) -> Iterator[LatentContexts]:
        """Those that have a context, ascending; only `selected` ones if given. Raises WrongInput on damage."""
        for latent, rows in groupby(self._rows(selected), key=itemgetter("latent")):
            if not 0 <= latent < len(self.summaries):
                raise damaged(self.folder / CONTEXTS, ValueError(f"there is no latent {latent}"))
            contexts = [Context.of_row(row) for row in rows]
            kinds = {kind: tuple(c for c in contexts if c.kind == kind) for kind in KINDS}
            yield LatentContexts(summary=self.summaries[latent], chosen=kinds.pop(CHOSEN), samples=kinds)

    def _rows(self, selected: Collection[int] | None) -> Iterator[dict[str, Any]]:
        """In the order of the file, which is the latents'. A row group without a selected latent is not read."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        ascending = None if selected is None else sorted(set(selected))
        column = context_schema().get_field_index("latent")
        try:
            with pq.ParquetFile(self.folder / CONTEXTS) as file:
                for group in range(file.num_row_groups):
                    bounds = file.metadata.row_group(group).column(column).statistics
                    if ascending is not None and bounds is not None and bounds.has_min_max:
                        at = bisect_left(ascending, bounds.min)
                        if at == len(ascending) or ascending[at] > bounds.max:
                            continue
                    rows = file.read_row_group(group)
                    for name in rows.column_names:
                        if name not in ("layer", "document") and rows[name].null_count:
                            raise ValueError(f"{name} is missing in a row")
                    if ascending is not None:
                        rows = rows.filter(pc.is_in(rows["latent"], pa.array(ascending, pa.int32())))
                    for batch in rows.to_batches(max_chunksize=4096):
                        yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(self.folder / CONTEXTS, error) from error


def read_contexts(folder: Path) -> ContextsFile:
    """The contexts in an SAE's folder. Raises WrongInput if there are none, or they are damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = read_facts(folder)
    if facts is None:
        raise WrongInput(f"{folder} has no {CONTEXTS}; make it with routesae contexts --sae {folder}")
    path = folder / LATENTS
    try:
        _require_bounds(folder / CONTEXTS, context_schema())
        _require_bounds(path, None)
        table = pq.read_table(path)
        summaries = tuple(LatentSummary(**row) for row in table.to_pylist())
        if [summary.latent for summary in summaries] != list(range(len(summaries))):
            raise ValueError("its latents are not numbered from 0")
    except FileNotFoundError:
        raise WrongInput(f"{path} is missing; run routesae contexts again") from None
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    if json.loads((table.schema.metadata or {}).get(FACTS, b"null")) != facts:
        raise WrongInput(f"{path} and {CONTEXTS} are of two runs; run routesae contexts again")
    return ContextsFile(folder, facts, summaries)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What the contexts in `folder` came from, or None if there are none. Raises WrongInput if they are damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / CONTEXTS
    if not path.is_file():
        return None
    try:
        facts: dict[str, Any] = parse_json((pq.read_metadata(path).metadata or {})[FACTS])
        version = facts["format"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
    if version != FORMAT:
        raise WrongInput(f"{path} has format {version}, and only {FORMAT} is read; run routesae contexts again")
    return facts


def _require_bounds(path: Path, schema: pa.Schema | None) -> None:
    """Raises ValueError if a Parquet file has other columns, or claims more than is ever written.

    A few bytes of it can stand for any number of rows.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if schema is not None and not file.schema_arrow.remove_metadata().equals(schema):
            raise ValueError("its columns are not those of contexts")
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            values = max(group.column(column).num_values for column in range(group.num_columns))
            if not 0 <= group.num_rows <= values <= MOST_VALUES:
                raise ValueError(f"it claims {values:,} values at a time, and at most {MOST_VALUES:,} are read")


def damaged(path: Path, why: Exception) -> WrongInput:
    reason = (str(why).strip() or type(why).__name__).splitlines()[0]
    return WrongInput(f"{path} cannot be read ({reason}); run routesae contexts again")


def write_contexts(
    folder: Path, facts: Mapping[str, Any], summaries: pa.Table, contexts: Iterator[pa.RecordBatch]
) -> None:
    """Write the three files, each whole or not at all.

    summaries: the columns of LatentSummary, a row a latent. contexts: whole latents a batch, in the file's order.
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
            context = Context.of_row(row)
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
