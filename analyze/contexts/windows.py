"""For each position of the cache's tokens the sentence around it, and the exact text of each of its tokens.

A sentence ends with a token that ends in . ! or ? (closing quotes and brackets may follow) or holds a line break. It
never runs over a document's start, a special token or the end of a row: the LM saw nothing beyond its row.

Text is data: nothing is stripped, escaped or cleaned up. A character that takes several tokens stands at the last of
them, and no window is cut within one unless it is shorter than a few tokens; a part of a character is U+FFFD.

Dimension letters: s rows, T context, P = s·T positions, V vocabulary.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from routesae.harvest.cache.manifest import Ids

_SENTENCE_END = re.compile(r"""[.!?。！？]["'”’»)\]]*\s*\Z|[\n\r\u2028\u2029]""")
_HALF = "\ufffd"  # what a decoder puts for bytes that are not a whole character
_ANCHOR = "a"
_LONGEST = 16  # tokens of one run of characters that share tokens; a longer one is no text

Positions = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Vocabulary:
    """What the tokens of a vocabulary spell.

    texts: each id's text behind other text. class_V: the number of its class, which is its raw piece in lower case,
    as in the published code: "Ġthe" and "the" are two. class_names: by that number. class_texts: the same as text.
    ends_V: whether it ends a sentence.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Behind an anchor: sentencepiece tokenizers swallow the blank in front of a text's first token.
        self._anchor: list[int] = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
        self._anchor_text = self._decoded([])
        ids = list(range(max(tokenizer.get_vocab().values()) + 1))
        self.texts = [self._spelled([token]) for token in ids]
        self._texts_V = np.array(self.texts, object)
        self._half_V: Flags = np.array([_HALF in text for text in self.texts])
        classes = [str(piece).strip().lower() for piece in tokenizer.convert_ids_to_tokens(ids)]
        shown = dict(zip(reversed(classes), reversed(self.texts), strict=True))
        self.class_names = list(dict.fromkeys(classes))
        self.class_texts = [name if _HALF in shown[name] else shown[name].lower() for name in self.class_names]
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.class_V: Positions = np.array([numbers[name] for name in classes], np.int64)
        self.ends_V: Flags = np.array([_SENTENCE_END.search(text) is not None for text in self.texts])
        self._open: dict[tuple[int, ...], bool] = {}
        self._runs: dict[tuple[int, ...], list[str]] = {}

    def pieces(self, token_ids: Ids, lengths: Positions) -> npt.NDArray[np.object_]:
        """Text of each token of windows that stand one behind the other; joined they are each window's text."""
        pieces = self._texts_V[token_ids]
        after = np.cumsum(lengths)
        broken = np.unique(np.searchsorted(after, np.flatnonzero(self._half_V[token_ids]), "right"))
        for first, end in zip((after - lengths)[broken].tolist(), after[broken].tolist(), strict=True):
            closed = first + 1 + np.flatnonzero(~self.open_ends(token_ids[first:end]))
            for begins, ends in pairwise(sorted({first, *closed.tolist(), end})):
                pieces[begins:ends] = self._whole_characters(tuple(token_ids[begins:ends].tolist()))
        return pieces

    def _whole_characters(self, run: tuple[int, ...]) -> list[str]:
        """Text of each token of a run of tokens that share characters."""
        if len(run) == 1:
            return [self.texts[run[0]]]
        if run not in self._runs:
            pieces, spelled = [], 0
            for n in range(1, len(run) + 1):
                text = self._spelled(run[:n])
                whole = text if n == len(run) else text.rstrip(_HALF)
                pieces.append(whole[spelled:])
                spelled = max(spelled, len(whole))
            self._runs[run] = pieces
        return self._runs[run]

    def open_ends(self, token_ids: Ids) -> Flags:
        """[P]: whether a token ends within a character, which goes on in the next token."""
        open_P = np.zeros(len(token_ids), bool)
        first = 0
        for at in np.flatnonzero(self._half_V[token_ids]).tolist():
            if at == 0 or not open_P[at - 1] or at - first == _LONGEST:
                first = at
            run = tuple(token_ids[first : at + 1].tolist())
            if run not in self._open:
                self._open[run] = self._spelled(run).endswith(_HALF)
            open_P[at] = self._open[run]
        return open_P

    def _spelled(self, token_ids: Sequence[int]) -> str:
        text = self._decoded(token_ids)
        if text.startswith(self._anchor_text):
            return text[len(self._anchor_text) :]
        alone: str = self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return alone

    def _decoded(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([*self._anchor, *token_ids], clean_up_tokenization_spaces=False)
        return text


def windows(
    token_ids_sT: Ids,
    document_starts: Positions,
    *,
    vocabulary: Vocabulary,
    special_ids: Sequence[int],
    window: int,
    in_front: Sequence[int] = (),
) -> tuple[Positions, Positions]:
    """For each position of the rows the sentence it stands in; of one longer than `window` tokens, those around it.

    Returns first_P and after_P: the first position of each one's window, and the one after its last.
    document_starts: flat positions in these rows at which documents begin. in_front: a few tokens before these rows,
    which may hold the beginning of their first character.
    """
    rows, context = token_ids_sT.shape
    special_sT = np.isin(token_ids_sT, np.array(special_ids, np.int32))
    flat = np.append(np.array(in_front, token_ids_sT.dtype), token_ids_sT)
    open_sT = vocabulary.open_ends(flat)[len(in_front) :].reshape(rows, context)
    begins_sT = special_sT.copy()
    begins_sT[:, 0] = True
    begins_sT[:, 1:] |= special_sT[:, :-1] | (vocabulary.ends_V[token_ids_sT[:, :-1]] & ~open_sT[:, :-1])
    begins_sT.reshape(-1)[document_starts] = True
    at_P = np.arange(rows * context)
    begins_P = np.append(begins_sT.reshape(-1), True)
    first_P = np.maximum.accumulate(np.where(begins_P[:-1], at_P, 0))
    after_P = _next(begins_P)[1:]
    long_P = after_P - first_P > window
    before = window // 2
    cut_first_P = np.maximum(first_P, at_P - before)
    cut_after_P = np.minimum(after_P, at_P + window - before)
    # A long sentence is cut between characters, unless the token's own character reaches beyond the cut.
    between_P = begins_P.copy()
    between_P[1:] |= ~open_sT.reshape(-1)
    whole_first_P = _next(between_P)[cut_first_P]
    whole_after_P = np.maximum.accumulate(np.where(between_P, np.arange(len(between_P)), 0))[cut_after_P]
    cut_first_P = np.where(whole_first_P <= at_P, whole_first_P, cut_first_P)
    cut_after_P = np.where(whole_after_P > at_P, whole_after_P, cut_after_P)
    return np.where(long_P, cut_first_P, first_P), np.where(long_P, cut_after_P, after_P)


def _next(flags: Flags) -> Positions:
    """For each position the first at or behind it whose flag is set; the last one's must be."""
    at = np.where(flags, np.arange(len(flags)), len(flags))
    return np.minimum.accumulate(at[::-1])[::-1]
