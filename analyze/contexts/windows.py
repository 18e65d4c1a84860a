"""Token ids and a tokenizer in; for each position the sentence around it, and the exact text of each token, out.

A sentence ends with a token that ends in . ! or ? (closing quotes and brackets may follow) or holds a line break. It
never runs over a document's start, a special token or the end of a row: the LM saw nothing beyond its row.

Text is data: nothing is stripped, escaped or cleaned up. A character that takes several tokens stands at the last of
them; the part of a character that a window cuts off is U+FFFD.

Dimension letters: s rows, T context, P = s·T positions, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from routesae.harvest.cache.manifest import Ids

_SENTENCE_END = re.compile(r"""[.!?。！？]["'”’»)\]]*\s*\Z|[\n\r\u2028\u2029]""")
_HALF = "\ufffd"  # what a decoder puts for bytes that are not a whole character
_ANCHOR = "a"

Positions = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Windows(NamedTuple):
    """first_P, after_P: for each position, the first position of its window and the one after the last."""

    first_P: Positions
    after_P: Positions


class Vocabulary:
    """What the tokens of a vocabulary spell.

    texts: each id's text behind other text. class_V: the number of its class, which is what it spells without blanks
    and case; class_names: by that number. ends_V: whether it ends a sentence.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Behind an anchor: sentencepiece tokenizers swallow the blank in front of a text's first token.
        self._anchor: list[int] = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
        self._anchor_text = self._decoded([])
        ids = range(max(tokenizer.get_vocab().values()) + 1)
        self.texts = [self._spelled([token]) for token in ids]
        self._texts_V = np.array(self.texts, object)
        self._half_V: Flags = np.array([_HALF in text for text in self.texts])
        classes = [text.strip().lower() or text for text in self.texts]
        for token in np.flatnonzero(self._half_V).tolist():  # bytes of characters are told apart by their pieces
            classes[token] = str(tokenizer.convert_ids_to_tokens(token)).lower()
        numbers = {name: number for number, name in enumerate(dict.fromkeys(classes))}
        self.class_names = list(numbers)
        self.class_V: Positions = np.array([numbers[name] for name in classes], np.int64)
        self.ends_V: Flags = np.array([_SENTENCE_END.search(text) is not None for text in self.texts])

    def pieces(self, token_ids: Ids, lengths: Positions) -> npt.NDArray[np.object_]:
        """Text of each token of windows that stand one behind the other; joined they are each window's text."""
        pieces = self._texts_V[token_ids]
        after = np.cumsum(lengths)
        broken = np.unique(np.searchsorted(after, np.flatnonzero(self._half_V[token_ids]), "right"))
        for first, end in zip((after - lengths)[broken].tolist(), after[broken].tolist(), strict=True):
            pieces[first:end] = self._whole_characters(token_ids[first:end].tolist())
        return pieces

    def _whole_characters(self, token_ids: Sequence[int]) -> list[str]:
        """Text of each token of one window, where some hold parts of characters."""
        pieces, told = [], 0
        for n in range(1, len(token_ids) + 1):
            text = self._spelled(token_ids[:n])
            whole = text if n == len(token_ids) else text.rstrip(_HALF)
            pieces.append(whole[told:])
            told = max(told, len(whole))
        return pieces

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
    token_ids_sT: Ids, document_starts: Positions, *, vocabulary: Vocabulary, special_ids: Sequence[int], window: int
) -> Windows:
    """For each position of the rows the sentence it stands in; of one longer than `window` tokens, those around it.

    document_starts: flat positions in these rows at which documents begin.
    """
    rows, context = token_ids_sT.shape
    special_sT = np.isin(token_ids_sT, np.array(special_ids, np.int32))
    begins_sT = special_sT.copy()
    begins_sT[:, 0] = True
    begins_sT[:, 1:] |= special_sT[:, :-1] | vocabulary.ends_V[token_ids_sT[:, :-1]]
    begins_sT.reshape(-1)[document_starts] = True
    at_P = np.arange(rows * context)
    begins_P = begins_sT.reshape(-1)
    first_P = np.maximum.accumulate(np.where(begins_P, at_P, 0))
    next_P = np.append(np.where(begins_P, at_P, len(at_P))[1:], len(at_P))
    after_P = np.minimum.accumulate(next_P[::-1])[::-1]
    long_P = after_P - first_P > window
    before = window // 2
    first_P = np.where(long_P, np.maximum(first_P, at_P - before), first_P)
    after_P = np.where(long_P, np.minimum(after_P, at_P + window - before), after_P)
    return Windows(first_P, after_P)
