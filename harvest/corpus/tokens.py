"""Tokenise documents and pack them into rows of `context` token ids.

Documents follow one another in one stream, each as its tokenizer would present it alone (Llama: a BOS before
it); if the tokenizer adds nothing, an EOS ends each. The stream is cut into rows of T tokens. If the tokenizer
begins documents with a BOS every row begins with one too, since such models are poor, and Gemma's useless,
without it. The last, partial row is dropped.

Dimension letters: S rows, T context.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import xxhash

from routesae.harvest.cache.manifest import Ids
from routesae.harvest.corpus.texts import Document

log = logging.getLogger(__name__)

DOCUMENTS_A_CALL = 256  # enough for the tokenizer's threads
# A tokenizer takes 50 to 100 bytes a character: a line of 50 MB at once would take 5 GB.
PIECE_CHARS = 1 << 20
CHARS_A_CALL = 1 << 22


class Framing(NamedTuple):
    """The ids put around every document, and those that count as special (sorted)."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    special_ids: tuple[int, ...]

    @property
    def row_start(self) -> int | None:
        """The id every row begins with, or None."""
        return self.before[0] if self.before else None


class Row(NamedTuple):
    """One packed row: token_ids int32 [T], and the positions in it at which a document begins."""

    token_ids_T: Ids
    document_starts: list[int]


def framing(tokenizer: Any) -> Framing:
    """What `tokenizer` puts around a document, read off what it does to one of its own tokens."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    before, after = tuple[int, ...](), tuple[int, ...]()
    for token in sorted(tokenizer.get_vocab().values()):
        text = tokenizer.decode([token])
        bare = _ids(tokenizer, text, add_special_tokens=False)
        if bare and special.isdisjoint(bare):
            framed = _ids(tokenizer, text, add_special_tokens=True)
            at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
            before, after = tuple(framed[:at]), tuple(framed[at + len(bare) :])
            break
    if not before and not after and tokenizer.eos_token_id is not None:
        after = (tokenizer.eos_token_id,)
    return Framing(before, after, tuple(sorted(special)))


def _ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """The ids of a text; none if the tokenizer has no token for a part of it."""
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    except Exception:  # the tokenizers library raises nothing narrower
        return []


def tokenize(documents: Iterable[Document], tokenizer: Any, framing: Framing) -> Iterator[Ids]:
    """The token ids of each document, framing included, in order."""
    before, after = np.array(framing.before, np.int32), np.array(framing.after, np.int32)
    special, literal = set(framing.special_ids) - {tokenizer.unk_token_id}, 0
    parts = [before]
    try:
        for call in _calls(documents):
            # verbose=False: rows are cut to the context below, so "longer than the maximum" would mislead.
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            # split_special_tokens: a literal <s> in a text is text. Not every tokenizer obeys, hence the count.
            ids = tokenizer([text for text, _ in call], split_special_tokens=True, **options)["input_ids"]
            for piece_ids, (_, is_last) in zip(ids, call, strict=True):
                literal += not special.isdisjoint(piece_ids)
                parts.append(np.array(piece_ids, np.int32))
                if is_last:
                    yield np.concatenate([*parts, after])
                    parts = [before]
    finally:
        if literal:
            log.warning(
                "%d texts spell special tokens such as <s>, and this tokenizer takes them for the tokens: their "
                "positions are special",
                literal,
            )


def _calls(documents: Iterable[Document]) -> Iterator[list[tuple[str, bool]]]:
    """What to tokenise at once, some DOCUMENTS_A_CALL texts of up to CHARS_A_CALL characters together, or one longer.

    Each comes with whether it is its document's last.
    """
    call, chars = list[tuple[str, bool]](), 0
    for document in documents:
        for text, is_last in _pieces(document.text):
            if call and chars + len(text) > CHARS_A_CALL:
                yield call
                call, chars = [], 0
            call.append((text, is_last))
            chars += len(text)
        if len(call) >= DOCUMENTS_A_CALL:
            yield call
            call, chars = [], 0
    if call:
        yield call


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """What is tokenised by itself of a document: all of it, or up to PIECE_CHARS, cut before a space if there is one.

    No token holds the end of one word and the beginning of the next, so the cuts do not show.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        space = text.rfind(" ", start + 1, start + PIECE_CHARS)
        after = space if space > 0 else start + PIECE_CHARS
        yield text[start:after], False
        start = after
    yield text[start:], True


def pack(pieces: Iterable[Ids], *, context: int, row_start: int | None) -> Iterator[Row]:
    """Cut the stream of documents into rows of `context` ids; the last partial row is dropped.

    row_start: the id every row begins with; not repeated if a document that begins there brings its own.
    """
    row, filled, starts = np.empty(context, np.int32), 0, list[int]()
    for piece in pieces:
        taken = 0
        while taken < len(piece):
            if filled == 0 and row_start is not None and piece[taken] != row_start:
                row[0], filled = row_start, 1
            if taken == 0:
                starts.append(filled)
            n = min(context - filled, len(piece) - taken)
            row[filled : filled + n] = piece[taken : taken + n]
            filled, taken = filled + n, taken + n
            if filled == context:
                yield Row(row, starts)
                row, filled, starts = np.empty(context, np.int32), 0, []


class Fingerprint:
    """xxh3-128 over the documents read, in order: what the corpus was, however it was stored."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def hashing(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The same documents, each hashed as it passes."""
        for document in documents:
            text = document.text.encode()
            self._hash.update(len(text).to_bytes(8, "little"))
            self._hash.update(text)
            yield document

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over the vocabulary, the special ids and the ids of a probe text (merges, normaliser)."""
    probe = "The naïve café’s 3,141 routes — straße, 東京, 🙂\n\tdef f(x): return x ** 2  # <b>"
    facts = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        _ids(tokenizer, probe, add_special_tokens=True),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
