"""Documents into packed rows of token ids, and which of their positions are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routesae.harvest.cache.manifest import kept_positions
from routesae.harvest.corpus import tokens
from routesae.harvest.corpus.texts import Document, TextCounts
from routesae.harvest.corpus.tokens import Framing, Tokenised, framing, pack, tokenize, tokenizer_hash

BOS, EOS = 0, 1
NOWHERE = Document("", "here")


def ids_of(documents: Iterable[Document], tokenizer: Any, frame: Framing) -> Iterator[Any]:
    return (one.token_ids_T for one in tokenize(documents, tokenizer, frame, roles={}, counts=TextCounts()))


def packed(documents: Iterable[Any], *, context: int, row_start: int | None) -> list[Any]:
    tokenised = (Tokenised(NOWHERE, ids, np.zeros(len(ids), np.uint8)) for ids in documents)
    return list(pack(tokenised, context=context, row_start=row_start))


def starts(row: Any) -> list[int]:
    return [position for position, _ in row.starts]


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def with_template(tokenizer: Any, template: str) -> Any:
    """The same tokenizer, made to put special tokens around a text as `template` says."""
    from tokenizers.processors import TemplateProcessing

    ids = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def naive_rows(
    documents: list[list[int]], context: int, row_start: int | None
) -> list[tuple[list[int], list[int], list[int]]]:
    """Each whole row as (ids, document starts, source of each id), built one id at a time."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    ids, starts, sources = list[int](), list[int](), list[int]()
    for number, document in enumerate(documents):
        for place, token in enumerate(document):
            if not ids and row_start is not None and token != row_start:
                ids.append(row_start)
                sources.append(-1)
            if place == 0:
                starts.append(len(ids))
            ids.append(token)
            sources.append(number)
            if len(ids) == context:
                rows.append((ids, starts, sources))
                ids, starts, sources = [], [], []
    return rows


@pytest.mark.parametrize("row_start", [None, 7])
@pytest.mark.parametrize("context", [2, 5, 16])
def test_pack_equals_a_list_built_one_token_at_a_time(context: int, row_start: int | None) -> None:
    rng = np.random.default_rng(context)
    for _ in range(20):
        lengths = rng.choice([1, 2, 3, context - 1, context, context + 1, 3 * context], size=rng.integers(0, 30))
        documents = [rng.integers(0, 9, n).tolist() for n in lengths]
        if row_start is not None:
            documents = [[row_start, *document] if rng.random() < 0.5 else document for document in documents]
        expected = naive_rows(documents, context, row_start)
        found = packed((np.array(d, np.int32) for d in documents), context=context, row_start=row_start)
        assert [(row.token_ids_T.tolist(), starts(row)) for row in found] == [row[:2] for row in expected]
        assert all(row.token_ids_T.dtype == np.int32 for row in found)


def test_without_row_start_rows_are_the_documents_end_to_end_less_the_last_part() -> None:
    documents = [np.arange(n, dtype=np.int32) + 100 * n for n in (3, 11, 0, 5, 4)]
    rows = packed(documents, context=8, row_start=None)
    assert np.concatenate([row.token_ids_T for row in rows]).tolist() == np.concatenate(documents)[:16].tolist()
    assert [starts(row) for row in rows] == [[0, 3], [6]]  # the empty one has none, the last is cut off


def test_with_row_start_every_row_begins_with_it_and_no_document_token_is_lost() -> None:
    documents = [np.array([9, *range(10, 10 + n)], np.int32) for n in (3, 20, 6, 1)]
    rows = [row.token_ids_T.tolist() for row in packed(documents, context=5, row_start=9)]
    assert [row[0] for row in rows] == [9] * len(rows)
    assert all(row[1] != 9 for row in rows)  # a document's own BOS is not doubled at a row's start
    bare = [token for row in rows for token in row if token != 9]
    expected = [token for document in documents for token in document.tolist() if token != 9]
    assert bare == expected


def test_pack_yields_rows_of_their_own_memory() -> None:
    rows = packed([np.arange(12, dtype=np.int32)], context=4, row_start=None)
    rows[0].token_ids_T[:] = -1
    assert rows[1].token_ids_T.tolist() == [4, 5, 6, 7]


def test_framing_of_a_tokenizer_that_adds_nothing_ends_documents_with_eos(tiny_model: Path) -> None:
    found = framing(load(tiny_model))
    assert found == Framing((), (EOS,), (BOS, EOS))
    assert found.row_start is None


def test_framing_of_a_tokenizer_that_adds_a_bos_begins_documents_and_rows_with_it(tiny_model: Path) -> None:
    found = framing(with_template(load(tiny_model), "<s> $A"))
    assert found == Framing((BOS,), (), (BOS, EOS))
    assert found.row_start == BOS


def test_framing_of_a_tokenizer_that_adds_both_keeps_both(tiny_model: Path) -> None:
    assert framing(with_template(load(tiny_model), "<s> $A </s>")) == Framing((BOS,), (EOS,), (BOS, EOS))


def test_framing_counts_added_special_tokens_and_not_added_plain_ones(tiny_model: Path) -> None:
    from transformers import AddedToken

    tokenizer = load(tiny_model)
    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<|role|>", special=True), AddedToken("routesae", special=False)])
    assert framing(tokenizer).special_ids == (BOS, EOS, before)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
@pytest.mark.parametrize(
    ("template", "before", "after"),
    [(None, (), (1,)), ("<s> $A", (0,), ()), ("<s> $A </s>", (0,), (1,)), ("$A </s>", (), (1,))],
)
def test_framing_of_a_vocabulary_without_our_letters_is_found_too(
    template: str | None, before: tuple[int, ...], after: tuple[int, ...], unknown: str | None
) -> None:
    """DNA: with `unknown` None this tokenizer raises for every other letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "A": 3, "C": 4, "G": 5, "T": 6}
    model = models.WordLevel(vocabulary, unk_token=unknown) if unknown else models.WordLevel(vocabulary)
    letters = Tokenizer(model)
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")
    if template is not None:
        tokenizer = with_template(tokenizer, template)
    assert framing(tokenizer)[:2] == (before, after)
    assert len(tokenizer_hash(tokenizer)) == 64


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
def test_tokenize_gives_every_document_what_the_tokenizer_gives_it_alone(
    template: str | None, tiny_model: Path
) -> None:
    tokenizer = load(tiny_model)
    if template is not None:
        tokenizer = with_template(tokenizer, template)
    documents = [Document(f"document {i} of the model" + " x" * (i % 7), f"file:{i}") for i in range(600)]
    found = list(ids_of(iter(documents), tokenizer, framing(tokenizer)))
    for document, ids in zip(documents, found, strict=True):
        alone = tokenizer(document.content)["input_ids"]
        assert ids.tolist() == (alone if template is not None else [*alone, EOS])
        assert ids.dtype == np.int32


def test_kept_positions_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    token_ids_ST = rng.integers(0, 6, (20, 12)).astype(np.int32)
    for dropped in ((), (3,), (0, 5), (99,)):
        for skip in (0, 1, 4, 11):
            expected = [[t >= skip and int(row[t]) not in dropped for t in range(12)] for row in token_ids_ST]
            found = kept_positions(token_ids_ST, dropped_ids=dropped, skip_positions=skip)
            assert found.dtype == np.bool_
            assert found.tolist() == expected


def rewritten(folder: Path, to: Path, old: str, new: str) -> Any:
    """The tokenizer of `folder` with one word of its vocabulary and merges replaced."""
    load(folder).save_pretrained(to)
    path = to / "tokenizer.json"
    facts = json.loads(path.read_text())
    vocabulary = facts["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)
    facts["model"]["merges"] = [pair for pair in facts["model"]["merges"] if old not in (*pair, "".join(pair))]
    path.write_text(json.dumps(facts))
    return load(to)


def test_tokenizer_hash_tells_a_changed_vocabulary_and_not_a_copy(tiny_model: Path, tmp_path: Path) -> None:
    original = tokenizer_hash(load(tiny_model))
    load(tiny_model).save_pretrained(tmp_path / "copy")
    assert tokenizer_hash(load(tmp_path / "copy")) == original
    leaf = max(load(tiny_model).get_vocab().items(), key=lambda item: item[1])[0]  # no merge builds on it
    assert tokenizer_hash(rewritten(tiny_model, tmp_path / "other", leaf, "qzqz")) != original


def test_tokenizer_hash_tells_other_special_ids_and_another_template(tiny_model: Path) -> None:
    original = tokenizer_hash(load(tiny_model))
    assert tokenizer_hash(with_template(load(tiny_model), "<s> $A")) != original
    other = load(tiny_model)
    other.pad_token = other.convert_ids_to_tokens(7)
    assert tokenizer_hash(other) != original


# -------------------------------------------------------------------------------------------------- long documents


@pytest.mark.parametrize(
    "text", ["word " * 3000, "two  spaces\n and\tmore " * 700, "x" * 9000, "", "\0 nul \0" * 900]
)
def test_a_long_document_is_tokenised_in_pieces_that_do_not_show(
    text: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load(tiny_model)
    frame = framing(tokenizer)
    documents = [Document(text, "long"), Document("short", "short"), Document(text[:1500], "cut")]
    whole = [ids.tolist() for ids in ids_of(documents, tokenizer, frame)]
    monkeypatch.setattr(tokens, "PIECE_CHARS", 1000)
    monkeypatch.setattr(tokens, "CHARS_A_CALL", 2500)
    calls: list[int] = []

    class Noting:
        unk_token_id = None
        get_vocab = tokenizer.get_vocab

        def __call__(self, texts: list[str], **options: Any) -> Any:
            calls.append(sum(map(len, texts)))
            return tokenizer(texts, **options)

    pieces = [ids.tolist() for ids in ids_of(documents, Noting(), frame)]
    assert max(calls) <= 2500
    if " " in text or not text:
        assert pieces == whole
    else:  # nowhere to cut: the text is still the same
        assert [tokenizer.decode(ids) for ids in pieces] == [tokenizer.decode(ids) for ids in whole]


def test_long_documents_come_few_at_a_time(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 256 of them: a folder of books would be gigabytes at once."""
    monkeypatch.setattr(tokens, "CHARS_A_CALL", 1000)
    tokenizer = load(tiny_model)
    read: list[int] = []

    def books() -> Iterator[Document]:
        for number in range(100):
            read.append(number)
            yield Document("token " * 100, "book")

    stream = ids_of(books(), tokenizer, framing(tokenizer))
    next(stream)
    assert len(read) == 2


@pytest.mark.parametrize(
    "text", ["the <s> router", "</s>", "<s></s>the layer </s>", "layer<s>", "no special token at all"]
)
def test_a_special_token_that_is_spelt_in_a_text_is_text(
    text: str, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load(tiny_model)
    frame = framing(tokenizer)
    (ids,) = ids_of([Document(text, "here")], tokenizer, frame)
    assert ids[-1] == EOS
    assert not {BOS, EOS} & set(ids[:-1].tolist())
    assert tokenizer.decode(ids[:-1]) == text
    assert caplog.records == []
    plain = "the router layer token " * 5
    (ids,) = ids_of([Document(plain, "here")], tokenizer, frame)
    assert ids[:-1].tolist() == tokenizer(plain, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_takes_it_for_the_token_all_the_same_is_counted_and_said(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load(tiny_model)

    class Deaf:
        unk_token_id = None
        get_vocab = tokenizer.get_vocab

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return tokenizer(texts, **{**options, "split_special_tokens": False})

    texts = ["the <s> router", "a layer", "</s></s>"]
    assert len(list(ids_of([Document(text, "") for text in texts], Deaf(), framing(tokenizer)))) == 3
    (record,) = caplog.records
    assert record.getMessage().startswith("2 texts spell special tokens such as <s>")
