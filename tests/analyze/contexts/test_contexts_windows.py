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
    first_P, after_P = windows(token_ids_T[None], starts, vocabulary=vocabulary, special_ids=(0, 1), window=window)
    return list(zip(first_P.tolist(), after_P.tolist(), strict=True))


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


def test_classes_are_the_published_codes(tiny_model: Path, vocabulary: Vocabulary) -> None:
    """2503.08200's get_context: the raw piece without blanks around it, in lower case, with the mark of a blank."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(vocabulary.class_V))))
    assert [vocabulary.class_names[number] for number in vocabulary.class_V] == [p.strip().lower() for p in pieces]
    upper, lower, spaced = (int(ids(tiny_model, text)[0]) for text in ("A", "a", " a"))
    assert vocabulary.class_V[upper] == vocabulary.class_V[lower] != vocabulary.class_V[spaced]
    assert [vocabulary.class_texts[vocabulary.class_V[token]] for token in (upper, spaced)] == ["a", " a"]


@pytest.mark.parametrize("text", ["a東京b", "नि नदी", "สวัสดี", "👩\u200d👧 é"])
def test_a_token_is_open_where_its_character_goes_on(text: str, tiny_model: Path, vocabulary: Vocabulary) -> None:
    """Against bytes: a byte-level piece has one character a byte, and UTF-8 says which bytes begin a character."""
    token_ids = ids(tiny_model, text)
    pieces = AutoTokenizer.from_pretrained(tiny_model).convert_ids_to_tokens(token_ids.tolist())
    ends = np.cumsum([len(piece) for piece in pieces])
    follows = [end < len(text.encode()) and text.encode()[end] & 0xC0 == 0x80 for end in ends.tolist()]
    assert vocabulary.open_ends(token_ids).tolist() == follows
    assert any(follows)


@pytest.mark.parametrize("window", [8, 9, 13])
def test_a_long_sentence_is_never_cut_within_a_character(
    window: int, tiny_model: Path, vocabulary: Vocabulary
) -> None:
    token_ids = ids(tiny_model, "नि東京 สวัสดี 👩\u200d👧 " * 3)
    for at, (first, after) in enumerate(spans(token_ids, vocabulary, NO_STARTS, window)):
        assert first <= at < after <= first + window
        text = vocabulary.pieces(token_ids[first:after], np.array([after - first]))
        assert "\ufffd" not in "".join(text)


def test_a_tokens_text_is_what_it_adds_to_that_of_its_window(tiny_model: Path, vocabulary: Vocabulary) -> None:
    """Against decoding every beginning of the window, also of bytes that are no characters."""
    random, text = np.random.default_rng(0), ids(tiny_model, "नि 東京 สวัสดี 👩\u200d👧 the row. é")
    for _ in range(300):
        noise = random.integers(2, len(vocabulary.texts), len(text)).astype(np.int32)
        window = np.where(random.random(len(text)) < random.random() / 3, noise, text)[random.integers(0, 9) :]
        wholes = [vocabulary._spelled(window[:n].tolist()) for n in range(1, len(window) + 1)]
        wholes = [whole.rstrip("\ufffd") for whole in wholes[:-1]] + wholes[-1:]
        longest = np.maximum.accumulate([0, *map(len, wholes)]).tolist()
        expected = [whole[spelled:] for whole, spelled in zip(wholes, longest, strict=False)]
        lengths = np.array([len(text), len(window)])
        assert vocabulary.pieces(np.append(text, window), lengths).tolist()[len(text) :] == expected
