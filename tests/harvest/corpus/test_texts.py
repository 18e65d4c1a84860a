"""Documents out of every kind of corpus, and what is said of those that cannot be read."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import xxhash

from routesae.harvest.corpus import texts
from routesae.harvest.corpus.texts import Document, TextCounts, read_documents, require_read
from routesae.harvest.corpus.tokens import Tokenised, hashing
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import FailedRun, WrongInput

TEXTS = [f"Document {i}: naïve café, 東京, “{'x' * i}” \N{GRINNING FACE}\nand a second line." for i in range(12)]


def read(data: Path | str, **changes: Any) -> tuple[list[str], TextCounts]:
    counts = TextCounts()
    return [str(document.content) for document in documents(data, counts, **changes)], counts


def documents(data: Path | str, counts: TextCounts | None = None, **changes: Any) -> Iterator[Document]:
    return read_documents(str(data), HarvestSettings(**{"min_chars": 0, **changes}), counts or TextCounts())


def lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)


def put_txt(folder: Path) -> None:
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.txt").write_bytes(text.encode())


def put_jsonl(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(lines(TEXTS))


def put_gz(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))


def put_zst(folder: Path) -> None:
    (folder / "a.jsonl.zst").write_bytes(pyarrow.compress(lines(TEXTS), codec="zstd", asbytes=True))


def put_parquet(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": [1] * len(TEXTS), "text": TEXTS}), folder / "a.parquet")


def put_mixed(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "0.txt").write_bytes(TEXTS[0].encode())
    (folder / "deep" / "1.JSONL").write_bytes(lines(TEXTS[1:4]))
    (folder / "deep" / "2.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[4:7])))
    (folder / "deep" / "er" / "3.jsonl.zst").write_bytes(
        pyarrow.compress(lines(TEXTS[7:9]), codec="zstd", asbytes=True)
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[9:]}), folder / "4.parquet")
    (folder / "README.md").write_text("not a corpus")


@pytest.mark.parametrize("put", [put_txt, put_jsonl, put_gz, put_zst, put_parquet, put_mixed])
def test_every_format_gives_the_same_documents(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path)
    texts, counts = read(tmp_path)
    assert sorted(texts) == sorted(TEXTS)
    assert (counts.entries, counts.documents, counts.short, counts.malformed) == (len(TEXTS), len(TEXTS), 0, [])


@pytest.mark.parametrize("put", [put_jsonl, put_gz, put_zst, put_parquet])
def test_one_file_gives_its_documents_in_its_own_order(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path)
    assert read(next(tmp_path.iterdir()))[0] == TEXTS


def test_one_txt_file_is_one_document(tmp_path: Path) -> None:
    put_txt(tmp_path)
    assert read(tmp_path / "03.txt")[0] == [TEXTS[3]]


def test_archives_of_several_members_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[:5])) + gzip.compress(lines(TEXTS[5:])))
    frames = [pyarrow.compress(lines(part), codec="zstd", asbytes=True) for part in (TEXTS[:5], TEXTS[5:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.jsonl.gz")[0] == read(tmp_path / "b.jsonl.zst")[0] == TEXTS


def test_fingerprint_is_of_the_documents_not_of_how_they_are_stored(tmp_path: Path) -> None:
    def fingerprint(texts: list[str], name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        found = xxhash.xxh3_128()
        none = np.empty(0, np.int32), np.empty(0, np.uint8)
        hashed = hashing((Tokenised(document, *none) for document in documents(tmp_path / name)), found)
        assert [tokenised.document.content for tokenised in hashed] == texts
        return found.hexdigest()

    plain = fingerprint(TEXTS, "a.jsonl", lines(TEXTS))
    assert fingerprint(TEXTS, "b.jsonl.gz", gzip.compress(lines(TEXTS))) == plain
    assert fingerprint(TEXTS[::-1], "c.jsonl", lines(TEXTS[::-1])) != plain
    moved = [TEXTS[0] + TEXTS[1][:1], TEXTS[1][1:], *TEXTS[2:]]
    assert fingerprint(moved, "d.jsonl", lines(moved)) != plain


def test_folder_order_is_fixed_by_the_seed_and_not_alphabetic(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        put_txt(tmp_path / name)
    orders = [read(tmp_path / "one", seed=seed)[0] for seed in range(3)]
    assert [read(tmp_path / "two", seed=seed)[0] for seed in range(3)] == orders
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert TEXTS not in orders


def test_documents_below_min_chars_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["x" * 99, "y" * 100, "é" * 99, "", "z" * 101]))
    texts, counts = read(path, min_chars=100)
    assert texts == ["y" * 100, "z" * 101]
    assert (counts.entries, counts.documents, counts.short, counts.malformed) == (5, 2, 3, [])


MALFORMED = {
    "cut": (b'{"text": "cut', "JSON"),
    "list": (b'["text"]', "list"),
    "other fields": (b'{"body": "x", "title": "y"}', "body, title"),
    "number": (b'{"text": 3}', "'text'"),
    "latin-1": (b'{"text": "\xff"}', "UTF-8"),
    "lone surrogate": (b'{"text": "no UTF-8 \\ud800 has this"}', ""),  # tokenizers refuse it with a TypeError
    "huge number": (b'{"text": "x", "n": 1' + b"0" * 5000 + b"}", ""),
    "deep": (b"[" * 100_000, ""),
}


@pytest.mark.parametrize(("line", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_counted_and_named_with_file_and_line(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:1] * 99) + b"\n" + line + b"\n" + lines(TEXTS[1:2] * 100))
    texts, counts = read(path)
    assert texts == TEXTS[:1] * 99 + TEXTS[1:2] * 100
    assert counts.entries == 200  # the empty line is none
    (malformed,) = counts.malformed
    assert malformed.startswith(f"{path}:101: ")
    assert reason in malformed


def test_malformed_lines_are_logged_as_they_are_met(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:1] * 150) + b"{\n")
    read(path)
    (record,) = caplog.records
    assert f"{path}:151" in record.getMessage()


@pytest.mark.parametrize("entries", [100, 700, 2000, 5700])
def test_one_percent_malformed_passes_and_more_stops_the_run(entries: int, tmp_path: Path) -> None:
    path, bad = tmp_path / "a.jsonl", entries // 100
    path.write_bytes(lines(["x"] * (entries - bad)) + b"{\n" * bad)
    texts, counts = read(path)
    assert (len(texts), len(counts.malformed)) == (entries - bad, bad)
    path.write_bytes(lines(["x"] * (entries - bad - 1)) + b"{\n" * (bad + 1))
    with pytest.raises(FailedRun, match=rf"malformed, more than 1%; the first is {path}:{entries - bad}: "):
        read(path)


def test_a_hopeless_file_is_given_up_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["x"] * 900) + b"{\n" * 1000 + lines(["x"] * 50_000))
    counts = TextCounts()
    with pytest.raises(FailedRun, match="malformed"):
        list(documents(path, counts))
    assert counts.entries == 1000


def test_files_that_are_not_utf8_are_malformed_documents(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03d}.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    texts, counts = read(tmp_path)
    assert texts == ["good"] * 100
    assert counts.malformed == [f"{tmp_path / 'latin.txt'}: not UTF-8 at byte 2"]


def test_nul_bytes_empty_documents_and_a_very_long_line_are_documents(tmp_path: Path) -> None:
    long = "a line without an end " * 100_000
    texts = ["with \0 NUL \0\0", "", long, "\0", " "]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    assert read(tmp_path / "a.jsonl")[0] == texts
    assert read(tmp_path / "a.jsonl", min_chars=2)[0] == [texts[0], long]
    (tmp_path / "nul.txt").write_bytes(b"with \0 NUL")
    assert read(tmp_path / "nul.txt")[0] == ["with \0 NUL"]
    (tmp_path / "empty.txt").write_bytes(b"")
    texts, counts = read(tmp_path / "empty.txt", min_chars=1)
    assert (texts, counts.entries, counts.short, counts.malformed) == ([], 1, 1, [])


def test_nul_bytes_between_lines_are_a_malformed_line(tmp_path: Path) -> None:
    """What a file that was being written at a power cut ends with."""
    (tmp_path / "a.jsonl").write_bytes(lines(["x"] * 200) + bytes(4096))
    texts, counts = read(tmp_path / "a.jsonl")
    assert len(texts) == 200
    assert [bad.split(": ")[0] for bad in counts.malformed] == [f"{tmp_path / 'a.jsonl'}:201"]


def test_nulls_are_counted_and_stop_nothing_in_any_format(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [None] * 1500 + ["x"] * 150}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n{"text": NaN}\n' * 750 + lines(["x"] * 150))
    for name in ("a.parquet", "a.jsonl"):
        texts, counts = read(tmp_path / name)
        assert texts == ["x"] * 150
        assert (counts.entries, counts.short, counts.malformed) == (1650, 1500, [])


TALK = [{"role": "user", "content": "hello"}]


def test_a_null_text_beside_messages_is_a_conversation_in_any_format(tmp_path: Path) -> None:
    """As in a table that was put together from texts and conversations."""
    records = [{"text": None, "messages": TALK}, {"text": "x", "messages": None}, {"text": None, "messages": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("a.parquet", "a.jsonl"):
        counts = TextCounts()
        assert [document.content for document in documents(tmp_path / name, counts)] == [TALK, "x"]
        assert (counts.documents, counts.short, counts.malformed) == (2, 1, [])


def test_text_where_a_conversation_belongs_is_only_read_as_text_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for field in ("messages", "chosen"):
        path.write_text(json.dumps({field: json.dumps(TALK)}) + "\n")
        with pytest.raises(FailedRun, match="messages are not a list such as"):
            read(path)
        assert read(path, text_field=field)[0] == [json.dumps(TALK)]


def test_an_empty_conversation_is_short_and_no_reason_to_stop(tmp_path: Path) -> None:
    hh = "\n\nHuman: a\n\nAssistant: b"
    entries = [{"chosen": hh, "rejected": ""}, {"messages": []}, {"chosen": hh}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    counts = TextCounts()
    replies = [document.fields["reply"] for document in documents(tmp_path / "a.jsonl", counts, keep_fields="reply")]
    assert replies == ["chosen", "chosen"]
    assert (counts.documents, counts.short, counts.malformed) == (2, 2, [])


@pytest.mark.parametrize("form", ["torch", "pandas", "arrow"])
def test_a_dataset_is_read_whatever_form_it_was_saved_in(form: str, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).with_format(form).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved")[0] == TEXTS


def test_what_is_for_datasets_is_refused_where_only_files_are_read(tmp_path: Path) -> None:
    import datasets

    put_jsonl(tmp_path)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    file, saved, hub = str(tmp_path / "a.jsonl"), str(tmp_path / "saved"), "owner/name"
    with pytest.raises(WrongInput, match=r"^--split valid is for datasets, and no --data is one; leave it out$"):
        require_read(HarvestSettings(data=file, split="valid"))
    for data in (file, saved):
        with pytest.raises(WrongInput, match=r"^--data-config en is for datasets of the hub; leave it out$"):
            require_read(HarvestSettings(data=data, data_config="en"))
    require_read(HarvestSettings(data=(file, hub), mix=(1, 1), split="valid", data_config="en"))
    require_read(HarvestSettings(data=(file, saved), mix=(1, 1), split="valid"))
    require_read(HarvestSettings(data=file, split="train"))


@pytest.mark.parametrize("form", ["saved", "hub", "file.parquet"])
def test_a_class_is_kept_by_its_name_whatever_the_dataset_is_read_from(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    kind = datasets.ClassLabel(names=["sport", "tech"])
    features = {
        "text": datasets.Value("string"),
        "label": kind,
        "tags": datasets.List(kind),
        "n": datasets.Value("int8"),
    }
    columns: dict[str, Any] = {"text": TEXTS[:3], "label": [1, -1, 0], "tags": [[1, 0], [], None], "n": [1, 0, 0]}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    if form == "saved":
        made.save_to_disk(str(tmp_path / form))
    elif form == "hub":
        hub(monkeypatch, lambda *args, **options: made.to_iterable_dataset())
    else:
        made.to_parquet(str(tmp_path / form))
    data = "owner/name" if form == "hub" else tmp_path / form
    found = [document.fields for document in documents(data, TextCounts(), keep_fields="label,tags,n")]
    assert [fields["label"] for fields in found] == ["tech", None, "sport"]
    assert [fields["tags"] for fields in found] == ['["tech", "sport"]', "[]", None]
    assert [fields["n"] for fields in found] == ["1", "0", "0"]


@pytest.mark.parametrize(
    "said", ["{", "7", '{"info": 3}', '{"info": {"features": [{}]}}', '{"info": {"features": {"n": 1}}}']
)
def test_what_a_parquet_file_says_of_its_features_may_be_anything(said: str, tmp_path: Path) -> None:
    table = pyarrow.table({"text": TEXTS, "n": range(len(TEXTS))}).replace_schema_metadata({"huggingface": said})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = documents(tmp_path / "a.parquet", TextCounts(), keep_fields="n")
    assert [document.fields["n"] for document in found] == [str(number) for number in range(len(TEXTS))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_a_text_is_encoded(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXTS[0].encode(encoding))
    assert read(tmp_path / "a.txt")[0] == TEXTS[:1]


def test_another_text_field_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS, "body"))
    assert read(tmp_path / "a.jsonl", text_field="body")[0] == TEXTS
    with pytest.raises(FailedRun, match=r"no text in field 'text'; its fields are id, body.*--text-field"):
        read(tmp_path / "a.jsonl")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="body")[0] == ["x"]
    with pytest.raises(WrongInput, match="no column 'text'; --text-field is one of id, body"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_corpus_is_wrong_input(name: str) -> None:
    with pytest.raises(WrongInput, match=f"{name} does not exist"):
        read(name)


def test_a_folder_without_a_corpus_and_a_file_of_another_kind_are_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "a.zip"):
        with pytest.raises(WrongInput, match=r"\.jsonl, .* or one of these three with \.gz or \.zst") as error:
            read(path)
        assert str(path) in str(error.value)


def flipped(data: bytes) -> Iterator[bytes]:
    for at in range(12, len(data), max(1, len(data) // 60)):
        yield data[:at] + bytes([data[at] ^ 0x7F]) + data[at + 1 :]


def test_a_truncated_or_damaged_archive_is_one_line_naming_it(tmp_path: Path) -> None:
    long = [str(i) * 9 for i in range(3000)]
    packed = {
        tmp_path / "a.jsonl.gz": gzip.compress(lines(long)),
        tmp_path / "a.jsonl.zst": pyarrow.compress(lines(long), codec="zstd", asbytes=True),
    }
    for path, data in packed.items():
        for damaged in (data[: len(data) // 2], b"{}", *(flipped(data) if path.suffix == ".gz" else ())):
            path.write_bytes(damaged)
            with pytest.raises(FailedRun, match=path.name):  # cut short, or more than 1 % malformed before that
                read(path)


def test_a_damaged_parquet_file_is_one_line_naming_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(i) * 50 for i in range(3000)]}), path)
    data = path.read_bytes()
    for damaged in (b"", b"hello", data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(WrongInput, match=r"a\.parquet is not a Parquet file"):
            read(path)
    path.write_bytes(data[:20] + bytes(400) + data[420:])
    with pytest.raises((FailedRun, WrongInput), match=r"a\.parquet"):
        read(path)


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_hub_dataset_is_streamed_from_the_split_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def rows() -> Iterator[dict[str, Any]]:
        for text in [*TEXTS, None, *TEXTS * 10]:
            taken.append(text)
            yield {"id": 1, "text": text}

    def load(dataset_id: str, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        assert (dataset_id, split, streaming) == ("owner/name", "test", True)
        return rows()

    hub(monkeypatch, load)
    counts = TextCounts()
    found = documents("owner/name", counts, split="test")
    assert next(found) == (TEXTS[0], "owner/name:1", "owner/name", "owner/name:1", {})
    assert len(taken) == 1  # no document is fetched before it is wanted
    assert [document.content for document in found] == TEXTS[1:] + TEXTS * 10
    assert (counts.short, counts.malformed) == (1, [])


def test_a_dataset_defined_by_a_script_is_read_from_its_parquet_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(dataset_id: str, *, split: str, streaming: bool, revision: str | None = None) -> list[dict[str, str]]:
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        return [{"text": text} for text in TEXTS]

    hub(monkeypatch, load)
    assert read("owner/name")[0] == TEXTS


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more"),
        ValueError("Bad split: trainn."),
        RuntimeError("anything"),
        FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"),
    ],
)
def test_a_dataset_the_hub_does_not_give_is_one_line_with_the_remedy(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise error

    hub(monkeypatch, load)
    with pytest.raises(WrongInput, match="owner/name") as raised:
        read("owner/name", split="trainn")
    message = str(raised.value)
    assert "hf auth login" in message
    assert "'trainn'" in message
    assert str(error).splitlines()[0].rstrip(".") in message
    assert "\n" not in message


def test_a_stream_that_breaks_off_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise ConnectionError("connection reset\nby peer")

    hub(monkeypatch, lambda *args, **kwargs: rows())
    with pytest.raises((WrongInput, FailedRun), match=r"owner/name.*connection reset"):
        read("owner/name")


def test_a_dataset_without_the_text_field_names_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, lambda *args, **kwargs: [{"title": "t", "body": "b"}] * 2000)
    with pytest.raises(WrongInput, match="no field 'text'; --text-field is one of title, body"):
        read("owner/name")


def test_a_dataset_may_begin_with_a_null(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, lambda *args, **kwargs: [{"id": 1, "text": None}, {"id": 2, "text": "x"}])
    texts, counts = read("owner/name")
    assert (texts, counts.short, counts.malformed) == (["x"], 1, [])


def test_a_dataset_of_several_configurations_is_read_by_name_and_without_one_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(dataset_id: str, name: str | None = None, **options: Any) -> list[dict[str, str]]:
        if name is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nExample:"
            )
        return [{"text": name}]

    hub(monkeypatch, load)
    assert read("owner/name", data_config="de")[0] == ["de"]
    with pytest.raises(WrongInput, match=r"\['en', 'de'\]\. Give one with --data-config$"):
        read("owner/name")


def test_whatever_the_hub_s_client_raises_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from datasets.exceptions import DatasetGenerationError

    for error in (
        httpx.ReadTimeout("timed out"),
        type("ClientPayloadError", (Exception,), {})("not enough data"),  # as aiohttp has them
        DatasetGenerationError("An error occurred while generating the dataset"),
        KeyError("features"),
        EOFError("Compressed file ended before the end-of-stream marker was reached"),
    ):

        def rows(error: Exception = error) -> Iterator[dict[str, str]]:
            yield {"text": "first"}
            raise error

        hub(monkeypatch, lambda *args, rows=rows, **kwargs: rows())
        with pytest.raises(
            WrongInput, match="dataset 'owner/name', split 'train' cannot be read from the hub"
        ) as told:
            read("owner/name")
        assert "\n" not in str(told.value)


# ------------------------------------------------------------------------------------------------- every file counts


def test_links_to_folders_are_followed_once_and_one_that_leads_nowhere_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "a.jsonl").write_bytes(lines(TEXTS[:5]))
    (tmp_path / "elsewhere" / "deep" / "b.jsonl").write_bytes(lines(TEXTS[5:]))
    (tmp_path / "corpus" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert sorted(read(tmp_path / "corpus")[0]) == sorted(TEXTS)
    (record,) = caplog.records
    assert "files read: 2; passed over: 1 (" in record.getMessage()
    assert "gone.jsonl (a link that leads nowhere)" in record.getMessage()


def test_names_that_begin_with_a_dot_are_passed_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = tmp_path / ".cache"  # what the user named is read, whatever its name
    for name in (".git", ".ipynb_checkpoints", "__MACOSX"):
        (corpus / name).mkdir(parents=True)
    (corpus / "a.jsonl").write_bytes(lines(TEXTS))
    for name in (".git/a.txt", ".ipynb_checkpoints/a-checkpoint.jsonl", "__MACOSX/._a.jsonl", "._a.jsonl"):
        (corpus / name).write_bytes(b"\0\5\x16\7")
    assert read(corpus)[0] == TEXTS
    (record,) = caplog.records
    assert "files read: 1; passed over: 4 (" in record.getMessage()
    assert f"{corpus / '.git'}/" in record.getMessage()


def test_json_with_a_document_a_line_is_read_and_other_json_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put = {
        "c4-train.00000-of-00001.json.gz": gzip.compress(lines(TEXTS[:4])),
        "b.JSON": b'\n{"text": null}\n' + lines(TEXTS[4:8]),
        "c.json.zst": pyarrow.compress(lines(TEXTS[8:10]), codec="zstd", asbytes=True),
        "d.ndjson": lines(TEXTS[10:]),
        "dataset_infos.json": b'{"default": {"splits": {}}}',
        "list.json": b'[{"text": "x"}]',
        "indented.json": b'{\n  "text": "x"\n}\n',
        "empty.json": b"",
    }
    for name, data in put.items():
        (tmp_path / name).write_bytes(data)
    texts, counts = read(tmp_path)
    assert sorted(texts) == sorted(TEXTS)
    assert (counts.entries, counts.short) == (13, 1)
    (record,) = caplog.records
    assert "files read: 4; passed over: 4 (" in record.getMessage()
    assert "dataset_infos.json" in record.getMessage()
    assert read(tmp_path / "b.JSON")[0] == TEXTS[4:8]


@pytest.mark.parametrize("name", ["LICENSE.txt", "readme.txt", "THIRD_PARTY_NOTICES.txt", "LICENCE-de.txt"])
def test_a_licence_is_no_document_beside_other_formats_and_one_among_txt_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("Permission is hereby granted")
    (tmp_path / "LICENSE").write_text("Permission is hereby granted")
    (tmp_path / "unnoticed.txt").write_text("a document")
    assert sorted(read(tmp_path)[0]) == ["Permission is hereby granted", "a document"]
    put_jsonl(tmp_path)
    assert sorted(read(tmp_path)[0]) == sorted([*TEXTS, "a document"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_byte_order_mark_is_no_part_of_a_text(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "a.txt").write_bytes((mark + TEXTS[0]).encode(encoding))
    assert read(tmp_path / "a.txt")[0] == [TEXTS[0]]


def test_a_zstd_frame_with_a_window_too_long_names_the_command(tmp_path: Path) -> None:
    """A frame's header alone: magic, a window of 2 GB, no size; then an empty last block."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(bytes.fromhex("28b52ffd 00 a8 010000"))
    with pytest.raises(
        FailedRun, match=rf"a\.jsonl\.zst cannot be read.*; decompress it first: zstd -d --long=31 {path}$"
    ):
        read(path)


def test_what_cannot_be_read_of_a_parquet_file_is_one_line_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "part-00017.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 200] * 100}), path)
    whole = path.read_bytes()
    thrift = whole[:-60] + b"\xff" * 20 + whole[-40:]
    for data in (thrift, whole[:-4] + b"PARE", encrypted(tmp_path, plaintext_footer=False)):
        path.write_bytes(data)
        with pytest.raises(WrongInput, match=r"part-00017\.parquet is not a Parquet file that can be read") as told:
            read(tmp_path)
        assert "\n" not in str(told.value)
    path.write_bytes(encrypted(tmp_path, plaintext_footer=True))
    with pytest.raises(FailedRun, match=r"part-00017\.parquet cannot be read to its end: .*decrypt"):
        read(tmp_path)


def encrypted(folder: Path, *, plaintext_footer: bool) -> bytes:
    import base64

    from pyarrow.parquet import encryption

    class Keys(encryption.KmsClient):
        def wrap_key(self, key: bytes, name: str) -> bytes:
            return base64.b64encode(key)

    made = encryption.CryptoFactory(lambda config: Keys())
    how = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=plaintext_footer
    )
    properties = made.file_encryption_properties(encryption.KmsConnectionConfig(), how)
    table, path = pyarrow.table({"text": ["x" * 200] * 100}), folder / "made.bin"
    with pyarrow.parquet.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_file_that_may_not_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / name).chmod(0)
    with pytest.raises(FailedRun, match=f"{name} cannot be read to its end: .*make it readable"):
        read(tmp_path)


# ------------------------------------------------------------------------------ what is no file, and what is endless


def special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet", "x"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_a_pipe_a_socket_and_a_device_are_refused_and_in_a_folder_passed_over(
    kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 108 bytes
        special(kind, Path(short, name))
        with pytest.raises(WrongInput, match="is neither a file nor a folder but a pipe, a socket or a device"):
            read(f"{short}/{name}")
        Path(short, "a.txt").write_text("a text of more than a few characters")
        assert len(read(short)[0]) == 1
        assert f"passed over: 1 ({short}/{name})" in caplog.text


def test_a_document_without_an_end_is_malformed_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "LARGEST_BYTES", 1000)
    lines = [json.dumps({"text": letter * length}) for letter, length in (("a", 900), ("b", 3000), ("c", 900))]
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    counts = TextCounts()
    with pytest.raises(FailedRun, match=r"x.jsonl.gz:2: a line of .* bytes or more; cut it into documents"):
        list(documents(tmp_path / "x.jsonl.gz", counts))
    assert (counts.entries, counts.documents) == (3, 2)
    (tmp_path / "y.txt").write_text("b" * 1000)
    with pytest.raises(FailedRun, match=r"y.txt: a text of .* bytes or more"):
        read(tmp_path / "y.txt")


def test_a_name_that_would_act_on_a_terminal_is_spelled_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "\x1b[2J\u202e.txt").write_bytes(b"\xff" * 200)
    with pytest.raises(FailedRun, match=r"<U\+001B>\[2J<U\+202E>.txt: not UTF-8"):
        read(tmp_path)
    assert "\x1b" not in caplog.text
