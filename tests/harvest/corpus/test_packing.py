"""Corpora of every kind into what a cache keeps: tokens, roles, and where each document is from."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zarr

from routesae.harvest.corpus import packing
from routesae.harvest.corpus.packing import write_tokens
from routesae.harvest.settings import HarvestSettings
from routesae.reporting import FailedRun, WrongInput, silent
from routesae.tests.conftest import sentences

CHATML = "{% for m in messages %}<s>{{ m['role'] + '\n' + m['content'] }}</s>\n{% endfor %}"
TEXTS = sentences(40)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.chat_template = CHATML
    return tokenizer


Written = tuple[dict[str, Any], Any, Any, list[dict[str, Any]]]


@pytest.fixture
def write(tokenizer: Any, tmp_path: Path) -> Callable[..., Written]:
    """The manifest's fields, tokens, roles and documents of a corpus."""

    def written(**changes: Any) -> Written:
        folder = tmp_path / f"made-{len(list(tmp_path.glob('made-*')))}"
        folder.mkdir()
        shortest = {} if "token_field" in changes else {"min_chars": 0}
        settings = HarvestSettings(**{"tokens": 2000, "context": 16, **shortest, **changes})
        fields = write_tokens(folder, settings, tokenizer, silent)
        tokens, roles = (zarr.open_array(folder / name)[:] for name in ("tokens", "roles"))
        table = pyarrow.parquet.read_table(folder / "document_starts/documents.parquet")
        assert len(table) == len(zarr.open_array(folder / "document_starts")[:]) == fields["documents"]
        return fields, tokens, roles, table.to_pylist()

    return written


def put(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_token_ids_are_used_as_they_are_from_every_kind_of_file(
    write: Callable[..., Written], tokenizer: Any, tmp_path: Path
) -> None:
    import datasets

    ids = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    records = [{"input_ids": one, "text": "other", "label": n} for n, one in enumerate(ids)]
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    made = datasets.Dataset.from_list(records)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "several"))
    put(tmp_path / "a.jsonl", records)
    expected = np.concatenate([np.array(one, np.int32) for one in ids])
    for name in ("a.parquet", "a.jsonl", "one", "several"):
        given = str(tmp_path / name)
        fields, tokens, roles, documents = write(data=given, token_field="input_ids", keep_fields="label")
        assert np.array_equal(tokens.reshape(-1), expected[: tokens.size])
        assert not roles.any()
        assert fields["roles"] == ()
        assert [one["label"] for one in documents] == [str(n) for n in range(len(documents))]
        assert all(one["data"] == given for one in documents)
    with pytest.raises(WrongInput, match=r"no split .valid.; --split is one of train, test"):
        write(data=str(tmp_path / "several"), split="valid")
    with pytest.raises(WrongInput, match=r"one was saved without splits; leave out --split valid"):
        write(data=str(tmp_path / "one"), split="valid", token_field="input_ids")


BAD_IDS = {
    "negative": [1, -100, 2],
    "too large": [1, 320],
    "huge": [2**70],
    "floats": [1.0, 2.5],
    "nested": [[1, 2], [3, 4]],
    "ragged": [[1], [2, 3]],
    "text": "hello",
    "null": [1, None],
    "true": [True, False],
}


@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=BAD_IDS)
def test_ids_that_are_none_are_refused_in_one_line_with_their_place(
    ids: Any, write: Callable[..., Written], tmp_path: Path
) -> None:
    path = put(tmp_path / "a.jsonl", [{"ids": list(range(5, 300))}] * 200 + [{"ids": ids}])
    with pytest.raises(WrongInput, match=re.escape(f"{path}:201: ")) as error:
        write(data=path, token_field="ids", tokens=10**6)
    assert "\n" not in str(error.value)
    fields, *_ = write(data=put(tmp_path / "b.jsonl", [{"ids": []}, {"ids": [7] * 100}]), token_field="ids")
    assert (fields["documents"], fields["documents_short"]) == (1, 1)


def test_only_tokens_of_the_roles_asked_for_count_as_kept(
    write: Callable[..., Written], tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talks = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one, other in zip(TEXTS[::2], TEXTS[1::2], strict=True)
    ]
    path = put(tmp_path / "chat.jsonl", [{"messages": talk} for talk in talks])
    fields, tokens, roles, _ = write(data=path, keep_roles="assistant")
    assert fields["roles"] == ("user", "assistant")
    said = roles.reshape(-1) == 2
    text = tokenizer.decode(tokens.reshape(-1)[said])
    assert "".join(TEXTS[1::2]).startswith(text[:-20])
    assert fields["kept_tokens"] == int((said.reshape(tokens.shape)[:, 1:]).sum())
    with pytest.raises(WrongInput, match=r"--keep-roles tool: no token is of such a role; .* has user, assistant"):
        write(data=path, keep_roles="tool")
    assert re.search(
        r"--keep-roles tool: none of the first \d+ documents has it", caplog.text
    )  # the refusal may take hours
    with pytest.raises(WrongInput, match=r"--keep-roles usr: no token is of such a role; .* has user, assistant"):
        write(data=path, keep_roles="assistant,usr")
    with pytest.raises(WrongInput, match="has no conversations"):
        write(data=put(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]), keep_roles="assistant")


def test_a_corpus_without_a_token_to_keep_is_refused_before_the_lm_runs(
    write: Callable[..., Written], tokenizer: Any, tmp_path: Path
) -> None:
    path = put(tmp_path / "a.jsonl", [{"ids": tokenizer.all_special_ids * 20}] * 9)
    with pytest.raises(WrongInput, match=r"has no token to keep: all are special"):
        write(data=path, token_field="ids")
    assert write(data=path, token_field="ids", keep_special=True)[0]["kept_tokens"] > 0


def test_messages_of_a_table_may_hold_dates_and_bytes(write: Callable[..., Written], tmp_path: Path) -> None:
    said = [{"role": "user", "content": TEXTS[0], "at": datetime(2024, 1, 1), "image": b"\xff"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": said}] * 9), tmp_path / "a.parquet")
    fields, *_ = write(data=str(tmp_path / "a.parquet"))
    assert fields["roles"] == ("user",)


def test_the_same_corpus_twice_is_one(write: Callable[..., Written], tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    assert HarvestSettings(data=(path, path)).corpus == path
    assert write(data=(path, path))[0] == write(data=path)[0]


def test_hh_rlhf_gives_both_replies_as_documents_as_text_or_as_lists(
    write: Callable[..., Written], tmp_path: Path
) -> None:
    def as_text(reply: str) -> str:
        return f"\n\nHuman: {TEXTS[0]}\n\nAssistant: {reply}"

    def as_list(reply: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": reply}]

    for form in (as_text, as_list):
        pairs = [{"chosen": form(one), "rejected": form(other)} for one, other in itertools.pairwise(TEXTS)]
        path = put(tmp_path / f"{form.__name__}.jsonl", pairs)
        fields, _tokens, _roles, documents = write(data=path, keep_fields="reply")
        assert [one["reply"] for one in documents[:4]] == ["chosen", "rejected"] * 2
        assert documents[1]["place"] == f"{form.__name__}.jsonl:1"
        if form is as_text:
            first = (fields["tokens_hash"], fields["roles_hash"], fields["corpus_fingerprint"])
    assert (fields["tokens_hash"], fields["roles_hash"], fields["corpus_fingerprint"]) == first


def test_a_conversation_that_cannot_be_told_by_role_is_malformed_only_where_roles_are_asked_for(
    write: Callable[..., Written], tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'][1:] }}\n{% endfor %}"
    path = put(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": text}]} for text in TEXTS])
    assert write(data=path)[0]["roles"] == ()
    with pytest.raises(FailedRun, match=r"malformed.*chat.jsonl:1: its tokens cannot be told by role"):
        write(data=path, keep_roles="user")


def test_a_mix_gives_each_source_its_share_of_the_tokens_in_the_same_order_each_time(
    write: Callable[..., Written], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = put(tmp_path / "one.jsonl", [{"text": text} for text in sentences(200, 1)])
    other = put(tmp_path / "other.jsonl", [{"text": text} for text in sentences(200, 2)])
    asked = {"data": (one, other), "mix": "0.7,0.3", "tokens": 8000}
    fields, tokens, _, documents = write(**asked)
    assert write(**asked)[0] == fields
    starts = [*zarr.open_array(tmp_path / "made-0/document_starts")[:].tolist(), tokens.size]
    given = {one: 0, other: 0}
    for document, start, after in zip(documents, starts, starts[1:], strict=False):
        given[document["data"]] += after - start
    assert given[one] / tokens.size == pytest.approx(0.7, abs=200 / tokens.size)
    assert {document["data"] for document in documents[:4]} == {one, other}
    caplog.clear()
    short = put(tmp_path / "short.jsonl", [{"text": text} for text in sentences(5, 3)])
    _, tokens, *_ = write(**{**asked, "data": (one, short)})
    assert f"{short} has no more documents: the mix ends with it" in caplog.text
    assert tokens.size < 2000


@pytest.mark.parametrize(
    "changes", [{"data": ("a", "b")}, {"data": ("a", "b"), "mix": "1"}, {"data": ("a", "a"), "mix": "1,1"}]
)
def test_a_mix_without_a_share_for_each_source_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(WrongInput, match=r"give a share for each, such as --mix 0\.7,0\.3"):
        HarvestSettings(**changes)


def test_fields_are_kept_as_text_and_folders_label_their_texts(write: Callable[..., Written], tmp_path: Path) -> None:
    for topic in ("sport", "tech"):
        (tmp_path / "news" / topic).mkdir(parents=True)
        for n, text in enumerate(TEXTS[:10]):
            (tmp_path / "news" / topic / f"{n}.txt").write_text(text)
    *_, documents = write(data=str(tmp_path / "news"), keep_fields="label")
    assert all(one["place"] == f"{one['label']}/{Path(one['place']).name}" for one in documents)
    assert {one["label"] for one in documents} == {"sport", "tech"}
    path = put(tmp_path / "a.jsonl", [{"text": TEXTS[0], "meta": {"n": [1, None]}, "score": 1.5, "x": None}] * 9)
    *_, documents = write(data=path, keep_fields="meta,score,x".replace(",x", ""))
    assert documents[0] == {"data": path, "place": "a.jsonl:1", "meta": '{"n": [1, null]}', "score": "1.5"}
    *_, documents = write(data=path, keep_fields="score,score")
    assert documents[0] == {"data": path, "place": "a.jsonl:1", "score": "1.5"}
    with pytest.raises(WrongInput, match=r"--keep-fields url: no document of .* has that field"):
        write(data=path, keep_fields="url")
    with pytest.raises(WrongInput, match="--keep-fields place"):
        HarvestSettings(keep_fields="place")


def test_fields_that_take_more_than_a_cache_may_have_are_refused_before_the_corpus_is_at_its_end(
    write: Callable[..., Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(tmp_path / "a.jsonl", [{"text": text, "id": str(n) * 40} for n, text in enumerate(TEXTS)])
    monkeypatch.setattr(packing, "ROWS_A_WRITE", 10)
    _, _, _, documents = write(data=data, keep_fields="id")
    monkeypatch.setattr(packing, "MOST_DOCUMENT_BYTES", 1500)
    with pytest.raises(
        WrongInput, match=r"--keep-fields id and .* of \d documents take over 1\.5 kB, .*; keep fewer"
    ):
        write(data=data, keep_fields="id")
    assert len(documents) > 10
