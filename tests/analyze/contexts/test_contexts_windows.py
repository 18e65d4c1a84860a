"""Where a context begins and ends, and what its tokens spell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from routesae.analyze.contexts.windows import Vocabulary, windows

NO_STARTS = np.array([], np.int64)


@pytest.fixture(scope="module")
def vocabulary(tiny_model: Path) -> Vocabulary:
    return Vocabulary(AutoTokenizer.from_pretrained(tiny_model))


def ids(tiny_model: Path, text: str) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def spans(token_ids_T: np.ndarray, vocabulary: Vocabulary, starts: np.ndarray, window: int) -> list[tuple[int, int]]:
    found = windows(token_ids_T[None], starts, vocabulary=vocabulary, special_ids=(0, 1), window=window)
    return list(zip(found.first_P.tolist(), found.after_P.tolist(), strict=True))


def test_a_window_is_its_sentence(tiny_model: Path, vocabulary: Vocabulary) -> None:
    token_ids_T = ids(tiny_model, "the row.the\nrow!")
    texts = [vocabulary.texts[token] for token in token_ids_T]
    assert "".join(texts) == "the row.the\nrow!"
    first, line = texts.index(".") + 1, texts.index("\n") + 1
    expected = [(0, first)] * first + [(first, line)] * (line - first) + [(line, len(texts))] * (len(texts) - line)
    assert spans(token_ids_T, vocabulary, NO_STARTS, 64) == expected


def test_a_window_stays_in_its_document_and_off_special_tokens(tiny_model: Path, vocabulary: Vocabulary) -> None:
    the = int(ids(tiny_model, "the")[0])
    token_ids_T = np.array([the, the, the, the, 1, the, the], np.int32)  # a document begins at 2, </s> is at 4
    expected = [(0, 2), (0, 2), (2, 4), (2, 4), (4, 5), (5, 7), (5, 7)]
    assert spans(token_ids_T, vocabulary, np.array([2]), 64) == expected


def test_a_long_sentence_is_cut_around_its_token(tiny_model: Path, vocabulary: Vocabulary) -> None:
    token_ids_T = np.repeat(ids(tiny_model, "the")[:1], 9)
    expected = [(0, 2), (0, 3), (0, 4), (1, 5), (2, 6), (3, 7), (4, 8), (5, 9), (6, 9)]
    assert spans(token_ids_T, vocabulary, NO_STARTS, 4) == expected


def test_a_character_of_several_tokens_stands_at_its_last(tiny_model: Path, vocabulary: Vocabulary) -> None:
    token_ids = ids(tiny_model, "a東b\u200d")
    pieces = vocabulary.pieces(token_ids, np.array([len(token_ids)])).tolist()
    assert pieces == ["a", "", "", "東", "b", "", "", "\u200d"]
    cut = vocabulary.pieces(token_ids[:3], np.array([3])).tolist()
    assert cut[:2] == ["a", ""]
    assert set(cut[2]) == {"\ufffd"}


def test_tokens_alike_but_for_case_and_blanks_are_one_class(tiny_model: Path, vocabulary: Vocabulary) -> None:
    upper, lower, spaced = (int(ids(tiny_model, text)[0]) for text in ("A", "a", " a"))
    assert vocabulary.class_V[upper] == vocabulary.class_V[lower] == vocabulary.class_V[spaced]
    halves = ids(tiny_model, "東")
    assert len(set(vocabulary.class_V[halves].tolist())) == len(set(halves.tolist())), "bytes are told apart"
