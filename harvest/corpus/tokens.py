"""Tokenise documents and pack them into rows of `context` token ids.

Documents follow one another in one stream, each as its tokenizer would present it alone (Llama: a BOS before
it); if the tokenizer adds nothing, an EOS ends each. The stream is cut into rows of T tokens. If the tokenizer
begins documents with a BOS every row begins with one too, since such models are poor, and Gemma's useless,
without it. The last, partial row is dropped.

A conversation is what the chat template makes of it, and token ids are used as they are; neither gets a BOS or EOS.

Dimension letters: S rows, T context, and tokens of a document.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import xxhash

from routesae.harvest.cache.manifest import Ids, Roles
from routesae.harvest.corpus.chat import BadConversation, conversation_ids
from routesae.harvest.corpus.texts import Document, TextCounts
from routesae.reporting import WrongInput

log = logging.getLogger(__name__)

DOCUMENTS_A_CALL = 256  # enough for the tokenizer's threads
# A tokenizer takes 50 to 100 bytes a character: a line of 50 MB at once would take 5 GB.
PIECE_CHARS = 1 << 20
CHARS_A_CALL = 1 << 22
MOST_ROLES = 255


class Framing(NamedTuple):
    """The ids put around every document, and those that count as special (sorted)."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    special_ids: tuple[int, ...]

    @property
    def row_start(self) -> int | None:
        """The id every row begins with, or None."""
        return self.before[0] if self.before else None


class Tokenised(NamedTuple):
    """A document's token ids int32 [T], framing included, and each one's role: 0, or 1 + its index in the roles."""

    document: Document
    token_ids_T: Ids
    roles_T: Roles


class Row(NamedTuple):
    """One packed row: int32 [T] and uint8 [T], and the documents that begin in it, by their positions."""

    token_ids_T: Ids
    roles_T: Roles
    starts: list[tuple[int, Document]]


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


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    framing: Framing,
    *,
    roles: dict[str, int],
    counts: TextCounts,
    needs_roles: bool = False,
) -> Iterator[Tokenised]:
    """The token ids of each document, in order.

    roles: {role: its number, from 1}; those that are met are added. counts: conversations that cannot be used are
    added to its malformed ones, and those in which roles are not known, if it needs_roles. Raises WrongInput for
    token ids that the tokenizer does not have, and for conversations if it has no chat template.
    """
    largest = max(tokenizer.get_vocab().values())
    for kind, group in groupby(documents, lambda document: type(document.content)):
        if kind is str:
            for document, ids_T in _of_texts(group, tokenizer, framing):
                yield Tokenised(document, ids_T, np.zeros(len(ids_T), np.uint8))
            continue
        for document in group:
            content, of_tokens = document.content, None
            if isinstance(content, np.ndarray):
                ids = content.tolist()
                if len(beyond := content[(content < 0) | (content > largest)]):
                    raise WrongInput(
                        f"{document.origin}: token id {beyond[0]} is not one of the tokenizer's, 0 to {largest}; "
                        "give ids that were made with it, or texts"
                    )
            else:
                assert not isinstance(content, str)
                try:
                    ids, of_tokens = conversation_ids(tokenizer, content)
                    if of_tokens is None and needs_roles:
                        raise BadConversation(
                            "its tokens cannot be told by role: the chat template changes what messages say, or the "
                            "tokenizer does not say where its tokens stand"
                        )
                except BadConversation as bad:
                    counts.documents -= 1
                    counts.note_malformed(document.origin, str(bad))
                    continue
            numbers = [0 if one is None else roles.setdefault(one, len(roles) + 1) for one in of_tokens or ()]
            if len(roles) > MOST_ROLES:
                raise WrongInput(f"{document.origin}: messages have more than {MOST_ROLES} roles; name fewer")
            yield Tokenised(document, np.array(ids, np.int32), np.array(numbers or [0] * len(ids), np.uint8))


def _of_texts(documents: Iterable[Document], tokenizer: Any, framing: Framing) -> Iterator[tuple[Document, Ids]]:
    before, after = np.array(framing.before, np.int32), np.array(framing.after, np.int32)
    special, literal = set(framing.special_ids) - {tokenizer.unk_token_id}, 0
    parts = [before]
    try:
        for call in _calls(documents):
            # verbose=False: rows are cut to the context below, so "longer than the maximum" would mislead.
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            # split_special_tokens: a literal <s> in a text is text. Not every tokenizer obeys, hence the count.
            ids = tokenizer([text for text, _ in call], split_special_tokens=True, **options)["input_ids"]
            for piece_ids, (_, document) in zip(ids, call, strict=True):
                literal += not special.isdisjoint(piece_ids)
                parts.append(np.array(piece_ids, np.int32))
                if document is not None:
                    yield document, np.concatenate([*parts, after])
                    parts = [before]
    finally:
        if literal:
            log.warning(
                "%d texts spell special tokens such as <s>, and this tokenizer takes them for the tokens: their "
                "positions are special",
                literal,
            )


def _calls(documents: Iterable[Document]) -> Iterator[list[tuple[str, Document | None]]]:
    """What to tokenise at once, some DOCUMENTS_A_CALL texts of up to CHARS_A_CALL characters together, or one longer.

    The last of each document comes with it.
    """
    call, chars = list[tuple[str, Document | None]](), 0
    for document in documents:
        assert isinstance(document.content, str)
        for text, is_last in _pieces(document.content):
            if call and chars + len(text) > CHARS_A_CALL:
                yield call
                call, chars = [], 0
            call.append((text, document if is_last else None))
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


def pack(documents: Iterable[Tokenised], *, context: int, row_start: int | None) -> Iterator[Row]:
    """Cut the stream of documents into rows of `context` ids; the last partial row is dropped.

    row_start: the id every row begins with; not repeated if a document that begins there brings its own.
    """
    row = Row(np.empty(context, np.int32), np.zeros(context, np.uint8), [])
    filled = 0
    for document, piece, roles in documents:
        taken = 0
        while taken < len(piece):
            if filled == 0 and row_start is not None and piece[taken] != row_start:
                row.token_ids_T[0], filled = row_start, 1
            if taken == 0:
                row.starts.append((filled, document))
            n = min(context - filled, len(piece) - taken)
            row.token_ids_T[filled : filled + n] = piece[taken : taken + n]
            row.roles_T[filled : filled + n] = roles[taken : taken + n]
            filled, taken = filled + n, taken + n
            if filled == context:
                yield row
                row = Row(np.empty(context, np.int32), np.zeros(context, np.uint8), [])
                filled = 0


def hashing(documents: Iterable[Tokenised], fingerprint: xxhash.xxh3_128) -> Iterator[Tokenised]:
    """The same documents, each hashed as it passes: what the corpus was, however it was stored."""
    for tokenised in documents:
        content = tokenised.document.content
        if isinstance(content, np.ndarray):
            data = content.tobytes()
        elif isinstance(content, str):
            data = content.encode()
        else:
            data = json.dumps(content, sort_keys=True, default=str).encode()  # a table's messages may hold dates
        fingerprint.update(len(data).to_bytes(8, "little"))
        fingerprint.update(data)
        yield tokenised


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 over the vocabulary, the special ids and the ids of a probe text (merges, normaliser)."""
    probe = "The naïve café’s 3,141 routes — straße, 東京, 🙂\n\tdef f(x): return x ** 2  # <b>"
    facts = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        _ids(tokenizer, probe, add_special_tokens=True),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
