"""Documents in; packed rows of `context` token ids out.

Documents follow one another in one stream, each as its tokenizer would present it alone (Llama: a BOS before
it); where the tokenizer adds nothing, an EOS ends each. The stream is cut into rows of T tokens. Where the
tokenizer begins documents with a BOS every row begins with one too, since such models are poor, and Gemma's
useless, without it. The last, partial row is dropped.

Dimension letters: S rows, T context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import xxhash

from routesae.harvest.cache.manifest import Ids
from routesae.harvest.corpus.texts import Document

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
    """What `tokenizer` puts around a document, read off what it does to two probes."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    before, after = tuple(framed[:at]), tuple(framed[at + len(bare) :])
    if not before and not after and tokenizer.eos_token_id is not None:
        after = (tokenizer.eos_token_id,)
    return Framing(before, after, tuple(sorted(special)))


def tokenize(documents: Iterable[Document], tokenizer: Any, framing: Framing) -> Iterator[tuple[Document, Ids]]:
    """Each document with its token ids, framing included, in the order given."""
    before, after = np.array(framing.before, np.int32), np.array(framing.after, np.int32)
    for batch in _batches(documents):
        pieces = [list(_pieces(document.text)) for document in batch]
        # verbose=False: rows are cut to the context below, so "longer than the maximum" would mislead.
        ids = chain.from_iterable(
            tokenizer(call, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            for call in _calls([piece for of_one in pieces for piece in of_one])
        )
        for document, of_one in zip(batch, pieces, strict=True):
            own = [np.array(piece_ids, np.int32) for piece_ids in islice(ids, len(of_one))]
            yield document, np.concatenate([before, *own, after])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Up to DOCUMENTS_A_CALL of them, fewer where they are long."""
    batch, chars = list[Document](), 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if len(batch) == DOCUMENTS_A_CALL or chars >= CHARS_A_CALL:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """What is tokenised by itself of a document: all of it, or up to PIECE_CHARS, cut before a space where there is
    one. Tokens hold no word's end and the next one's beginning, so the cuts do not show.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        space = text.rfind(" ", start + 1, start + PIECE_CHARS)
        after = space if space > 0 else start + PIECE_CHARS
        yield text[start:after]
        start = after
    yield text[start:]


def _calls(pieces: list[str]) -> Iterator[list[str]]:
    """The pieces of a batch, as many a call as have no more than CHARS_A_CALL characters; one at least."""
    call, chars = list[str](), 0
    for piece in pieces:
        if call and chars + len(piece) > CHARS_A_CALL:
            yield call
            call, chars = [], 0
        call.append(piece)
        chars += len(piece)
    yield call


def pack(pieces: Iterable[Ids], *, context: int, row_start: int | None) -> Iterator[Row]:
    """Cut the stream of documents into rows of `context` ids; the last partial row is dropped.

    row_start: the id every row begins with, not repeated where a document that begins there brings its own.
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

    def passing(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The same documents, each hashed as it goes by."""
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
        tokenizer(probe)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
